"""PostgreSQL ends what nobody waits for any more: every connection has limits of the server's."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from alembic.config import Config
from sqlalchemy import Connection, text

from api.db import Database, engine, migrate
from api.errors import Unavailable
from tests.conftest import PostgresServer

# It keeps a processor busy, as a bad plan does.
BUSY = text("SELECT count(*) FROM generate_series(1, 100000000) AS a, generate_series(1, 1000)")
LIMITS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "client_connection_check_interval",
)
SHOW = text(
    "SELECT name, CAST(setting AS integer) AS ms FROM pg_settings WHERE name IN "
    f"({', '.join(repr(name) for name in LIMITS)})"
)
RUNNING = text(
    "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series%' "
    "AND datname = current_database() AND pid <> pg_backend_pid() AND state = 'active'"
)
# A process that is in the midst of BUSY when it is stopped or killed.
NODE = """
import asyncio, sys
from api.db import Database, engine
from tests.unit.db.test_time_limits import BUSY
engine.STATEMENT_SECONDS = float(sys.argv[2])
async def main():
    database = Database(sys.argv[1])
    async with database.write(float(sys.argv[3])) as session:
        await session.execute(BUSY)
asyncio.run(main())
"""


@pytest.fixture
async def url(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """The address of a database of this test's own."""
    name = f"limits_{os.urandom(4).hex()}"
    connection = await asyncpg.connect(
        host=postgres_server.directory, user="postgres", database="postgres"
    )
    await connection.execute(f"CREATE DATABASE {name}")
    yield postgres_server.url(name)
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """A PostgreSQL database without tables."""
    database = Database(url)
    yield database
    await database.close()


async def running(database: Database) -> int:
    """Return how many busy statements the server is executing."""
    ((count,),) = await database.rows(RUNNING)
    return int(count)


async def until(database: Database, count: int, seconds: float) -> None:
    """Wait until ``count`` busy statements are executed, ``seconds`` at most."""
    async with asyncio.timeout(seconds):
        while await running(database) != count:
            await asyncio.sleep(0.05)


async def limits(rows: Awaitable[Any]) -> dict[str, int]:
    """Return what ``SHOW`` found, in milliseconds."""
    return {row.name: row.ms for row in await rows}


async def read(database: Database) -> None:
    """Execute the statement in a transaction that reads."""
    async with database.read() as session:
        await session.execute(BUSY)


async def write(database: Database) -> None:
    """Execute the statement in a long transaction that writes."""
    async with database.write(600) as session:
        await session.execute(BUSY)


async def look(database: Database) -> None:
    """Execute the statement alone."""
    await database.rows(BUSY)


async def run(database: Database) -> None:
    """Execute the statement in a plain function."""
    await database.run(lambda db: db.execute(BUSY).all())


async def test_every_connection_has_limits(database: Database) -> None:
    """Each is there, the statement's a little longer than the client's own."""
    async with database.read() as session:
        of_read = await limits(session.execute(SHOW))
    assert of_read.keys() == set(LIMITS)
    assert all(of_read.values())
    own = engine.STATEMENT_SECONDS * 1000
    assert own < of_read["statement_timeout"] <= own + 2000
    assert of_read["lock_timeout"] <= of_read["statement_timeout"]
    assert await limits(database.rows(SHOW)) == of_read


async def test_long_transactions_have_longer_limits(database: Database) -> None:
    """``write(seconds)`` raises the server's limits for that transaction alone."""
    before = await limits(database.rows(SHOW))
    async with database.write(600) as session:
        raised = await limits(session.execute(SHOW))
    assert 600_000 < raised["statement_timeout"] < 700_000
    assert raised["lock_timeout"] == 600_000
    assert await limits(database.rows(SHOW)) == before


async def test_a_migration_may_take_longer(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the client nor the server ends a statement of a migration after a few seconds."""
    found: dict[str, int] = {}

    def upgrade(config: Config, _revision: str) -> None:
        connection: Connection = config.attributes["connection"]
        found.update({row.name: row.ms for row in connection.execute(SHOW)})
        connection.execute(text(f"SELECT pg_sleep({engine.STATEMENT_SECONDS + 1.5})"))

    monkeypatch.setattr(migrate.command, "upgrade", upgrade)
    await migrate.upgrade(database)
    assert found["statement_timeout"] >= 3_600_000
    assert found["lock_timeout"] >= 3_600_000


@pytest.mark.parametrize("execute", [read, write, look, run])
async def test_a_cancelled_statement_ends_on_the_server(
    url: str, database: Database, execute: Callable[[Database], Awaitable[None]]
) -> None:
    """Whoever waits for it is cancelled, once or twice: the server stops too, and soon."""
    node = Database(url)
    for times in (1, 2):
        task = asyncio.ensure_future(execute(node))
        await until(database, 1, 5)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(database, 0, 1.5)
    await node.close()


async def test_a_statement_that_takes_too_long_ends_on_the_server(
    url: str, database: Database
) -> None:
    """The client's limit passes: 503, and nothing goes on."""
    node = Database(url)
    with pytest.raises(Unavailable):
        async with node.write(0.5) as session:
            await session.execute(BUSY)
    await until(database, 0, 1.5)
    await node.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_a_process_that_ends_leaves_no_statement(
    url: str, database: Database, how: signal.Signals
) -> None:
    """However it ends, though its transaction was allowed ten minutes."""
    node = await start(url, 5, 600)
    await until(database, 1, 10)
    node.send_signal(how)
    await node.wait()
    await until(database, 0, 3)


async def test_the_server_ends_what_a_hung_process_left(url: str, database: Database) -> None:
    """A process that is stopped gives up nothing by itself: the server's limit does."""
    node = await start(url, 0.5, 0.5)
    await until(database, 1, 10)
    os.kill(node.pid, signal.SIGSTOP)
    try:
        await until(database, 0, 3)
    finally:
        node.kill()
        await node.wait()


async def start(url: str, statement: float, seconds: float) -> asyncio.subprocess.Process:
    """Start a process that executes a busy statement."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE, url, str(statement), str(seconds),
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip


async def test_a_server_that_hangs_keeps_nobody_waiting(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback that is not answered is given up, and its connection with it."""
    monkeypatch.setattr(engine, "STATEMENT_SECONDS", 0.5)
    node = Database(url)
    started = time.monotonic()
    pid = 0
    try:
        with pytest.raises(ArithmeticError):
            async with node.write() as session:
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                os.kill(pid, signal.SIGSTOP)
                raise ArithmeticError
        assert time.monotonic() - started < 4
        # another connection takes its place
        await node.ping()
    finally:
        os.kill(pid, signal.SIGCONT)
        await node.close()


@pytest.mark.parametrize(
    "limit", ["lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"]
)
async def test_a_limit_of_the_servers_is_unavailable(database: Database, limit: str) -> None:
    """503, and whoever asks again may succeed; never 500."""
    async with database.write() as session:
        await session.execute(text("CREATE TABLE t (n int)"))
    async with database.write() as holder:
        await holder.execute(text("LOCK TABLE t"))
        with pytest.raises(Unavailable):
            async with database.write() as session:
                await session.execute(text(f"SET LOCAL {limit} = 100"))
                if limit.startswith("idle"):
                    await asyncio.sleep(0.5)
                    await session.execute(text("SELECT 1"))
                await session.execute(text("INSERT INTO t VALUES (1)"))
    assert await database.rows(text("SELECT 1 AS n")) == [(1,)]


@pytest.mark.parametrize(("version", "expected"), [((13, 23), 0), ((14, 0), 1), ((18, 6), 1)])
async def test_an_older_server_is_spared_what_it_does_not_know(
    database: Database, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], expected: int
) -> None:
    """PostgreSQL 13 knows no ``client_connection_check_interval``: it is not set there."""
    monkeypatch.setattr(
        asyncpg.Connection, "get_server_version",
        lambda _: asyncpg.types.ServerVersion(*version, 0, "final", 0),
    )  # fmt: skip
    found = await limits(database.rows(SHOW))
    assert bool(found["client_connection_check_interval"]) == bool(expected)
