"""Parts are written under their item's fence, outlive its lease, and are answered once."""

from typing import Any

import pytest
from sqlalchemy import select, text

from storage import invariants, items, parts
from storage.db import Database
from storage.errors import DatabaseRefusedError
from storage.ids import ItemId
from storage.items import Completion, Fence
from storage.parts import Answer, NewPart
from storage.states import ItemState
from storage.tables import Item
from tests.storage.rows import lease, let_backoff_end, let_leases_end, make_job

PLAN, OTHER_PLAN = b"a plan", b"another plan"


def answer(number: int, **values: Any) -> Answer:
    return Answer(
        number,
        start_s=10.0 * (number - 1),
        end_s=10.0 * number,
        images=[{"index": 0, "kind": "video", "times_s": [0.5]}],
        **{"text": f"part {number}", "finish_reason": "stop", "num_prompt_tokens": 7, **values},
    )


def keep(database: Database, fence: Fence, *answers: Answer, plan: bytes = PLAN) -> bool:
    with database.write() as session:
        held = parts.keep(session, [NewPart(fence, plan, one) for one in answers])
    return fence.item in held


def begin(database: Database, fence: Fence, plan: bytes = PLAN) -> list[Answer] | None:
    with database.write() as session:
        return parts.begin(session, fence, plan)


def read(database: Database, item: ItemId) -> list[Answer]:
    with database.read() as session:
        return parts.list_by_item(session, [item]).get(item, [])


def lease_again(database: Database) -> Fence:
    let_leases_end(database)
    with database.write() as session:
        items.expire_leases(session)
        session.execute(text("UPDATE items SET not_before = 0.0"))
    return lease(database, 1).items[0].fence


def test_parts_outlive_the_lease_and_are_found_at_the_next(database: Database) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    assert [] == begin(database, fence)
    assert keep(database, fence, answer(2), answer(1))

    found = begin(database, lease_again(database))

    assert [answer(1), answer(2)] == found


def test_lost_lease_writes_no_part_and_reads_none(database: Database) -> None:
    make_job(database, 1)
    old = lease(database, 1).items[0].fence
    assert keep(database, old, answer(1))
    new = lease_again(database)

    assert not keep(database, old, answer(2))
    assert begin(database, old) is None
    assert keep(database, new, answer(3))
    assert [answer(1), answer(3)] == read(database, new.item)


def test_lease_that_is_over_writes_no_part_while_nobody_has_taken_the_item(
    database: Database,
) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    let_leases_end(database)

    assert not keep(database, fence, answer(1))


def test_parts_of_another_plan_go(database: Database) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    keep(database, fence, answer(1), answer(2), answer(3))

    assert [] == begin(database, fence, OTHER_PLAN)
    assert keep(database, fence, answer(1, text="other"), plan=OTHER_PLAN)
    assert [answer(1, text="other")] == read(database, fence.item)


def test_part_that_is_written_again_stays_as_it_was(database: Database) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    keep(database, fence, answer(1))

    assert keep(database, fence, answer(1, text="once more"), answer(2))
    assert [answer(1), answer(2)] == read(database, fence.item)


def test_part_that_failed_for_good_is_kept_with_its_error(database: Database) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    failed = answer(1, text=None, error_code="video_unreadable", error_message="No frame.")

    assert keep(database, fence, failed)
    assert [failed] == read(database, fence.item)


@pytest.mark.parametrize("values", [{"text": None}, {"error_code": "x", "error_message": "y"}])
def test_part_has_a_text_or_an_error(database: Database, values: dict[str, Any]) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence

    with pytest.raises(DatabaseRefusedError):
        keep(database, fence, answer(1, **values))


def test_parts_of_several_items_are_written_in_one_go(database: Database) -> None:
    make_job(database, 3)
    first, second, third = (item.fence for item in lease(database, 3).items)
    with database.write() as session:
        held = parts.keep(session, [NewPart(f, PLAN, answer(1)) for f in (third, first)])

    assert {first.item, third.item} == held
    with database.read() as session:
        found = parts.list_by_item(session, [first.item, second.item, third.item])
    assert {first.item: [answer(1)], third.item: [answer(1)]} == found


def crash(database: Database) -> None:
    """Let all leases end in silence."""
    let_leases_end(database)
    with database.write() as session:
        items.expire_leases(session)


def read_item(database: Database, item: ItemId) -> tuple[ItemState, int, bool]:
    with database.read() as session:
        query = select(Item.state, Item.num_crashes, Item.is_suspect).where(Item.id == item)
        state, num_crashes, is_suspect = session.execute(query).one()
    return state, num_crashes, is_suspect


def test_lease_that_answered_a_part_is_no_crash_of_its_item(database: Database) -> None:
    make_job(database, 1)
    for number in range(1, 6):
        fence = lease(database, 1).items[0].fence
        assert keep(database, fence, answer(number))
        crash(database)
        let_backoff_end(database)

        assert (ItemState.PENDING, 0, False) == read_item(database, fence.item)


def test_part_that_kills_every_worker_fails_its_item_when_nothing_else_is_left(
    database: Database,
) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    assert keep(database, fence, answer(1))
    crash(database)
    for _ in range(items.MAX_CRASHES):
        let_backoff_end(database)
        fence = lease(database, 1).items[0].fence
        crash(database)

    assert (ItemState.FAILED, 3, True) == read_item(database, fence.item)
    assert [answer(1)] == read(database, fence.item)


def test_reported_crash_of_an_item_that_got_on_makes_it_a_suspect_and_counts_for_nothing(
    database: Database,
) -> None:
    make_job(database, 2)
    first, second = (item.fence for item in lease(database, 2).items)
    assert keep(database, first, answer(1))
    with database.write() as session:
        items.report_crash(session, [first, second])

    assert (ItemState.PENDING, 0, True) == read_item(database, first.item)
    assert (ItemState.PENDING, 1, True) == read_item(database, second.item)


def test_items_are_read_by_as_many_as_have_so_many_parts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MAX_PARTS_READ", 3)
    make_job(database, 4)
    fences = [item.fence for item in lease(database, 4).items]
    for fence, num_parts in zip(fences, (0, 2, 2, 5), strict=True):
        keep(database, fence, *map(answer, range(1, num_parts + 1)))
    ids = [fence.item for fence in fences]

    with database.read() as session:
        fitting = [parts.count_fitting(session, ids[start:]) for start in range(5)]

    assert [2, 1, 1, 1, 0] == fitting


def complete(database: Database, fence: Fence, num_parts: int) -> None:
    done = Completion(fence, "all", "stop", 9, 9, {"num_parts": num_parts})
    with database.write() as session:
        items.complete(session, [done])


def find_violations(database: Database) -> set[str]:
    with database.read() as session:
        return {found.statement[:2] for found in invariants.find_violations(session)}


def test_result_over_all_its_parts_holds_the_invariants(database: Database) -> None:
    make_job(database, 2)
    first, second = (item.fence for item in lease(database, 2).items)
    keep(database, first, answer(1), answer(2))
    complete(database, first, num_parts=2)
    with database.write() as session:
        items.complete(session, [Completion(second, "text", "stop", 1, 1)])

    assert set() == find_violations(database)


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM parts WHERE number = 1",
        "UPDATE parts SET number = 7 WHERE number = 2",
        "UPDATE parts SET attempt = 2 WHERE number = 1",
        "UPDATE parts SET attempt = 0 WHERE number = 1",
        "UPDATE parts SET plan = '1' WHERE number = 1",
        "INSERT INTO parts_log (job_id, item_id, number, plan) SELECT job_id, item_id, number, plan FROM parts_log",
    ],
)
def test_each_harm_to_parts_is_seen(database: Database, harm: str) -> None:
    make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    keep(database, fence, answer(1), answer(2))
    complete(database, fence, num_parts=2)

    with database.write() as session:
        session.execute(text(harm))
        seen = {found.statement[:2] for found in invariants.find_violations(session)}
        session.rollback()

    assert {"L7"} == seen
