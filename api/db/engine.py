"""The database: one engine per process, transactions that read and transactions that write.

Whoever opens a transaction commits it: services do, at the end of ``async with
database.write()``; what they call never does. A database that cannot be reached is
``Unavailable`` (503), never another answer.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg  # type: ignore[import-untyped]
import structlog
from sqlalchemy import (
    Connection,
    ExceptionContext,
    Executable,
    Insert,
    Row,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from api.db import trips
from api.errors import Unavailable
from api.shielding import finished

log = structlog.get_logger("rolecall.db")

T = TypeVar("T")
Opened = TypeVar("Opened", AsyncConnection, AsyncSession)
# What executes statements within a transaction, in SQLAlchemy's greenlet.
Executor = Connection | Session

# Longer than any statement here takes; a request must not outwait its client.
STATEMENT_SECONDS = 5.0
POOL_SIZE = 10
# PostgreSQL's own limit for a statement is so much higher: it ends what the client did not end,
# because the client hangs or was cut off.
MARGIN_SECONDS = 1.0
# A transaction in which nothing is executed for so long is ended by the server.
IDLE_SECONDS = 15.0
# So often the server looks, during a statement, whether the client is still connected.
CLIENT_CHECK_SECONDS = 1.0
# Class 57 is "operator intervention", 53 "insufficient resources", 08 "connection exception";
# 40 is "transaction rollback": nothing was changed, and it may be tried again. 55P03 is
# "lock not available", 25P03 "idle in transaction session timeout".
PASSING_SQLSTATES = ("57", "53", "08", "40", "55P03", "25P03")


UNKNOWN = "The database went away in the midst of it: it may have been done, or not."


@dataclass(slots=True)
class _Ending:
    """Whether a transaction has come so far that nobody may say it was not done."""

    committing: bool = False


class Database:
    """Transactions on SQLite or PostgreSQL, by the URL with its async driver."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.dialect = make_url(url).get_backend_name()
        self.engine = _sqlite_engine(url) if self.dialect == "sqlite" else _postgresql_engine(url)
        self._turn = asyncio.Lock()
        # SQLite's connections begin nothing by themselves
        self._once = (
            self.engine
            if self.dialect == "sqlite"
            else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A transaction that changes nothing. Raises ``Unavailable``."""
        async with self._transaction(write=False) as session:
            yield session

    @asynccontextmanager
    async def write(self, seconds: float = STATEMENT_SECONDS) -> AsyncIterator[AsyncSession]:
        """A transaction committed at the end of the block, rolled back if the block raises.

        It may take ``seconds``, and so may each of its statements.
        """
        async with self._transaction(write=True, seconds=seconds) as session:
            yield session

    async def rows(
        self, statement: Executable, values: Mapping[str, Any] | None = None
    ) -> Sequence[Row[*tuple[Any, ...]]]:
        """Return the rows of one SELECT that stands alone. Raises ``Unavailable``."""
        return await self.look(lambda db: db.execute(statement, values).all())

    async def look(self, work: Callable[[Connection], T]) -> T:
        """Return what ``work`` returns, a plain function whose SELECTs each stand alone.

        They need no BEGIN and no COMMIT around them: a trip, not three. Raises ``Unavailable``.
        """
        with unavailable_when_down():
            async with (
                asyncio.timeout(STATEMENT_SECONDS),
                _closed_in_time(await self._once.connect()) as connection,
            ):
                return await connection.run_sync(work)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Return what ``work`` returns, done in a transaction that is committed then.

        ``work`` is a plain function whose statements are awaited for it: a session, and a greenlet
        for each statement, cost more than the statements themselves. Raises as ``write`` does.
        """
        async with self._within(STATEMENT_SECONDS, write=True) as ending:
            async with self.begun(write=True) as connection:
                result = await connection.run_sync(work)
                ending.committing = True
                await connection.commit()
            return result

    @asynccontextmanager
    async def begun(self, *, write: bool) -> AsyncIterator[AsyncConnection]:
        """A connection with a transaction begun, rolled back unless the caller commits it."""
        async with _closed_in_time(await self.engine.connect()) as connection:
            if self.dialect == "sqlite":
                # not by an event of the engine's: with one there, SQLAlchemy looks for listeners
                # of every kind at every statement
                raw: Any = (await connection.get_raw_connection()).driver_connection
                raw.begin(write=write)
            yield connection

    @asynccontextmanager
    async def _transaction(
        self, *, write: bool, seconds: float = STATEMENT_SECONDS
    ) -> AsyncIterator[AsyncSession]:
        async with (
            self._within(seconds, write=write) as ending,
            self.begun(write=write) as connection,
            _closed_in_time(AsyncSession(connection, expire_on_commit=False)) as session,
        ):
            if seconds > STATEMENT_SECONDS:
                await self.raise_limits(session, seconds)
            yield session
            for statement, rows in session.info.items():
                await session.execute(statement, rows)
            ending.committing = write
            await session.commit()

    @asynccontextmanager
    async def _within(self, seconds: float, *, write: bool) -> AsyncIterator[_Ending]:
        ending = _Ending()
        try:
            with unavailable_when_down():
                async with asyncio.timeout(seconds), self._in_turn(write=write):
                    yield ending
        except Unavailable as error:
            if ending.committing:
                raise Unavailable(UNKNOWN) from error
            raise

    @asynccontextmanager
    async def _in_turn(self, *, write: bool) -> AsyncIterator[None]:
        """Let SQLite's writers of this process stand in line.

        SQLite tells nobody that its lock is free: who waits there looks again now and then, up to
        a tenth of a second later.
        """
        if not write or self.dialect != "sqlite":
            yield
            return
        async with self._turn:
            yield

    async def raise_limits(self, db: AsyncSession | AsyncConnection, seconds: float) -> None:
        """Let each statement of this transaction take ``seconds`` on the server too."""
        if self.dialect == "postgresql":
            for name, value in _limits(seconds).items():
                await db.execute(text(f"SET LOCAL {name} = '{value}'"))

    async def one_at_a_time(
        self, session: AsyncSession, lock: int, *, shared: bool = False
    ) -> None:
        """Let no other process be in a transaction that asked for the same ``lock``.

        Those that ask for it ``shared`` may be in theirs at once.
        """
        # SQLite's writers are alone already
        if self.dialect == "postgresql":
            kind = "_shared" if shared else ""
            await session.execute(text(f"SELECT pg_advisory_xact_lock{kind}({int(lock)})"))

    async def try_lock(self, session: AsyncSession, lock: int) -> bool:
        """Take ``lock`` until the transaction ends; False, at once, where another process has it.

        Always True on SQLite, whose writers are alone already.
        """
        if self.dialect == "sqlite":
            return True
        query = text(f"SELECT pg_try_advisory_xact_lock({int(lock)})")
        return bool(await session.scalar(query))

    async def ping(self) -> None:
        """Raise ``Unavailable`` if the database does not answer."""
        async with self.read() as session:
            await session.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STATEMENT_SECONDS):
                await self.engine.dispose()


def write_last(session: AsyncSession, statement: Insert, row: dict[str, Any]) -> None:
    """Add a row that is written when the caller's transaction ends, with all others like it.

    ``statement`` is one that was made once.
    """
    session.info.setdefault(statement, []).append(row)


@contextmanager
def unavailable_when_down() -> Iterator[None]:
    """Turn the many ways in which a database is not there into ``Unavailable``."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout, TimeoutError, OSError) as error:
        raise _unavailable(error) from error
    except DBAPIError as error:
        state = str(getattr(error.orig, "sqlstate", None) or "")
        if error.connection_invalidated or state.startswith(PASSING_SQLSTATES):
            raise _unavailable(error) from error
        raise


def _unavailable(error: Exception) -> Unavailable:
    log.warning("database_unavailable", error=type(error).__name__)
    return Unavailable("The database is not to be had just now. Nothing was changed.")


@asynccontextmanager
async def _closed_in_time(opened: Opened) -> AsyncIterator[Opened]:
    """Close a session or a connection at the end, within a time limit.

    SQLAlchemy has none: it waits for the answer to a rollback as long as that takes.
    """
    try:
        yield opened
    finally:
        await finished(_close(opened))


async def _close(opened: AsyncConnection | AsyncSession) -> None:
    try:
        async with asyncio.timeout(STATEMENT_SECONDS):
            await opened.close()
    except TimeoutError:
        # the connection is of no more use, and the pool has closed it
        log.warning("rollback_not_answered")


def _limits(seconds: float) -> dict[str, str]:
    """Return the server's settings for statements that may take ``seconds``."""
    return {
        "lock_timeout": f"{seconds * 1000:.0f}ms",
        "statement_timeout": f"{(seconds + MARGIN_SECONDS) * 1000:.0f}ms",
    }


async def _connect(*address: Any, **options: Any) -> Any:
    """Connect to PostgreSQL, with the server's time limits.

    PgBouncer must be told to take them (``ignore_startup_parameters``).
    """
    settings = _limits(STATEMENT_SECONDS) | {
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS * 1000:.0f}ms"
    }
    connection = await asyncpg.connect(*address, **options, server_settings=settings)
    try:
        if connection.get_server_version() >= (14,):
            # not on every platform, so not a condition for connecting
            with suppress(asyncpg.InvalidParameterValueError):
                await connection.execute(
                    f"SET client_connection_check_interval = '{CLIENT_CHECK_SECONDS * 1000:.0f}ms'"
                )
    except BaseException:
        connection.terminate()
        raise
    return connection


def _postgresql_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=POOL_SIZE,
        pool_timeout=STATEMENT_SECONDS,
        hide_parameters=True,
        # no `command_timeout`: whoever executes a statement has a time limit of their own
        connect_args={"timeout": 3, "async_creator_fn": _connect},
    )

    @event.listens_for(engine.sync_engine, "checkout")
    def _refuse_closed(_connection: Any, record: Any, _proxy: Any) -> None:
        # asyncpg is told when the server closes a connection: no trip needed (pool_pre_ping makes
        # three). One that died unheard fails at its first statement, as Unavailable.
        if record.driver_connection.is_closed():
            raise DisconnectionError

    @event.listens_for(engine.sync_engine, "handle_error")
    def _keep_rows_to_itself(context: ExceptionContext) -> None:
        # the server tells the whole row that it refuses, and whoever logs the error would too
        cause = context.original_exception.__cause__
        if getattr(cause, "detail", None):
            cause.detail = None  # type: ignore[union-attr]

    return engine


def _sqlite_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=STATEMENT_SECONDS,
        hide_parameters=True,
        # isolation_level None: BEGIN is ours, so that a writer can say so at once
        connect_args={
            "timeout": STATEMENT_SECONDS,
            "isolation_level": None,
            "async_creator_fn": trips.connect,
        },
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        # a logout that was answered must outlive a power cut: WAL needs FULL for that
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    return engine
