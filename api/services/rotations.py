"""Refresh tokens, each spent once for the next generation of its session.

The database's clock and one conditional UPDATE decide every race. What ends a session is
committed before its answer is known, errors included.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Integer, Update, and_, bindparam, case, select, update
from sqlalchemy.sql import ColumnElement

from api.blocklist import Blocklist, RevokingTransaction
from api.db import STATEMENT_SECONDS, Database, Executor, db_now
from api.db.models import Session, new_id
from api.errors import RefreshReused, Refused, TokenExpired, TokenRevoked
from api.services import audit
from api.services.audit import Origin
from api.services.generations import (
    GRANTED,
    SESSIONS,
    SIDS,
    TABLE,
    Grant,
    granted,
    granted_together,
)
from api.services.lifetimes import Lifetimes
from api.services.liveness import live, not_ended, not_expired
from api.services.sessions import Sessions
from api.shielding import finished
from api.together import Together

# How many refreshes share a transaction at most.
ROTATED_TOGETHER = 64


class Rotations:
    """One a process, on one event loop."""

    def __init__(
        self, database: Database, blocklist: Blocklist, sessions: Sessions, lifetimes: Lifetimes
    ) -> None:
        self._database = database
        self._blocklist = blocklist
        self._sessions = sessions
        self._lifetimes = lifetimes
        self._together = Together(
            self._rotate_together, most=ROTATED_TOGETHER, seconds=2 * STATEMENT_SECONDS
        )

    async def stop(self) -> None:
        """Let rotations end that nobody waits for any more."""
        await self._together.stop()

    async def rotate(
        self,
        sid: UUID,
        jti: str,
        origin: Origin,
        scope: tuple[str, ...] | None = None,
        grant_type: str | None = None,
    ) -> Grant:
        """Spend the refresh token ``jti`` for the next generation.

        ``scope`` narrows this access token (RFC 6749 section 6); ``grant_type`` is what a client
        app uses for it. Raises ``TokenRevoked``,
        ``TokenExpired``, ``InvalidScope`` with the token unspent, or, after ending the session,
        ``RefreshReused``.
        """
        # most are plain ones; what the lot does not rotate is looked at alone
        if scope is None and (grant := await self._together.ask((sid, jti))) is not None:
            return grant
        outcome = await finished(self._rotate(sid, jti, origin, scope, grant_type))
        if isinstance(outcome, TokenRevoked):
            # whoever ended the session may have died before every worker knew
            await self._blocklist.publish_again(await self._sessions.ended_by(sid))
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    async def _rotate_together(self, asked: list[tuple[UUID, str]]) -> list[Grant | None]:
        """Spend many refresh tokens in one transaction; None for what is not spent so.

        The UPDATE decides each as it would alone. Sessions of client apps, retries and thefts are
        not its business.
        """
        spending = [self._next(sid, jti) for sid, jti in asked]
        grants = await self._database.run(lambda db: self._spent_together(db, spending))
        return [grants.get(one["next_jti"]) for one in spending]

    def _spent_together(self, db: Executor, spending: list[dict[str, Any]]) -> dict[str, Grant]:
        free = self._free(db, [one["sid"] for one in spending])
        spent = [one for one in spending if one["sid"] in free]
        if not spent:
            return {}
        db.execute(SPEND_MANY, spent)
        return granted_together(db, [one["sid"] for one in spent])

    def _free(self, db: Executor, sids: list[UUID]) -> set[UUID]:
        """Lock what nobody else has locked: a lot that waits for one row keeps everybody waiting.

        SQLite's writers are alone already.
        """
        if self._database.dialect == "sqlite":
            return set(sids)
        return set(db.execute(LOCK_FREE, {"sids": sids}).scalars())

    async def _rotate(
        self,
        sid: UUID,
        jti: str,
        origin: Origin,
        scope: tuple[str, ...] | None,
        grant_type: str | None,
    ) -> Grant | Refused:
        async with self._blocklist.transaction() as tx:
            spent = await tx.session.execute(SPEND_ONE, self._next(sid, jti))
            rotated = spent.one_or_none()
            if rotated is not None:
                return await tx.session.run_sync(granted, rotated, scope, grant_type)
            return await self._retried_or_refused(tx, sid, jti, origin, scope, grant_type)

    def _next(self, sid: UUID, jti: str) -> dict[str, Any]:
        return {"sid": sid, "jti": jti, "next_jti": str(new_id()), "idle": self._lifetimes.idle}

    async def _retried_or_refused(
        self,
        tx: RevokingTransaction,
        sid: UUID,
        jti: str,
        origin: Origin,
        scope: tuple[str, ...] | None,
        grant_type: str | None,
    ) -> Grant | Refused:
        """Tell a lost answer from a theft: the same generation again, or the session's end."""
        in_grace = Session.rotated_at >= db_now(-self._lifetimes.grace)
        row: Any = (
            await tx.session.execute(
                select(
                    *GRANTED,
                    and_(*not_ended()).label("is_open"),
                    (Session.previous_jti == jti).label("is_previous"),
                    in_grace.label("in_grace"),
                    not_expired().label("live"),
                )
                .where(Session.id == sid)
                .with_for_update()
            )
        ).one_or_none()
        if row is None or not row.is_open:
            return TokenRevoked()
        if not row.live:
            return TokenExpired()
        if row.is_previous and row.in_grace and self._lifetimes.grace:
            return await tx.session.run_sync(granted, row, scope, grant_type)
        await self._sessions.end_in(tx, Session.id == sid, "refresh_reused")
        audit.record(tx.session, "session.refresh_reused", origin, target=sid, actor=row.user_id)
        return RefreshReused()

    async def is_current(self, sid: UUID, jti: str) -> bool:
        """Return whether ``jti`` is the refresh token that a live session may spend."""
        which = (Session.id == sid, Session.current_jti == jti, *live())
        async with self._database.read() as session:
            return await session.scalar(select(Session.id).where(*which)) is not None


def _earlier(one: Any, other: Any) -> ColumnElement[Any]:
    return case((one < other, one), else_=other)


def _spend() -> Update:
    """The one UPDATE that decides who rotates."""
    now_idle = db_now(bindparam("idle", type_=Integer))
    return (
        update(TABLE)
        .where(SESSIONS.id == bindparam("sid"), SESSIONS.current_jti == bindparam("jti"))
        .where(*live())
        .values(
            previous_jti=SESSIONS.current_jti,
            current_jti=bindparam("next_jti"),
            generation=SESSIONS.generation + 1,
            rotated_at=db_now(),
            last_used_at=db_now(),
            idle_expires_at=_earlier(now_idle, SESSIONS.expires_at),
        )
    )


# Made once: building such a statement costs more than running it.
SPEND_ONE = _spend().returning(*GRANTED)
SPEND_MANY = _spend().where(SESSIONS.client_id.is_(None))
LOCK_FREE = select(SESSIONS.id).where(SESSIONS.id.in_(SIDS)).with_for_update(skip_locked=True)
