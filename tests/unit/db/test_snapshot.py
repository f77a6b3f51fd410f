"""Which transactions a snapshot covers: by their ids, never by how long they take."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from api.blocklist.ledger import Entry, Ledger, missed_rows
from api.db import Database, snapshot
from api.db.snapshot import Snapshot

LATER = (datetime.now(UTC) + timedelta(hours=1)).timestamp()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


def test_a_snapshot_is_written_and_read_back() -> None:
    """With and without transactions that were running; what is none is None."""
    for one in (Snapshot(7), Snapshot(9, (3, 5))):
        assert snapshot.parse(str(one)) == one
    for junk in ("", "x", "1:x", ":", "1:2:3"):
        assert snapshot.parse(junk) is None, junk


def test_a_snapshot_covers_what_had_ended() -> None:
    """Not what was running, nor what had not begun."""
    one = Snapshot(9, (3, 5))
    covered = [number for number in range(1, 12) if one.covers(number)]
    assert covered == [1, 2, 4, 6, 7, 8]


async def missed(ledger: Ledger, before: Snapshot) -> tuple[Snapshot, list[Entry]]:
    """Return a snapshot of this moment, and the rows that it covers and ``before`` does not."""
    now = await ledger.snapshot()
    return now, await ledger.batch(None, 100, missed_rows(before, now))


async def test_rows_of_another_history_are_not_missed(database: Database) -> None:
    """A dump that was restored elsewhere has ids that the new database has not reached."""
    ledger = Ledger(database)
    async with database.write() as session:
        await ledger.record(session, [Entry("jti", "restored", 0, LATER)], 10**12)
    before, _ = await missed(ledger, Snapshot(1))
    for name in ("one", "two"):
        async with database.write() as session:
            number = await session.run_sync(snapshot.transaction_id)
            await ledger.record(session, [Entry("jti", name, 0, LATER)], number)
        before, rows = await missed(ledger, before)
        assert [row.subject for row in rows] == [name]
    assert {row.subject for row in await ledger.batch(None, 10)} == {"one", "restored", "two"}


async def test_a_transaction_is_missed_until_it_commits(database: Database) -> None:
    """Each transaction's rows are found once, by the first snapshot after its commit."""
    ledger = Ledger(database)
    before = await ledger.snapshot()
    for name in ("one", "two"):
        async with database.write() as session:
            number = await session.run_sync(snapshot.transaction_id)
            await ledger.record(session, [Entry("jti", name, 0, LATER)], number)
        assert not before.covers(number)
        before, rows = await missed(ledger, before)
        assert [row.subject for row in rows] == [name]
        assert before.covers(number)
    assert (await missed(ledger, before))[1] == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_row_that_commits_late_is_not_missed(database: Database) -> None:
    """Written first, committed last, with any number of snapshots and commits in between."""
    ledger = Ledger(database)
    before = await ledger.snapshot()
    async with database.write() as slow:
        number = await slow.run_sync(snapshot.transaction_id)
        await ledger.record(slow, [Entry("role", "late", 5, LATER)], number)
        for name in ("one", "two", "three"):
            async with database.write() as session:
                other = await session.run_sync(snapshot.transaction_id)
                await ledger.record(session, [Entry("jti", name, 0, LATER)], other)
            before, rows = await missed(ledger, before)
            assert [row.subject for row in rows] == [name]
            assert number in before.running
    before, rows = await missed(ledger, before)
    assert [(row.kind, row.subject, row.floor) for row in rows] == [("role", "late", 5)]
    assert (await missed(ledger, before))[1] == []
