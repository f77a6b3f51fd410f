"""The database side: the truth about what was revoked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, bindparam, case, delete, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database, db_now, snapshot
from api.db.models import Revocation, table_of
from api.db.snapshot import Snapshot

JTI, SID = "jti", "sid"
# Floors: access tokens with a lower `seq` are stale.
USER, CLIENT, ROLE, SCOPE = "user", "client", "role", "scope"
# Floors: tokens of sessions with a lower `opened_seq` are revoked.
USER_ENDED, CLIENT_ENDED = "user_ended", "client_ended"
KINDS = (JTI, SID, USER, CLIENT, ROLE, SCOPE, USER_ENDED, CLIENT_ENDED)
# The one subject of the floor of all tokens that a scope has narrowed.
NARROWED = "narrowed"

# A row is deleted this long after the last token that it concerns has expired.
KEPT_SECONDS = 120
# Between these the loop serves others.
ROWS_AT_ONCE = 500
# Kind and subject.
Subject = tuple[str, str]
# The same as one text, with a colon between them: what requests look up.
Key = str


@dataclass(frozen=True, slots=True)
class Entry:
    """One row; ``expires_at`` in seconds since the epoch."""

    kind: str
    subject: str
    floor: int
    expires_at: float
    exempt: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a look-up tells of a row: its floor, and the session that the floor does not concern."""

    floor: int
    exempt: str | None = None


def _writing(insert: Callable[..., Any]) -> Any:
    """Return the statement that writes a row; made once, it is compiled once."""
    table = table_of(Revocation)
    statement = insert(table).values({c.name: bindparam(c.name) for c in table.c})
    new = statement.excluded
    higher = new.floor > table.c.floor
    later = new.expires_at > table.c.expires_at
    return statement.on_conflict_do_update(
        index_elements=["kind", "subject"],
        set_={
            "floor": case((higher, new.floor), else_=table.c.floor),
            "exempt": case((higher, new.exempt), else_=table.c.exempt),
            "expires_at": case((later, new.expires_at), else_=table.c.expires_at),
            "transaction_id": new.transaction_id,
        },
    )


WRITE = {"postgresql": _writing(postgresql.insert), "sqlite": _writing(sqlite.insert)}
COLUMNS = table_of(Revocation).c
SELECTED = select(COLUMNS.kind, COLUMNS.subject, COLUMNS.floor, COLUMNS.expires_at, COLUMNS.exempt)
# Not pairs of kind and subject: SQLite would read the whole table for that.
OF_ANY_KIND = COLUMNS.kind.in_(KINDS)
LOOK_UP = select(COLUMNS.kind, COLUMNS.subject, COLUMNS.floor, COLUMNS.exempt).where(
    OF_ANY_KIND, COLUMNS.subject.in_(bindparam("subjects", expanding=True))
)
NOT_EXPIRED = COLUMNS.expires_at > db_now(-KEPT_SECONDS)
EXPIRED = COLUMNS.expires_at < db_now(-KEPT_SECONDS)


class Ledger:
    """Reads and writes the table ``revocations``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(
        self, session: AsyncSession, entries: Sequence[Entry], transaction_id: int
    ) -> None:
        """Write rows in the caller's transaction, ``transaction_id``.

        Floors and expiries only ever rise.
        """
        statement = WRITE[self._database.dialect]
        for start in range(0, len(entries), ROWS_AT_ONCE):
            few = entries[start : start + ROWS_AT_ONCE]
            rows = [
                {
                    "kind": entry.kind,
                    "subject": entry.subject,
                    "floor": entry.floor,
                    "exempt": entry.exempt,
                    "expires_at": datetime.fromtimestamp(entry.expires_at, UTC),
                    "transaction_id": transaction_id,
                }
                for entry in few
            ]
            await session.execute(statement, rows)

    async def look_up(self, keys: Iterable[Key]) -> dict[Key, Found]:
        """Return what is known of each of ``keys`` that has a row."""
        wanted = set(keys)
        asked = {"subjects": sorted({key.partition(":")[2] for key in wanted})}
        rows = await self._database.rows(LOOK_UP, asked)
        found = {
            key_of(kind, subject): Found(floor, exempt) for kind, subject, floor, exempt in rows
        }
        return {key: answer for key, answer in found.items() if key in wanted}

    async def recorded(
        self, subjects: Iterable[Subject], kinds: Collection[str] = ()
    ) -> tuple[list[Entry], list[int]]:
        """Return the rows of ``subjects`` and of ``kinds`` that are not expired.

        And the ids of the transactions that wrote them.
        """
        wanted = set(subjects)
        named = OF_ANY_KIND & COLUMNS.subject.in_([subject for _, subject in wanted])
        query = SELECTED.add_columns(COLUMNS.transaction_id).where(
            named | COLUMNS.kind.in_(kinds), NOT_EXPIRED
        )
        rows = await self._database.rows(query)
        found = [row for row in rows if (row[0], row[1]) in wanted or row[0] in kinds]
        return [_entry(row[:-1]) for row in found], [row[-1] for row in found]

    async def count(self) -> dict[str, int]:
        """Return how many rows there are of each kind whose tokens have not all expired."""
        query = select(COLUMNS.kind, func.count()).group_by(COLUMNS.kind).where(NOT_EXPIRED)
        return {row[0]: row[1] for row in await self._database.rows(query)}

    async def snapshot(self) -> Snapshot:
        """Return which transactions had ended at this moment."""
        return await self._database.look(snapshot.take)

    async def batch(
        self, after: Subject | None, size: int, missed: ColumnElement[bool] | None = None
    ) -> list[Entry]:
        """Return the next ``size`` rows in the order of their key, those ``missed`` or all.

        Rows that may be deleted are left out. What commits meanwhile is in a later snapshot.
        """
        query = SELECTED.where(NOT_EXPIRED)
        if missed is not None:
            query = query.where(missed)
        if after is not None:
            query = query.where(tuple_(COLUMNS.kind, COLUMNS.subject) > tuple_(*after))
        rows = await self._database.rows(query.order_by(COLUMNS.kind, COLUMNS.subject).limit(size))
        return [_entry(row) for row in rows]

    async def prune(self, most: int) -> int:
        """Delete up to ``most`` rows whose tokens have all expired; return how many."""
        old: Select[Any] = select(COLUMNS.kind, COLUMNS.subject).where(EXPIRED).limit(most)
        keys = await self._database.rows(old)
        if not keys:
            return 0
        async with self._database.write() as session:
            await session.execute(
                delete(Revocation)
                .where(OF_ANY_KIND, COLUMNS.subject.in_([subject for _, subject in keys]))
                # it may have been recorded anew since it was read
                .where(EXPIRED)
                .execution_options(synchronize_session=False)
            )
        return len(keys)


def key_of(kind: str, subject: str) -> Key:
    """Return the key of a row."""
    return f"{kind}:{subject}"


def missed_rows(before: Snapshot, now: Snapshot) -> ColumnElement[bool]:
    """Return the condition for rows that ``now`` covers and ``before`` does not."""
    return before.missed(COLUMNS.transaction_id, now)


def _entry(row: Sequence[Any]) -> Entry:
    kind, subject, floor, expires_at, exempt = row
    return Entry(kind, subject, floor, expires_at.astimezone(UTC).timestamp(), exempt)
