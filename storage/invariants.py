"""
L1 to L7: what must hold in every database at every moment, as queries that return no row.

`install_log` adds triggers that copy each change of an item into `items_log`, and each part that is
written into `parts_log`: for tests only. Where there is no log, the statements about changes are left out, so the script runs on any database.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from storage.db import is_sqlite
from storage.states import TERMINAL_ITEM_STATES, TERMINAL_JOB_STATES

_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(TERMINAL_ITEM_STATES))
_JOB_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(TERMINAL_JOB_STATES))

ROWS: Final[Mapping[str, str]] = {
    "L1 a leased item has a lease, and no other has": """
        SELECT id FROM items
        WHERE (state = 'leased') <> (lease_id IS NOT NULL AND lease_until IS NOT NULL)
        """,
    "L2 a result stands under its item's last attempt": """
        SELECT items.id FROM results JOIN items ON items.id = results.item_id
        WHERE items.state <> 'completed' OR results.attempt <> items.attempt
           OR results.job_id <> items.job_id
        """,
    "L5 items are as many as the job's lines": """
        SELECT jobs.id FROM jobs
        WHERE num_expanded <> (SELECT count(*) FROM items WHERE job_id = jobs.id)
           OR (state <> 'validating' AND num_total <> num_expanded)
        """,
    "L5 counters agree with the items' states": """
        SELECT jobs.id FROM jobs
        LEFT JOIN (
          SELECT job_id,
                 sum(CASE WHEN state = 'completed' THEN 1 ELSE 0 END) AS completed,
                 sum(CASE WHEN state = 'failed' THEN 1 ELSE 0 END) AS failed,
                 sum(CASE WHEN state = 'cancelled' THEN 1 ELSE 0 END) AS cancelled,
                 sum(CASE WHEN state = 'expired' THEN 1 ELSE 0 END) AS expired
          FROM items GROUP BY job_id
        ) counted ON counted.job_id = jobs.id
        WHERE num_completed <> coalesce(completed, 0) OR num_failed <> coalesce(failed, 0)
           OR num_cancelled <> coalesce(cancelled, 0) OR num_expired <> coalesce(expired, 0)
        """,
    "L5 a job that ended has no open item": f"""
        SELECT items.id FROM items JOIN jobs ON jobs.id = items.job_id
        WHERE jobs.state IN ({_JOB_ENDED}) AND items.state NOT IN ({_ENDED})
        """,  # noqa: S608 - our own words
    "L6 completed is the number of results": """
        SELECT jobs.id FROM jobs
        WHERE num_completed <> (SELECT count(*) FROM results WHERE job_id = jobs.id)
        """,
    "L6 a completed item has its result": """
        SELECT items.id FROM items LEFT JOIN results ON results.item_id = items.id
        WHERE items.state = 'completed' AND results.item_id IS NULL
        """,
    "L7 a part stands under an attempt of its item": """
        SELECT items.id FROM parts JOIN items ON items.id = parts.item_id
        WHERE parts.attempt < 1 OR parts.attempt > items.attempt
        """,
    "L7 an item's parts are of one plan": """
        SELECT item_id FROM parts GROUP BY item_id HAVING count(DISTINCT plan) > 1
        """,
    "L7 a result over parts has all of them": """
        SELECT results.item_id FROM results
        WHERE details ->> 'num_parts' IS NOT NULL
          AND CAST(details ->> 'num_parts' AS integer) <> (
            SELECT count(*) FROM parts
            WHERE parts.item_id = results.item_id AND number >= 1
              AND number <= CAST(results.details ->> 'num_parts' AS integer)
          )
        """,
}

CHANGES: Final[Mapping[str, str]] = {
    "L1 a lease never passes from hand to hand": """
        SELECT seq FROM items_log
        WHERE old_state = 'leased' AND new_state = 'leased' AND old_lease_id <> lease_id
        """,
    "L2 only a leased item is completed": """
        SELECT seq FROM items_log
        WHERE new_state = 'completed' AND old_state <> 'completed' AND old_state <> 'leased'
        """,
    "L3 attempts never go down, and rise by one with a lease": """
        SELECT seq FROM items_log
        WHERE new_attempt < old_attempt
           OR (old_state = 'pending' AND new_state = 'leased' AND new_attempt <> old_attempt + 1)
           OR (NOT (old_state = 'pending' AND new_state = 'leased') AND new_attempt <> old_attempt)
        """,
    "L4 what has ended stays": f"""
        SELECT seq FROM items_log WHERE old_state IN ({_ENDED}) AND new_state <> old_state
        """,  # noqa: S608 - our own words
    "L4 a job that has ended stays": f"""
        SELECT seq FROM jobs_log WHERE old_state IN ({_JOB_ENDED}) AND new_state <> old_state
        """,  # noqa: S608 - our own words
    "L7 no part is answered twice under one plan": """
        SELECT item_id FROM parts_log GROUP BY job_id, item_id, number, plan HAVING count(*) > 1
        """,
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A statement that does not hold, and the first rows that say so."""

    statement: str
    rows: tuple[str, ...]


def find_violations(session: Session, *, max_rows: int = 5) -> list[Violation]:
    """Everything that is wrong; an empty list is what a test asserts."""
    statements = dict(ROWS)
    if inspect(session.connection()).has_table("items_log"):
        statements.update(CHANGES)
    found = []
    for statement, query in statements.items():
        rows = session.scalars(text(query)).fetchmany(max_rows)
        if rows:
            found.append(Violation(statement, tuple(str(row) for row in rows)))
    return found


def install_log(session: Session) -> None:
    """Create `items_log`, `jobs_log` and `parts_log` with the triggers that fill them. For tests."""
    for statement in _LOG_ON_SQLITE if is_sqlite(session) else _LOG_ON_POSTGRESQL:
        session.execute(text(statement))


_ITEMS_LOG: Final = """
    CREATE TABLE items_log (
      seq {serial}, item_id bigint, old_state text, new_state text, old_attempt int,
      new_attempt int, old_lease_id text, lease_id text, worker text, at double precision
    )"""
_JOBS_LOG: Final = (
    "CREATE TABLE jobs_log (seq {serial}, job_id text, old_state text, new_state text)"
)
# With its job: SQLite gives the number of the newest item again when that is removed.
_PARTS_LOG: Final = (
    "CREATE TABLE parts_log (seq {serial}, job_id text, item_id bigint, number int, plan text)"
)
_LOG_ITEM: Final = """
    INSERT INTO items_log (item_id, old_state, new_state, old_attempt, new_attempt, old_lease_id,
                           lease_id, worker, at)
    VALUES (NEW.id, OLD.state, NEW.state, OLD.attempt, NEW.attempt, OLD.lease_id,
            NEW.lease_id, NEW.worker, {now});"""
_LOG_JOB: Final = """
    INSERT INTO jobs_log (job_id, old_state, new_state) VALUES (NEW.id, OLD.state, NEW.state);"""
_LOG_PART: Final = """
    INSERT INTO parts_log (job_id, item_id, number, plan)
    SELECT job_id, id, NEW.number, {plan} FROM items WHERE id = NEW.item_id;"""

_LOG_ON_SQLITE: Final = (
    _ITEMS_LOG.format(serial="INTEGER PRIMARY KEY"),
    _JOBS_LOG.format(serial="INTEGER PRIMARY KEY"),
    _PARTS_LOG.format(serial="INTEGER PRIMARY KEY"),
    "CREATE TRIGGER items_log_change AFTER UPDATE ON items BEGIN "
    + _LOG_ITEM.format(now="(julianday('now') - 2440587.5) * 86400.0")
    + " END",
    f"CREATE TRIGGER jobs_log_change AFTER UPDATE ON jobs BEGIN {_LOG_JOB} END",
    "CREATE TRIGGER parts_log_new AFTER INSERT ON parts BEGIN "
    + _LOG_PART.format(plan="hex(NEW.plan)")
    + " END",
)
_LOG_ON_POSTGRESQL: Final = (
    _ITEMS_LOG.format(serial="bigserial PRIMARY KEY"),
    _JOBS_LOG.format(serial="bigserial PRIMARY KEY"),
    _PARTS_LOG.format(serial="bigserial PRIMARY KEY"),
    "CREATE FUNCTION log_item() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    + _LOG_ITEM.format(now="extract(epoch FROM clock_timestamp())")
    + " RETURN NULL; END $$",
    f"CREATE FUNCTION log_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {_LOG_JOB} RETURN NULL; END $$",
    "CREATE FUNCTION log_part() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    + _LOG_PART.format(plan="encode(NEW.plan, 'hex')")
    + " RETURN NULL; END $$",
    "CREATE TRIGGER parts_log_new AFTER INSERT ON parts FOR EACH ROW EXECUTE FUNCTION log_part()",
    "CREATE TRIGGER items_log_change AFTER UPDATE ON items FOR EACH ROW EXECUTE FUNCTION log_item()",
    "CREATE TRIGGER jobs_log_change AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION log_job()",
)
