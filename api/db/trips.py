"""SQLite by few trips to its thread: each trip wakes the loop again and costs what a query costs.

SQLAlchemy's adapter asks a cursor to open, execute, fetch and close, one trip each. Here a
statement and its rows are one trip, and BEGIN goes along with the first. The end of a transaction
that only read is waited for by nobody, and ending what was not begun is no trip at all.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import aiosqlite

T = TypeVar("T")
Rows = list[Any]


async def connect(database: str, **options: Any) -> Connection:
    """Open a connection in a thread of its own; ``options`` are those of ``sqlite3.connect``."""
    connection = Connection(lambda: _open(database, **options), iter_chunk_size=64)
    # a process that is told to end does not wait for it
    connection._thread.daemon = True  # noqa: SLF001
    await connection
    return connection


def _open(database: str, **options: Any) -> sqlite3.Connection:
    path = _file_of(database, is_uri=options.get("uri", False))
    if path is not None:
        _create_private(path)
    connection: sqlite3.Connection = sqlite3.connect(database, **options)
    return connection


def _file_of(database: str, *, is_uri: bool) -> str | None:
    """Return the path of the file that SQLite would create, None where it would create none."""
    if is_uri and database.startswith("file:"):
        parts = urlsplit(database)
        if parse_qs(parts.query).get("mode", ["rwc"]) != ["rwc"]:
            return None
        database = unquote(parts.path)
    return None if database in {"", ":memory:"} else database


def _create_private(path: str) -> None:
    """Create the file with mode 0600, whatever the umask; leave one that is there as it is.

    SQLite gives its log and its shared memory the mode of the file.
    """
    try:
        descriptor = os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        # it is there, or cannot be created: SQLite says which
        return
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


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
