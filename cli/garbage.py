"""
When this process looks for garbage: seldom while it starts, and never among what it has imported.

Imports make objects that stay to the end, hundreds of thousands with a model. By Python's usual
thresholds all of them are looked through again and again on the way there, once more when the process
ends, and by each full collection in between.
"""

import atexit
import gc
from typing import Final

STARTING: Final = (20_000, 50, 100)

_usual: tuple[int, int, int] | None = None  # while it is put off


def put_off() -> None:
    """For as long as the process starts; at its end nothing is looked through."""
    global _usual
    _usual = gc.get_threshold()
    gc.set_threshold(*STARTING)
    atexit.register(gc.freeze)


def settle() -> None:
    """
    What is there by now stays, and from now on garbage is looked for as usual.

    Of a process in which it was put off; another is its owner's.
    """
    global _usual
    if _usual is not None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_usual)
        _usual = None
