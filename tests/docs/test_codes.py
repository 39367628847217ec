"""docs/producers.md explains every code with which fetching may end an item."""

import re

from media.errors import FetchFailedError, HostPausedError
from tests.docs.pages import find_rows, read_page


def test_codes_of_fetching_are_explained() -> None:
    named = {
        code
        for row in find_rows(read_page("docs/producers.md"))
        if len(row) == 2
        for code in re.findall(r"`([a-z_]+)`", row[0])
    }
    classes: set[type[FetchFailedError]] = {FetchFailedError, *FetchFailedError.__subclasses__()}
    own = {found.code for found in classes if found.__module__ == "media.errors"}

    assert own - {HostPausedError.code} <= named  # an item never ends with a pause
