"""Sizes rounded up, so that few different ones come, and come back. Loads no torch."""

NUM_STEPS, LEAST_STEP = 16, 256  # of `round_up`, where it is asked for tokens or patches


def power_up(number: int, least: int) -> int:
    """To a power of two, and to `least` at least: for what costs nothing when it is too large."""
    return max(least, 1 << max(0, number - 1).bit_length())


def round_up(number: int, num_steps: int = NUM_STEPS, least_step: int = LEAST_STEP) -> int:
    """
    To one of few sizes: multiples of `least_step`, of which few lie between two powers of two.

    Args:
        num_steps: how many, a power of two itself. One part of so many is wasted at most.
    """
    step = max(least_step, power_up(number, 1) // (2 * num_steps))
    return -(-number // step) * step
