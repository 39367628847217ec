"""The tensors under the slabs: keys and values of every layer, allocated once."""

import torch
from torch import Tensor


class KVRows:
    """
    Attributes:
        keys, values: a (num_rows, kv_heads, dim) tensor for each layer.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_rows, kv_heads, dim)
        self.keys: list[Tensor] = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)
        ]
        self.values: list[Tensor] = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)
        ]


def row_bytes(*, num_layers: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of one row over all layers, keys and values together."""
    return 2 * num_layers * kv_heads * dim * dtype.itemsize
