"""SQLite by few trips to its thread: each trip wakes the loop again and costs what a query costs.

SQLAlchemy's adapter asks a cursor to open, execute, fetch and close, one trip each. Here a
statement and its rows are one trip, and rolling back where nothing was begun is none.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import aiosqlite

T = TypeVar("T")
Rows = list[Any]


async def connect(database: str, **options: Any) -> Connection:
    """Open a connection in a thread of its own; ``options`` are those of ``sqlite3.connect``."""
    connection = Connection(lambda: sqlite3.connect(database, **options), iter_chunk_size=64)
    # a process that is told to end does not wait for it
    connection._thread.daemon = True  # noqa: SLF001
    await connection
    return connection


class Connection(aiosqlite.Connection):
    """What SQLAlchemy's adapter asks of a connection."""

    def cursor(self) -> Cursor:  # type: ignore[override]
        """Return a cursor; no trip."""
        return Cursor(self)

    settled = True

    async def rollback(self) -> None:
        """Roll back, where there is or may be a transaction."""
        # who was cancelled while they waited for BEGIN left it behind, to be done in the thread yet
        if self.in_transaction or not self.settled:
            await super().rollback()
            self.settled = True

    async def trip(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the connection's thread."""
        self.settled = False
        result: T = await self._execute(work)  # type: ignore[no-untyped-call]
        self.settled = True
        return result


class Cursor:
    """What SQLAlchemy's adapter asks of a cursor (PEP 249, awaited)."""

    arraysize = 1

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: Rows = []
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None

    async def __aenter__(self) -> Cursor:
        """Open it; no trip."""
        return self

    async def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        """Execute a statement and fetch all its rows."""
        return await self._run(lambda cursor: cursor.execute(statement, parameters))

    async def executemany(self, statement: str, parameters: Sequence[Sequence[Any]]) -> Cursor:
        """Execute a statement once for each of ``parameters``."""
        return await self._run(lambda cursor: cursor.executemany(statement, parameters))

    async def _run(self, execute: Callable[[sqlite3.Cursor], object]) -> Cursor:
        def work() -> tuple[sqlite3.Cursor, Rows]:
            cursor = self._connection._conn.cursor()  # noqa: SLF001
            try:
                execute(cursor)
                return cursor, cursor.fetchall() if cursor.description else []
            finally:
                cursor.close()

        done, self._rows = await self._connection.trip(work)
        self.description, self.rowcount = done.description, done.rowcount
        self.lastrowid = done.lastrowid
        return self

    async def fetchall(self) -> Rows:
        """Return the rows, fetched already."""
        return self._rows

    async def close(self) -> None:
        """Do nothing: it was closed when its rows were fetched."""
