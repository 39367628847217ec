"""The tensors under the slabs: keys and values of every layer, allocated once."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one row holds: `kv_heads` keys and values of `dim` numbers, in each of `num_layers`."""

    num_layers: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, text_config: Any, dtype: torch.dtype) -> Self:
        """Read off a model's text config."""
        return cls(
            text_config.num_hidden_layers,
            text_config.num_key_value_heads,
            text_config.hidden_size // text_config.num_attention_heads,
            dtype,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all layers, keys and values together."""
        return 2 * self.num_layers * self.kv_heads * self.dim * self.dtype.itemsize


class KVRows:
    """
    Attributes:
        keys, values: a (num_rows, kv_heads, dim) tensor for each layer.
    """

    def __init__(self, shape: KVShape, num_rows: int, device: torch.device) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for rows in (self.keys, self.values):
            for _ in range(shape.num_layers):
                size = (num_rows, shape.kv_heads, shape.dim)
                rows.append(torch.zeros(size, dtype=shape.dtype, device=device))
