"""Other ways in which an engine may read its prompts, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from engine import LLM


@contextmanager
def in_pieces(llm: LLM, num_tokens: int = 24) -> Iterator[None]:
    """Prefills hold so few tokens that most prompts are read in several."""
    scheduler = llm.engine._scheduler
    usual = scheduler._max_prefill_tokens
    scheduler._max_prefill_tokens = num_tokens
    try:
        yield
    finally:
        scheduler._max_prefill_tokens = usual


@contextmanager
def keeping_prefixes(llm: LLM) -> Iterator[None]:
    """Prompts that begin as earlier ones read only the rest."""
    processor = llm.engine._processor
    processor._keeps_prefixes = True
    try:
        yield
    finally:
        processor._keeps_prefixes = False
        llm.reset_prefix_cache()
