"""SQLite by few trips to its thread: each trip wakes the loop again and costs what a query costs.

SQLAlchemy's adapter asks a cursor to open, execute, fetch and close, one trip each. Here a
statement and its rows are one trip, and BEGIN goes along with the first. The end of a transaction
that only read is waited for by nobody, and ending what was not begun is no trip at all.
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

    _begin: str | None = None
    _reads = False
    # Not `in_transaction`, which the thread says: what it is asked to do may wait there yet.
    _open = False

    def begin(self, *, write: bool) -> None:
        """Begin a transaction together with its first statement; no trip."""
        # a reader that becomes a writer fails at once with "database is locked", unwaited
        self._begin = "BEGIN IMMEDIATE" if write else "BEGIN"
        self._reads = not write

    async def commit(self) -> None:
        """Commit, where a transaction was begun."""
        self._begin = None
        if self._open and self._reads:
            # it cannot fail, and whoever comes next stands behind it
            self._tx.put_nowait((None, self._conn.commit))
        elif self._open:
            await super().commit()
        self._open = False

    async def rollback(self) -> None:
        """Roll back, where there is or may be a transaction."""
        self._begin = None
        if self._open:
            await super().rollback()
            self._open = False

    async def trip(self, work: Callable[[sqlite3.Cursor], T]) -> T:
        """Run ``work`` in the connection's thread, and BEGIN before it where that is due."""
        begin, self._begin = self._begin, None
        # who is cancelled while they wait for BEGIN leaves it behind, to be done in the thread yet
        self._open = self._open or begin is not None

        def working() -> T:
            cursor = self._conn.cursor()
            try:
                if begin is not None:
                    cursor.execute(begin)
                return work(cursor)
            finally:
                cursor.close()

        result: T = await self._execute(working)  # type: ignore[no-untyped-call]
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
        def work(cursor: sqlite3.Cursor) -> tuple[sqlite3.Cursor, Rows]:
            execute(cursor)
            return cursor, cursor.fetchall() if cursor.description else []

        done, self._rows = await self._connection.trip(work)
        self.description, self.rowcount = done.description, done.rowcount
        self.lastrowid = done.lastrowid
        return self

    async def fetchall(self) -> Rows:
        """Return the rows, fetched already."""
        return self._rows

    async def close(self) -> None:
        """Do nothing: it was closed when its rows were fetched."""
