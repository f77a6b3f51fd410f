"""Migrations on both databases, and what the engine promises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from api.db import Database, db_now, migrate
from api.db.models import Base
from api.errors import StartupError, Unavailable


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


async def test_up_and_down_and_up(database: Database) -> None:
    """Down to nothing leaves no table of ours; up again makes what the models say."""
    await migrate.downgrade(database, "base")
    async with database.engine.connect() as connection:
        left = await connection.run_sync(lambda c: inspect(c).get_table_names())
    assert left == ["alembic_version"]
    await migrate.upgrade(database)
    here, head = await migrate.current(database)
    assert here == head is not None

    def differences(connection: object) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": False})  # type: ignore[arg-type]
        return list(compare_metadata(context, Base.metadata))

    async with database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_migration_that_fails_leaves_nothing_behind(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did before it failed is rolled back, tables that it made included."""

    def failing(config: Config, _revision: str) -> None:
        connection: Connection = config.attributes["connection"]
        connection.execute(text("CREATE TABLE half_done (n INTEGER)"))
        raise ArithmeticError

    monkeypatch.setattr(migrate.command, "upgrade", failing)
    with pytest.raises(ArithmeticError):
        await migrate.upgrade(database)
    async with database.engine.connect() as connection:
        assert "half_done" not in await connection.run_sync(lambda c: inspect(c).get_table_names())


async def test_a_newer_database_is_refused(database: Database) -> None:
    """An unknown revision is one sentence, and nothing is changed."""
    async with database.write() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartupError, match="9999"):
        await migrate.upgrade(database)


async def test_the_databases_clock_moves_by_offsets(database: Database) -> None:
    """db_now is near our clock, aware, and its offset is in seconds."""
    from sqlalchemy import select

    async with database.read() as session:
        row = (await session.execute(select(db_now(), db_now(90), db_now(-90)))).one()
    assert row[0].tzinfo is not None
    assert round((row[1] - row[0]).total_seconds()) == 90
    assert round((row[0] - row[2]).total_seconds()) == 90


async def test_writers_wait_for_each_other(database: Database) -> None:
    """Fifty writers that read first all succeed: none is told that the database is locked."""

    async def bump() -> None:
        async with database.write() as session:
            await session.execute(text("SELECT * FROM users WHERE username_key = 'admin'"))
            await session.execute(
                text("UPDATE users SET version = version + 1 WHERE username_key = 'admin'")
            )

    await asyncio.gather(*(bump() for _ in range(50)))
    async with database.read() as session:
        version = await session.scalar(
            text("SELECT version FROM users WHERE username_key = 'admin'")
        )
    assert version == 51


@pytest.mark.parametrize(
    "url", ["postgresql+asyncpg://nobody@127.0.0.1:1/none", "sqlite+aiosqlite:////nowhere/at/all"]
)
async def test_an_unreachable_database_is_unavailable(url: str) -> None:
    """Whatever the driver raises, it is 503 and never another answer."""
    database = Database(url)
    with pytest.raises(Unavailable):
        await database.ping()
    await database.close()
    # aiosqlite's thread speaks to the loop once more after a connection that failed
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            await asyncio.to_thread(thread.join, 5)
