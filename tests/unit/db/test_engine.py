"""What the engine promises of its connections."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from api.db import Database, trips
from api.db.engine import UNKNOWN
from api.errors import Unavailable
from tests.conftest import PostgresServer


async def test_a_connection_closed_in_the_pool_is_replaced(
    postgres_server: PostgresServer,
) -> None:
    """Connections that the server ended while they were idle cost the next request nothing."""
    database = Database(postgres_server.url("postgres"))
    try:
        async with database.read() as one, database.read() as other:
            idle = [await s.scalar(text("SELECT pg_backend_pid()")) for s in (one, other)]
        killer = Database(postgres_server.url("postgres"))
        async with killer.read() as session:
            for pid in idle:
                await session.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        await killer.close()
        await asyncio.sleep(0.1)
        async with database.read() as one, database.read() as other:
            fresh = [await s.scalar(text("SELECT pg_backend_pid()")) for s in (one, other)]
        assert not set(idle) & set(fresh)
    finally:
        await database.close()


async def test_a_transaction_given_up_while_it_waits_to_begin_locks_nobody_out(
    tmp_path: Path,
) -> None:
    """A cancelled BEGIN is rolled back, though it happens later in the connection's thread."""
    file = str(tmp_path / "db")
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("CREATE TABLE t (n)")
    holder.execute("BEGIN IMMEDIATE")
    connection = await trips.connect(file, isolation_level=None, timeout=5)
    try:
        connection.begin(write=True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await connection.cursor().execute("SELECT 1")
        back = asyncio.ensure_future(connection.rollback())
        await asyncio.sleep(0.1)
        holder.execute("COMMIT")
        await back
        # whatever was queued has happened once this is answered
        await connection.trip(lambda _: None)
        assert not connection.in_transaction
        holder.execute("PRAGMA busy_timeout=0")
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("COMMIT")
    finally:
        await connection.close()
        holder.close()


async def test_one_statement_alone_is_one_trip(tmp_path: Path) -> None:
    """Neither BEGIN nor COMMIT nor a change of the connection goes along, whoever comes next."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'db'}")
    try:
        async with database.read() as session:
            await session.execute(text("SELECT 1"))
            connection = await session.connection()
            raw = (await connection.get_raw_connection()).driver_connection
        assert isinstance(raw, trips.Connection)
        asked = []
        put = raw._tx.put_nowait

        class Counting:
            def put_nowait(self, one: object) -> None:
                asked.append(one)
                put(one)

        raw._tx = Counting()
        assert await database.rows(text("SELECT :n"), {"n": 2}) == [(2,)]
        assert len(asked) == 1
        assert raw._conn.isolation_level is None
        assert not raw._conn.in_transaction
        async with database.write() as session:
            await session.execute(text("CREATE TABLE t (n)"))
        assert len(asked) == 3
    finally:
        await database.close()


async def test_who_only_reads_waits_for_no_writer(tmp_path: Path) -> None:
    """SQLite has one writer at a time; a transaction that reads is none."""
    file = tmp_path / "db"
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("PRAGMA journal_mode = WAL")
    holder.execute("CREATE TABLE t AS SELECT 1 AS n")
    holder.execute("BEGIN IMMEDIATE")
    database = Database(f"sqlite+aiosqlite:///{file}")
    query = text("SELECT n FROM t")
    try:
        async with asyncio.timeout(2):
            async with database.read() as session:
                assert await session.scalar(query) == 1
            assert [row.n for row in await database.rows(query)] == [1]
    finally:
        holder.close()
        await database.close()


async def test_what_is_looked_at_is_in_no_transaction(postgres_server: PostgresServer) -> None:
    """PostgreSQL gets no BEGIN and no COMMIT for it: each statement has a time of its own."""
    database = Database(postgres_server.url("postgres"))
    times = text("SELECT now() FROM pg_sleep(0.01)")
    try:
        alone = await database.look(lambda db: {db.scalar(times) for _ in range(3)})
        together = await database.run(lambda db: {db.scalar(times) for _ in range(3)})
        assert (len(alone), len(together)) == (3, 1)
    finally:
        await database.close()


async def test_what_is_run_is_committed_whole_or_not_at_all(database_url: str) -> None:
    """``run`` commits what its work did; where that raises, nothing of it stays."""
    database = Database(database_url)

    def raising(db: Connection) -> None:
        db.execute(text("UPDATE users SET version = version + 7"))
        raise ArithmeticError

    versions = text("SELECT DISTINCT version FROM users")
    try:
        (before,) = [row.version for row in await database.rows(versions)]
        with pytest.raises(ArithmeticError):
            await database.run(raising)
        assert await database.rows(versions) == [(before,)]
        bump = text("UPDATE users SET version = version + 1")
        assert await database.run(lambda db: db.execute(bump).rowcount) > 0
        assert await database.rows(versions) == [(before + 1,)]
    finally:
        await database.close()


async def test_a_commit_that_fails_is_not_told_as_nothing_done(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that goes away at the commit may have done it: the answer says so."""
    database = Database(database_url)

    async def gone(_connection: AsyncConnection) -> None:
        raise ConnectionError

    try:
        with monkeypatch.context() as patched:
            patched.setattr(AsyncConnection, "commit", gone)
            with pytest.raises(Unavailable) as refused:
                await database.run(lambda db: db.execute(text("SELECT 1")).all())
        assert refused.value.detail == UNKNOWN
        with pytest.raises(Unavailable) as refused:
            await database.run(_gone_before)
        assert refused.value.detail != UNKNOWN
    finally:
        await database.close()


def _gone_before(_db: Connection) -> None:
    raise ConnectionError
