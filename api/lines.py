"""
Ended items for those who read while the job runs: the line that the file will hold, and where it stood.
"""

from collections.abc import Sequence
from typing import Any

from storage.ids import JobId
from storage.items import Ended
from storage.parts import Answer
from tasks.lines import build_line


def build_live_line(job: JobId, model: str, item: Ended, parts: Sequence[Answer]) -> dict[str, Any]:
    """With the number of its commit, and its line's."""
    return {**build_line(job, model, item, parts), "seq": item.seq, "line": item.line}
