"""
Chats that have ended, and how they leave the database.

A chat is a job of the fast lane. Its client has its answer, no list shows it, and no count is read from
it: what hangs on it goes with it. The blob of its request goes by itself, as that of any expired file.
"""

from typing import Final

from sqlalchemy import delete, exists, func, literal, select
from sqlalchemy.orm import Session, aliased

from storage import parts
from storage.db import clock
from storage.files import REQUEST_PURPOSE
from storage.jobs import FAST_LANE
from storage.states import TERMINAL_JOB_STATES
from storage.tables import Event, File, Item, Job, Part, Result

PAGE: Final = 100
"""Chats that go in one transaction at most."""


def remove_page(session: Session, *, older_than_s: float, limit: int = PAGE) -> int:
    """
    Remove one page of chats that ended so long ago. One that a later job names stays.

    Those that others hold are skipped, so that two who remove do not wait for each other. Of chats with
    very many parts fewer go at a time.

    Returns:
        How many went; 0 when no more are left.
    """
    gone = clock() - older_than_s
    later = aliased(Job)
    rows = session.execute(
        select(Job.id, Job.input_file_id)
        .where(
            # A constant of the statement, or neither database takes the index.
            Job.priority == literal(FAST_LANE, literal_execute=True),
            Job.created_at < gone,  # says nothing more than the next, but in the words of the index
            func.coalesce(Job.completed_at, Job.failed_at, Job.expired_at, Job.cancelled_at) < gone,
            Job.state.in_(TERMINAL_JOB_STATES),
            ~exists().where(later.retry_of == Job.id),
        )
        .order_by(Job.created_at)
        .limit(limit)
        .with_for_update(of=Job, skip_locked=True)
    ).all()
    if not rows:
        return 0
    found = session.execute(
        select(Item.id, Item.job_id)
        .where(Item.job_id.in_([row.id for row in rows]))
        .order_by(Item.id)
    ).all()
    num_fitting = parts.count_fitting(session, [item.id for item in found])
    later_ones = {item.job_id for item in found[num_fitting:]}
    items = [item.id for item in found if item.job_id not in later_ones]
    going = [row for row in rows if row.id not in later_ones]
    ids, files = [row.id for row in going], [row.input_file_id for row in going]
    for table, is_theirs in (
        (Part, Part.item_id.in_(items)),
        (Result, Result.item_id.in_(items)),
        (Event, Event.job_id.in_(ids)),
        (Item, Item.id.in_(items)),
        (Job, Job.id.in_(ids)),
        (File, File.id.in_(files) & (File.purpose == REQUEST_PURPOSE)),
    ):
        session.execute(delete(table).where(is_theirs).execution_options(synchronize_session=False))
    return len(ids)
