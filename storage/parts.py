"""
Parts: what was answered of an item that is asked piece by piece, kept before the whole is done.

They are written under the item's fence and outlive its lease, so that whoever leases the item next asks
only for the pieces that are missing. They stay when the item ends, also when it fails.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from storage import items
from storage.db import insert_or_skip
from storage.errors import PlanChangedError
from storage.ids import ItemId
from storage.items import Fence
from storage.tables import Part

MAX_PARTS_READ: Final = 2000
"""At a time, where items are read or removed by the page: one of them may have a thousand."""


@dataclass(frozen=True, slots=True)
class Answer:
    """
    A part that is done: it has a text, or an error that no further try can cure.

    Args:
        number: within its item, from 1.
        start_s, end_s: of a stretch of a clip, in its seconds; None for images.
        images: how they were used, in the form of a result's report.
    """

    number: int
    start_s: float | None = None
    end_s: float | None = None
    images: Sequence[Mapping[str, Any]] = ()
    text: str | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class NewPart:
    """An answer as its worker hands it in, with what must still be true for it to count."""

    fence: Fence
    plan: bytes
    answer: Answer


def begin(
    session: Session, fence: Fence, plan: bytes, *, may_drop: bool = True
) -> list[Answer] | None:
    """
    Take up an item where its earlier leases left it.

    Parts of any other plan are dropped: the clip behind its address is another one, or the model's
    limits are.

    Args:
        may_drop: whether the item may begin anew.

    Returns:
        What is done of this plan, by number; None where the lease is lost.

    Raises:
        PlanChangedError: there are parts of another plan, which may not be dropped.
    """
    if not items.lock(session, [fence]):
        return None
    others = Part.item_id == fence.item, Part.plan != plan
    if not may_drop and session.scalar(select(Part.number).where(*others).limit(1)) is not None:
        raise PlanChangedError
    session.execute(delete(Part).where(*others).execution_options(synchronize_session=False))
    return list_by_item(session, [fence.item]).get(fence.item, [])


def keep(session: Session, parts: Sequence[NewPart]) -> frozenset[ItemId]:
    """
    Write parts under their items' fences. One that is there already stays as it is.

    Returns:
        The items that are still held; for all others nothing was written.
    """
    held = items.lock(session, [part.fence for part in parts])
    rows = [
        {
            **asdict(part.answer),
            "images": [dict(image) for image in part.answer.images],
            "item_id": part.fence.item,
            "plan": part.plan,
            "attempt": part.fence.attempt,
        }
        for part in parts
        if part.fence.item in held
    ]
    if rows:
        session.execute(
            insert_or_skip(session, Part).on_conflict_do_nothing(
                index_elements=[Part.item_id, Part.number]
            ),
            rows,
        )
    return held


def list_by_item(session: Session, ids: Collection[ItemId]) -> dict[ItemId, list[Answer]]:
    """The parts of those of these items that have any, by number."""
    found: dict[ItemId, list[Answer]] = {}
    rows = session.execute(
        select(Part.item_id, *_ANSWER)
        .where(Part.item_id.in_(ids))
        .order_by(Part.item_id, Part.number)
    )
    for item, *answer in rows:
        found.setdefault(item, []).append(Answer(*answer))
    return found


def count_fitting(session: Session, ids: Sequence[ItemId]) -> int:
    """How many of these items, in their order, to take at a time; at least one, if there is one."""
    query = select(Part.item_id, func.count()).where(Part.item_id.in_(ids)).group_by(Part.item_id)
    num_by_item = dict(session.execute(query).all())
    num_parts = 0
    for place, item in enumerate(ids):
        num_parts += num_by_item.get(item, 0)
        if place and num_parts > MAX_PARTS_READ:
            return place
    return len(ids)


_ANSWER: Final = (
    Part.number,
    Part.start_s,
    Part.end_s,
    Part.images,
    Part.text,
    Part.finish_reason,
    Part.num_prompt_tokens,
    Part.num_completion_tokens,
    Part.num_cached_tokens,
    Part.error_code,
    Part.error_message,
)
