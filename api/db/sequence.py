"""The authorization sequence: one number that orders every change of what tokens may do.

A token carries the number as it was before its rights were read. A change advances the number last
before it commits, so that both become visible together: a token with a lower number may hold what
the change took away.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import BigInteger, Select, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from api.db.engine import Executor
from api.db.models import AuthorizationSequence, table_of

TABLE = table_of(AuthorizationSequence)
CURRENT: Select[tuple[int]] = select(TABLE.c.value)


class _next_value(FunctionElement[int]):  # noqa: N801  named as SQL functions are
    """One more than now, or the database's clock in milliseconds if that is more.

    After a restore or a failover that lost changes, the number would otherwise repeat, and tokens
    made before would outrank the changes made after.
    """

    inherit_cache = True
    type = BigInteger()


@compiles(_next_value, "sqlite")
def _sqlite(_element: _next_value, _compiler: SQLCompiler, **_: Any) -> str:
    clock = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
    return f"max(authorization_sequence.value + 1, {clock})"


@compiles(_next_value, "postgresql")
def _postgresql(_element: _next_value, _compiler: SQLCompiler, **_: Any) -> str:
    clock = "(extract(epoch from clock_timestamp()) * 1000)::bigint"
    return f"greatest(authorization_sequence.value + 1, {clock})"


ADVANCE = update(TABLE).values(value=_next_value()).returning(TABLE.c.value)


def current(db: Executor) -> int:
    """Return the number, without locking.

    Read it before the rights that the token will carry: too low a number makes a token stale
    once, too high a one would keep what was lost.
    """
    return cast(int, db.execute(CURRENT).scalar_one())


async def advance(session: AsyncSession) -> int:
    """Advance the number in the caller's transaction and return it.

    Whoever advances next waits for the end of this transaction: do it last, with every row that
    the transaction still writes to locked already.
    """
    return cast(int, (await session.execute(ADVANCE)).scalar_one())


async def advance_beyond(session: AsyncSession, number: int) -> None:
    """Advance the number to ``number`` at least: a change that the database lost had it."""
    await session.execute(update(TABLE).where(TABLE.c.value < number).values(value=number))
