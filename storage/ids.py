"""
Names for rows: UUIDs of version 7 for what a client may see, plain numbers for items.

A version 7 UUID begins with the time, so new rows land at the end of an index and `ORDER BY id` is
the order of creation, as far as the clocks of the hosts agree.
"""

import secrets
import time
from typing import NewType
from uuid import UUID

TenantId = NewType("TenantId", UUID)
FileId = NewType("FileId", UUID)
JobId = NewType("JobId", UUID)
ItemId = NewType("ItemId", int)
LeaseId = NewType("LeaseId", UUID)
WebhookId = NewType("WebhookId", UUID)


def new_uuid() -> UUID:
    """
    A version 7 UUID (RFC 9562): Unix milliseconds, 12 bits of the fraction of one, 62 random bits.

    The fraction keeps the ids of one process in order even where several are made in a millisecond.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    value = (milliseconds & (2**48 - 1)) << 80
    value |= 0x7 << 76
    value |= (nanoseconds * 4096 // 1_000_000) << 64
    value |= 0b10 << 62
    value |= secrets.randbits(62)
    return UUID(int=value)
