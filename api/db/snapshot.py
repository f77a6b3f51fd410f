"""Which transactions had committed at a moment, so that nothing that commits later is missed.

Rows are stamped with the id of their transaction, and not with a time: how long a transaction
takes, and in which order transactions commit, is then of no consequence. PostgreSQL has such ids
(``xid8``). SQLite, whose writers take turns, counts the transactions that ask for one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, select, text, update
from sqlalchemy.orm import Session

from api.db.engine import Executor
from api.db.models import TransactionCounter, table_of

COUNTER = table_of(TransactionCounter)
COUNT = update(COUNTER).values(value=COUNTER.c.value + 1).returning(COUNTER.c.value)
COUNTED = select(COUNTER.c.value)
# asyncpg and SQLAlchemy know no xid8
TRANSACTION_ID = text("SELECT pg_current_xact_id()::text")
SNAPSHOT = text("SELECT pg_current_snapshot()::text")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a statement could see when the snapshot was taken.

    Ids from ``next_id`` on had not begun, those in ``running`` had not ended; every other
    transaction had.
    """

    next_id: int
    running: tuple[int, ...] = ()

    def covers(self, transaction_id: int) -> bool:
        """Return whether that transaction had ended."""
        return transaction_id < self.next_id and transaction_id not in self.running

    def missed(self, column: ColumnElement[int], now: Snapshot) -> ColumnElement[bool]:
        """Return the condition for rows that ``now`` covers and this snapshot does not.

        ``column`` is the id of a row's transaction. Rows of another database's history, with ids
        that this one has not reached, are not among them.
        """
        later = (column >= self.next_id) & (column < now.next_id)
        return later | column.in_(self.running) if self.running else later

    def __str__(self) -> str:
        """Return it as text, for ``parse``."""
        return f"{self.next_id}:{','.join(map(str, self.running))}"


def parse(written: str) -> Snapshot | None:
    """Return the snapshot that was written as text, None where it is none."""
    next_id, _, running = written.partition(":")
    try:
        return Snapshot(int(next_id), tuple(int(one) for one in running.split(",") if one))
    except ValueError:
        return None


def take(db: Executor) -> Snapshot:
    """Return the snapshot of this moment. Read rows in a later statement: it sees no less."""
    if _is_sqlite(db):
        return Snapshot(db.execute(COUNTED).scalar_one() + 1)
    _, next_id, running = db.execute(SNAPSHOT).scalar_one().split(":")
    return Snapshot(int(next_id), tuple(int(one) for one in running.split(",") if one))


def transaction_id(db: Executor) -> int:
    """Return the id of the caller's transaction, which writes."""
    if _is_sqlite(db):
        return int(db.execute(COUNT).scalar_one())
    return int(db.execute(TRANSACTION_ID).scalar_one())


def _is_sqlite(db: Executor) -> bool:
    bind = db.get_bind() if isinstance(db, Session) else db
    return bind.dialect.name == "sqlite"
