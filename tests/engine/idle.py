"""What an engine must look like when nobody waits for anything."""

from engine.engine import Engine


def num_free_rows(engine: Engine) -> int:
    return engine._scheduler._slabs.num_free_rows


def assert_idle(engine: Engine) -> None:
    """Nothing is under way, and every row has been given back."""
    assert {} == engine._tickets
    assert {} == engine._preparing
    assert not engine._scheduler.has_work
    num_kept = engine._scheduler.num_kept_rows  # of prompts, for those that begin alike
    assert engine._scheduler._slabs.largest_slab == num_free_rows(engine) + num_kept
