"""The database side: the truth about what was taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, bindparam, case, delete, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database, db_now
from api.db.models import Revocation

# A row is forgotten this long after the last token that it speaks of has expired.
KEPT_SECONDS = 120
# Between these the loop has others' turns.
ROWS_AT_ONCE = 500
Subject = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One row; ``expires_at`` in seconds since the epoch."""

    kind: str
    subject: str
    floor: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row to be written."""

    kind: str
    subject: str
    floor: int
    expires_at: datetime


def _writing(insert: Callable[..., Any]) -> Any:
    """Return the statement that writes a row; made once, it is compiled once."""
    table = Revocation.__table__
    statement = insert(table).values(
        {c.name: bindparam(c.name) for c in table.c} | {"recorded_at": db_now()}
    )
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=["kind", "subject"],
        set_={
            "floor": case((new.floor > table.c.floor, new.floor), else_=table.c.floor),
            "expires_at": case(
                (new.expires_at > table.c.expires_at, new.expires_at), else_=table.c.expires_at
            ),
            "recorded_at": db_now(),
        },
    )


WRITE = {"postgresql": _writing(postgresql.insert), "sqlite": _writing(sqlite.insert)}


ROW = [field.name for field in fields(Row)]

# Not a row of both among rows: SQLite would walk the whole table for that.
OF_ANY_KIND = Revocation.kind.in_(("jti", "sid", "sub"))
LOOK_UP = select(Revocation.kind, Revocation.subject, Revocation.floor).where(
    OF_ANY_KIND, Revocation.subject.in_(bindparam("subjects", expanding=True))
)


class Ledger:
    """Reads and writes the table ``revocations``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, session: AsyncSession, rows: Sequence[Row]) -> list[Entry]:
        """Write rows in the caller's transaction: floors and expiries only ever rise."""
        statement = WRITE[self._database.dialect]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            few = rows[start : start + ROWS_AT_ONCE]
            # not asdict, which copies what nobody changes
            await session.execute(statement, [{n: getattr(r, n) for n in ROW} for r in few])
        return [Entry(r.kind, r.subject, r.floor, r.expires_at.timestamp()) for r in rows]

    async def look_up(self, subjects: Iterable[Subject]) -> dict[Subject, int]:
        """Return the floor (0 for ``jti`` and ``sid``) of each of ``subjects`` that has a row."""
        wanted = set(subjects)
        asked = {"subjects": [subject for _, subject in wanted]}
        rows = await self._database.rows(LOOK_UP, asked)
        return {row[:2]: row[2] for row in rows if row[:2] in wanted}

    async def count(self) -> dict[str, int]:
        """Return how many rows there are of each kind that are not forgotten yet."""
        query = select(Revocation.kind, func.count()).group_by(Revocation.kind)
        rows = await self._database.rows(query.where(Revocation.expires_at > db_now(-KEPT_SECONDS)))
        return {row.kind: row[1] for row in rows}

    async def now(self) -> int:
        """Return the database's clock, in whole seconds since the epoch."""
        ((now,),) = await self._database.rows(select(db_now()))
        return int(now.timestamp())

    async def recorded_since(self, moment: int) -> list[Entry]:
        """Return the rows recorded since ``moment``, by the database's clock."""
        since = datetime.fromtimestamp(moment, UTC)
        return await self._entries(_rows().where(Revocation.recorded_at >= since))

    async def batch(self, after: Subject | None, size: int) -> list[Entry]:
        """Return the next ``size`` rows that are not forgotten yet, in the order of their key."""
        key = tuple_(Revocation.kind, Revocation.subject)
        query = _rows().where(Revocation.expires_at > db_now(-KEPT_SECONDS))
        if after is not None:
            query = query.where(key > tuple_(*after))
        return await self._entries(query.order_by(Revocation.kind, Revocation.subject).limit(size))

    async def prune(self, most: int) -> int:
        """Forget up to ``most`` rows whose tokens have all expired; return how many."""
        old = (
            select(Revocation.kind, Revocation.subject)
            .where(Revocation.expires_at < db_now(-KEPT_SECONDS))
            .limit(most)
        )
        keys: Sequence[Subject] = [
            (kind, subject) for kind, subject in await self._database.rows(old)
        ]
        if not keys:
            return 0
        async with self._database.write() as session:
            await session.execute(
                delete(Revocation)
                .where(OF_ANY_KIND, Revocation.subject.in_([subject for _, subject in keys]))
                # it may have been recorded anew since it was read
                .where(Revocation.expires_at < db_now(-KEPT_SECONDS))
                .execution_options(synchronize_session=False)
            )
        return len(keys)

    async def _entries(self, query: Select[str, str, int, datetime]) -> list[Entry]:
        return [
            Entry(kind, subject, floor, expires_at.astimezone(UTC).timestamp())
            for kind, subject, floor, expires_at in await self._database.rows(query)
        ]


def _rows() -> Select[str, str, int, datetime]:
    return select(Revocation.kind, Revocation.subject, Revocation.floor, Revocation.expires_at)
