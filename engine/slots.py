"""
The places of a decode batch, and what the device remembers of who has one.

A slot is a place among those that decode together. Its newest token stays on the device, where the
next step reads it: no step waits for the host to have seen what the last one chose. Everything else
that a step needs the host knows by counting, and sends along as one small table.
"""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Table = npt.NDArray[np.int64]

# Rows of a step's table.
SLOT, WRITE_ROW, POSITION, START, LEN = range(5)
NUM_COLUMNS = 5


class Slots:
    """
    Args:
        num: sequences that decode together at most.

    Attributes:
        tokens: (num + 1,), int64, device: the newest token of the sequence in each slot. The last
            is nobody's: what fills up a batch reads and writes there.
    """

    def __init__(self, num: int, device: torch.device) -> None:
        self.scratch = num
        self.tokens = torch.zeros(num + 1, dtype=torch.int64, device=device)

    def table(self, sequences: Many[Any], num: int) -> Table:
        """
        What one decode step reads, for `num` places of which the last may be nobody's.

        Returns:
            (NUM_COLUMNS, num), int64: each sequence's slot, the row that its newest token is
            written to, that token's position, the first row of its slab, and the rows in use.
        """
        table = np.zeros((NUM_COLUMNS, num), dtype=np.int64)
        table[SLOT], table[LEN] = self.scratch, 1
        if not sequences:
            return table
        columns = [(s.slot, s.start, s.num_rows, s.prepared.rope_delta) for s in sequences]
        slots, starts, lens, deltas = np.array(columns, dtype=np.int64).T
        filled = slice(0, len(sequences))
        table[SLOT, filled] = slots
        table[WRITE_ROW, filled] = starts + lens - 1
        table[POSITION, filled] = lens - 1 + deltas
        table[START, filled] = starts
        table[LEN, filled] = lens
        return table

    def keep(self, slots: Tensor, token_ids: Tensor) -> None:
        """
        Remember what was chosen.

        Args:
            slots, token_ids: (n,), int64, device. No token at all (-1) is kept as 0: the host will
                end the sequence, and until then its steps must find something to read.
        """
        self.tokens.index_copy_(0, slots, token_ids.clamp(min=0))
