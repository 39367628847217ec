"""
Inference: Python objects in, Python objects out. The face is `LLM`, with vLLM's names.

Names are loaded when they are asked for: `import engine` costs nothing, `engine.LLM` loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.errors import (
        BadConfig,
        EngineError,
        PromptFailedError,
        RequestError,
        ResultError,
    )
    from engine.inputs import Request
    from engine.llm import LLM
    from engine.request import CompletionOutput, Logprob, RequestOutput, Result, SamplingParams

_HOMES = {
    "BadConfig": "engine.errors",
    "CompletionOutput": "engine.request",
    "EngineError": "engine.errors",
    "LLM": "engine.llm",
    "Logprob": "engine.request",
    "PromptFailedError": "engine.errors",
    "Request": "engine.inputs",
    "RequestError": "engine.errors",
    "RequestOutput": "engine.request",
    "Result": "engine.request",
    "ResultError": "engine.errors",
    "SamplingParams": "engine.request",
}

__all__ = [
    "LLM",
    "BadConfig",
    "CompletionOutput",
    "EngineError",
    "Logprob",
    "PromptFailedError",
    "Request",
    "RequestError",
    "RequestOutput",
    "Result",
    "ResultError",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
