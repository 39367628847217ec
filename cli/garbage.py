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


def put_off() -> None:
    """For as long as the process starts; at its end nothing is looked through."""
    gc.set_threshold(*STARTING)
    atexit.register(gc.freeze)


def settle() -> None:
    """What is there by now stays, and from now on garbage is looked for as usual."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


_USUAL: Final = gc.get_threshold()
