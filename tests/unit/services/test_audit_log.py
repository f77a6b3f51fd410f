"""Sealing of the audit log: every row gets a seal, and each look reads few rows."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert, text

from api.db import Database
from api.db.models import AuditEvent
from api.services import audit, audit_log
from api.services.audit import Origin
from api.services.audit_log import ADVISORY_LOCK, AuditFilter, AuditLog, earliest_id
from tests.conftest import SECRET

ROWS = 30_000
SLICE = 500
# Rows with a seal each, spread over the thirty days before the last two hours. The hexadecimal
# digits of an id are 12 of milliseconds, then anything.
MANY = {
    "postgresql": (
        "INSERT INTO {table} ({columns}) SELECT {values} FROM (SELECT n, (lpad(to_hex("
        "{newest} - n * 86400), 12, '0') || '7' || lpad(to_hex(n), 19, '0'))::uuid AS id "
        "FROM generate_series(CAST(1 AS bigint), {rows}) AS n) x"
    ),
    "sqlite": (
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < {rows}) "
        "INSERT INTO {table} ({columns}) SELECT {values} FROM ("
        "SELECT n, printf('%012x7%019x', {newest} - n * 86400, n) AS id FROM t)"
    ),
}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


async def fill(database: Database, rows: int = ROWS) -> None:
    """Add ``rows`` old rows, each with a seal (of no digest that ``verify`` would accept)."""
    many = MANY[database.dialect]
    newest = int(datetime.now(UTC).timestamp() * 1000) - 7_200_000
    events = many.format(
        table="audit_events", columns="id, at, action, detail", rows=rows, newest=newest,
        values="id, CURRENT_TIMESTAMP, 'test.noted', '{}'",
    )  # fmt: skip
    seals = many.format(
        table="audit_seals", columns="seq, event_id, digest", rows=rows, newest=newest,
        values="n, id, 'x'",
    )  # fmt: skip
    async with database.write(300) as session:
        await session.execute(text(events))
        await session.execute(text(seals))
        await session.execute(text("ANALYZE"))


async def note(database: Database, age: timedelta = timedelta()) -> None:
    """Add a row whose id says that it was made ``age`` ago."""
    row = audit.row("test.noted", Origin())
    row["id"] = earliest_id(datetime.now(UTC) - age)
    async with database.write() as session:
        await session.execute(insert(AuditEvent), [row])


@contextmanager
def statements_of(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Collect the SELECTs that are sent to the database, with their parameters."""
    sent: list[tuple[str, Any]] = []

    def collect(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "audit_" in statement:
            sent.append((statement, values))

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", collect)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", collect)


async def work_of(database: Database, statement: str, values: Any) -> int:
    """Return how many rows PostgreSQL reads for a statement, or how many steps SQLite takes."""
    if database.dialect == "sqlite":
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += 10

        connection = sqlite3.connect(str(database.engine.url.database))
        try:
            connection.set_progress_handler(count, 10)
            connection.execute(statement, values).fetchall()
        finally:
            connection.close()
        return steps
    explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
    async with database.engine.connect() as connection:
        found = (await connection.exec_driver_sql(explain, values)).scalar_one()
    return _rows_read((json.loads(found) if isinstance(found, str) else found)[0]["Plan"])


def _rows_read(plan: dict[str, Any]) -> int:
    read = sum(_rows_read(inner) for inner in plan.get("Plans", ()))
    if "Scan" in plan["Node Type"]:
        rows = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        read += int(rows * plan["Actual Loops"])
    return read


def limit_of(database: Database) -> int:
    """Return what one statement may cost that looks at one slice: far less than at all rows."""
    return SLICE * (5 if database.dialect == "postgresql" else 50)


async def test_a_look_reads_few_rows_of_many(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement of a look reads the whole log, whether it finds a row or not."""
    monkeypatch.setattr(audit_log, "SLICE_ROWS", SLICE, raising=False)
    await fill(database)
    log = AuditLog(database, SECRET)
    await note(database)
    with statements_of(database) as sent:
        for _ in range(4):
            await log.seal()
    assert sent
    assert max([await work_of(database, *one) for one in sent]) < limit_of(database)


async def test_verify_reads_slices(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are, each statement of ``verify`` reads a bounded part."""
    monkeypatch.setattr(audit_log, "SLICE_ROWS", SLICE, raising=False)
    monkeypatch.setattr(audit_log, "BATCH", SLICE)
    await fill(database)
    for hours in (1, 24, 500):
        await note(database, timedelta(hours=hours))
    with statements_of(database) as sent:
        found = await AuditLog(database, SECRET).verify()
    # the demo accounts' rows have no seal either
    assert (found.sealed, found.unsealed) == (ROWS, 5)
    # near the end of the chain PostgreSQL may read a table this small as a whole
    costs = sorted([await work_of(database, *one) for one in sent])
    assert costs[-4] < limit_of(database)
    counts = [await work_of(database, *one) for one in sent if "count(" in one[0]]
    assert max(counts) < limit_of(database)


async def test_a_page_of_long_ago_skips_what_is_newer(database: Database) -> None:
    """``until`` bounds the ids too: newer rows are not read one by one."""
    await fill(database)
    long_ago = datetime.now(UTC) - timedelta(days=29)
    with statements_of(database) as sent:
        await AuditLog(database, SECRET).page(AuditFilter(until=long_ago), 10, None)
    ((statement, values),) = sent
    if database.dialect == "sqlite":
        # the work that it takes to read one tenth of the rows
        assert await work_of(database, statement, values) < ROWS
    else:
        assert await work_of(database, statement, values) < ROWS / 10


async def test_rows_of_a_long_transaction_are_found_by_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import may take an hour: the ids of its rows are made when the rows are written."""
    monkeypatch.setattr(audit_log, "OVERLAP", timedelta())
    async with database.write() as session:
        audit.record(session, "test.noted", Origin())
        await asyncio.sleep(0.5)
        since = datetime.now(UTC) - timedelta(seconds=0.2)
    found = await AuditLog(database, SECRET).page(AuditFilter(since=since), 10, None)
    assert [row.action for row in found.items] == ["test.noted"]


async def test_no_row_is_left_unsealed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are committed late, of whatever age their ids say, get their seals as well."""
    monkeypatch.setattr(audit_log, "SLICE_ROWS", 7, raising=False)
    monkeypatch.setattr(audit_log, "EVERYWHERE_SECONDS", 0.0)
    log = AuditLog(database, SECRET)
    for _ in range(30):
        await audit.note(database, "test.noted", Origin())
    while await log.seal(5):
        pass
    ages = (0, 1, 30, 59, 61, 3_600, 40 * 86_400, -3_600)
    for seconds in ages:
        await note(database, timedelta(seconds=seconds))
    # the ids sort before, among and after those that are sealed: some take another pass
    sealed = sum([await log.seal(5) for _ in range(40)])
    found = await log.verify()
    assert (sealed, found.unsealed, found.faults) == (len(ages), 0, [])
    # and again, now that a row of the future is sealed
    await note(database)
    assert sum([await log.seal(5) for _ in range(20)]) == 1


async def test_who_does_not_get_the_lock_does_nothing(database: Database) -> None:
    """While one process looks, the others neither look nor wait; afterwards they may."""
    await note(database)
    log, statement = AuditLog(database, SECRET), f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"
    if database.dialect == "postgresql":
        async with database.read() as other:
            await other.execute(text(statement))
            with statements_of(database) as sent:
                assert await log.seal() == 0
            assert sent == []
    assert await log.seal() > 0
    assert (await log.verify()).unsealed == 0
