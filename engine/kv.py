"""The tensors under the slabs: keys and values of every layer, allocated once."""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's part of a row: `kv_heads` keys and values of `dim` numbers."""

    kv_heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one row holds, layer by layer."""

    layers: tuple[KVLayer, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, text_config: Any, dtype: torch.dtype) -> Self:
        """Of a text config whose layers are all alike, as most are."""
        heads = text_config.num_attention_heads
        layer = KVLayer(
            getattr(text_config, "num_key_value_heads", None) or heads,
            getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        )
        return cls((layer,) * text_config.num_hidden_layers, dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all layers, keys and values together."""
        return 2 * self.dtype.itemsize * sum(x.kv_heads * x.dim for x in self.layers)


class KVRows:
    """
    Attributes:
        keys, values: a (num_rows, kv_heads, dim) tensor for each layer.
    """

    def __init__(self, shape: KVShape, num_rows: int, device: torch.device) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for rows in (self.keys, self.values):
            for layer in shape.layers:
                size = (num_rows, layer.kv_heads, layer.dim)
                rows.append(_zeros(size, shape.dtype, device))


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """
    On a CPU, memory that counts only where something was written.

    A model that could read 262144 tokens has rows for as many, and hardly a prompt is so long:
    `torch.zeros` would write all of them.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(size)
