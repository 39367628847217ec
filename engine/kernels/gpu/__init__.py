"""
Triton kernels. Imported on a GPU only; what each means stands with its twin, one folder up.

House rules: offsets into anything that grows with tokens or KV rows are int64; every load and store
is masked, or stays by its bounds in what was given; sums are float32, those of weights to draw from
float64; nothing is autotuned, so nothing is measured while others wait.
"""

import math

LOG2_E = math.log2(math.e)  # exponentials are powers of two, as the device has them


def count_blocks(number: int, block: int) -> int:
    """As triton.cdiv, which is made for kernels, too, and takes the host 2 us."""
    return -(-number // block)
