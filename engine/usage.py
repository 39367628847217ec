"""What an engine has done and holds, for whoever watches it. It knows no torch."""

from dataclasses import dataclass, fields, replace
from typing import Any, Final

NOW: Final = ("num_running", "num_waiting", "num_preparing")


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """
    Totals since the engine was made, and what it holds now.

    Attributes:
        encode_s, prefill_s, decode_s: the device's time on each kind of work.
        num_patches: encoded.
        num_prompt_tokens: read, once for each output that had to read them.
        num_tokens: decoded.
        num_cached_tokens: of prompts: not read, but copied.
        waited_for_media_s: in which the device had nothing to do but wait for pictures.
        floor_s: what the requests that have finished take at least, by `engine.floors`: in the dtype
            of the weights, however they are multiplied; None where nobody knows the device or the
            family.
        num_running: outputs that read their prompts or decode.
        num_waiting: outputs that are prepared and have not begun.
        num_preparing: requests whose pictures are fetched, decoded and cut.
    """

    encode_s: float
    prefill_s: float
    decode_s: float
    num_patches: int
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int
    waited_for_media_s: float
    floor_s: float | None
    num_running: int
    num_waiting: int
    num_preparing: int

    @property
    def busy_s(self) -> float:
        return self.encode_s + self.prefill_s + self.decode_s

    def since(self, before: "EngineUsage") -> "EngineUsage":
        """With the totals of what was done after `before`."""
        totals: dict[str, Any] = {}
        for name in (field.name for field in fields(self) if field.name not in NOW):
            after = getattr(self, name)
            totals[name] = None if after is None else after - (getattr(before, name) or 0)
        return replace(self, **totals)
