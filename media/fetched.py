"""
What fetching brings: bytes and a report. Plain values, which need nothing that fetching needs.
"""

from dataclasses import dataclass

UNKNOWN_MEDIA_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class FetchReport:
    """
    What happened, for the item's report; nothing in it is secret to who sent the URL.

    Attributes:
        scheme, host: as typed, the host of s3 being the bucket; None where the URL was refused or
            its host may not be reached.
        media_type: as in `Fetched`; None where nothing came.
        num_bytes: of the body, as far as it came.
        sha256: in hex; None unless all of the body came.
        fetch_ms: all tries, redirects and waits between them; not the wait for a free slot.
        num_redirects: of the last try.
        num_tries: 0 where the failure of a moment ago was remembered.
        error_code: of `media.errors`; None where the fetch worked.
    """

    scheme: str | None
    host: str | None
    media_type: str | None
    num_bytes: int
    sha256: str | None
    fetch_ms: float
    num_redirects: int
    num_tries: int
    error_code: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """
    Attributes:
        content: the whole body.
        media_type: what the server calls it, in lower case: a claim, the decoders look at the
            bytes. `UNKNOWN_MEDIA_TYPE` where it makes none.
        report: for the item.
    """

    content: bytes
    media_type: str
    report: FetchReport
