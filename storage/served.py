"""
Which models workers serve, and how much media a prompt may bring them.

An engine's limits are the truth about a model: whoever checks lines asks here. All workers of a model
have the same, or what one accepts another one refuses; so who comes with others while somebody serves
the model is turned away.

What their engines have done stands here too, a row for each worker, for metrics. Workers come and go
under names of their own; there each goes by a number, which the next one takes over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.orm import Session

from storage.db import clock, insert_or_skip
from storage.errors import ServedOtherwiseError
from storage.tables import ServedModel, ServingEngine


@dataclass(frozen=True, slots=True)
class Served:
    """One worker's word about its model; no `max_frames`: as many as the engine takes."""

    model: str
    max_images: int
    max_videos: int
    max_frames: int | None = None

    def __str__(self) -> str:
        frames = "" if self.max_frames is None else f", frames={self.max_frames}"
        return f"image={self.max_images}, video={self.max_videos}{frames}"


def register(session: Session, served: Served, *, worker: str, alive_s: float) -> None:
    """
    Say that this worker serves a model.

    Args:
        alive_s: a worker that was not heard of for so long is gone.

    Raises:
        ServedOtherwiseError: one that is not gone serves it with other limits.
    """
    given = {
        "max_images": served.max_images,
        "max_videos": served.max_videos,
        "max_frames": served.max_frames,
        "worker": worker,
        "seen_at": clock(),
    }
    is_same = and_(
        ServedModel.max_images == served.max_images,
        ServedModel.max_videos == served.max_videos,
        ServedModel.max_frames.is_not_distinct_from(served.max_frames),
    )
    registered = session.scalars(
        insert_or_skip(session, ServedModel)
        .values(model=served.model, **given)
        .on_conflict_do_update(
            index_elements=[ServedModel.model],
            set_=given,
            where=or_(is_same, ServedModel.seen_at <= clock() - alive_s),
        )
        .returning(ServedModel.model)
    ).one_or_none()
    if registered is None:
        others = find(session, served.model)
        assert others is not None, "it was in the way"
        raise ServedOtherwiseError(
            f"Another worker serves {served.model!r} with {others}, and this one has {served}: give "
            f"all the same limits, or stop the others first. One that was killed is taken for stopped after {alive_s:.0f} s."
        )


def touch(session: Session, model: str, *, worker: str) -> None:
    """Say that it is still served."""
    session.execute(
        update(ServedModel)
        .where(ServedModel.model == model)
        .values(worker=worker, seen_at=clock())
        .execution_options(synchronize_session=False)
    )


def leave(session: Session, model: str, *, worker: str) -> None:
    """This worker stops. Who else serves the model says so again with its next beat."""
    session.execute(
        update(ServedModel)
        .where(ServedModel.model == model, ServedModel.worker == worker)
        .values(seen_at=0.0)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        delete(ServingEngine)
        .where(ServingEngine.model == model, ServingEngine.worker == worker)
        .execution_options(synchronize_session=False)
    )


def find(session: Session, model: str) -> Served | None:
    """The limits of whoever served the model last; None where nobody ever did."""
    row = session.execute(
        select(
            ServedModel.model,
            ServedModel.max_images,
            ServedModel.max_videos,
            ServedModel.max_frames,
        ).where(ServedModel.model == model)
    ).one_or_none()
    return None if row is None else Served(*row)


@dataclass(frozen=True, slots=True)
class Reported:
    """
    What one worker said last of its engine.

    Attributes:
        number: of the worker among those of the model; kept while it lives.
        usage: totals since its engine was made, and what it holds now, by the engine's own names.
    """

    model: str
    number: int
    usage: Mapping[str, Any]


def report(
    session: Session, model: str, *, worker: str, usage: Mapping[str, Any], alive_s: float
) -> int | None:
    """
    Say what this worker's engine has done.

    Args:
        alive_s: a worker that says nothing for so long is gone, and another one takes its number.

    Returns:
        The number that the worker has from now on; None where it had one, or where another one was
        quicker to take the one that was free: then the next report takes one.
    """
    said = {"worker": worker, "usage": dict(usage), "alive_until": clock() + alive_s}
    had = session.scalars(
        update(ServingEngine)
        .where(ServingEngine.model == model, ServingEngine.worker == worker)
        .values(said)
        .returning(ServingEngine.number)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if had is not None:
        return None
    taken = set(
        session.scalars(
            select(ServingEngine.number).where(
                ServingEngine.model == model, ServingEngine.alive_until > clock()
            )
        )
    )
    free = next(number for number in range(len(taken) + 1) if number not in taken)
    return session.scalars(
        insert_or_skip(session, ServingEngine)
        .values(model=model, number=free, **said)
        .on_conflict_do_update(
            index_elements=[ServingEngine.model, ServingEngine.number],
            set_=said,
            where=ServingEngine.alive_until <= clock(),
        )
        .returning(ServingEngine.number)
    ).one_or_none()


def list_reports(session: Session) -> list[Reported]:
    """Of all workers that are alive, by model and number."""
    rows = session.execute(
        select(ServingEngine.model, ServingEngine.number, ServingEngine.usage)
        .where(ServingEngine.alive_until > clock())
        .order_by(ServingEngine.model, ServingEngine.number)
    )
    return [Reported(*row) for row in rows]
