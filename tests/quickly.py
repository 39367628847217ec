"""
A module of the tests as a process that starts as the `darkroom` command does: see `cli.garbage`.

Otherwise a third of what it costs until it is ready would be Python's search for garbage.

    python -m tests.quickly MODULE [WORD ...]       as: python -m MODULE [WORD ...]
"""

import runpy
import sys

from cli.garbage import put_off

if __name__ == "__main__":
    put_off()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
