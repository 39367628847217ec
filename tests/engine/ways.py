"""Other ways in which an engine may read its prompts and what comes of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from engine import LLM


def read_late(llm: LLM) -> None:
    """From now on as on a GPU: tokens are read two batches late, and prefills wait to be full ones."""
    llm.engine._max_flights = 2
    llm.engine._scheduler._patience = 4


@contextmanager
def in_pieces(llm: LLM, num_tokens: int = 24) -> Iterator[None]:
    """For the block, prefills hold so few tokens that most prompts are read in several."""
    scheduler = llm.engine._scheduler
    usual = scheduler._max_prefill_tokens
    scheduler._max_prefill_tokens = num_tokens
    try:
        yield
    finally:
        scheduler._max_prefill_tokens = usual


@contextmanager
def keeping_prefixes(llm: LLM) -> Iterator[None]:
    """For the block, prompts that begin as earlier ones read only the rest."""
    processor = llm.engine._processor
    processor._keeps_prefixes = True
    try:
        yield
    finally:
        processor._keeps_prefixes = False
        llm.reset_prefix_cache()
