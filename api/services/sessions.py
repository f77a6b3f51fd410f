"""Sessions: opened by a login, carried on by refreshes (rotations.py), ended by a logout or theft.

The database's clock decides. Whatever ends a session is committed before its answer is known,
errors included.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Integer,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from api.blocklist import Blocklist, RevokingTransaction
from api.blocklist.ledger import CLIENT_ENDED, JTI, SID, USER_ENDED, Subject
from api.db import Database, Executor, db_now, sequence
from api.db.models import Revocation, Session, User, new_id
from api.errors import NotFound
from api.services import audit
from api.services.audit import Origin
from api.services.delegation import acting, ensure_active, lock_role_assignments, lock_user
from api.services.floors import end_sessions_of_user
from api.services.generations import GRANTED, TABLE, Grant, granted
from api.services.lifetimes import Lifetimes, access_tokens_until, floor_until
from api.services.liveness import live
from api.services.paging import Page, after, page_of
from api.shielding import finished

# A user may have millions.
COUNTED_AT_MOST = 500_000
# What it takes to end sessions that are not one's own.
REVOKE = "sessions:revoke"
# A session is forgotten this long after it ended for good.
KEPT_SECONDS = 86_400
ENDED = (Session.id, Session.client_id, Session.idle_expires_at)


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """Which sessions: of whom, from where."""

    user_id: UUID | None = None
    ip: str | None = None


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as shown: never with its refresh token's id."""

    id: UUID
    user_id: UUID
    username: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    ip: str | None
    user_agent: str | None


class Sessions:
    """The life of sessions. Every method that changes something is one transaction."""

    def __init__(self, database: Database, blocklist: Blocklist, lifetimes: Lifetimes) -> None:
        self._database = database
        self._blocklist = blocklist
        self.lifetimes = lifetimes

    def open(
        self, db: Executor, user_id: UUID, origin: Origin, client_id: UUID | None = None
    ) -> Grant:
        """Begin a session in the caller's transaction, through a client app or none."""
        opened = {
            "id": new_id(),
            "user_id": user_id,
            "client_id": client_id,
            "current_jti": str(new_id()),
            "idle": min(self.lifetimes.idle, self.lifetimes.absolute),
            "absolute": self.lifetimes.absolute,
            "ip": origin.ip,
            "user_agent": origin.user_agent,
        }
        return granted(db, db.execute(OPEN, opened).one())

    async def count_live(self, user_id: UUID) -> int:
        """Return how many live sessions a user has, ``COUNTED_AT_MOST`` where there are more.

        Not within the transaction that ends them: nobody waits for the count.
        """
        theirs = select(Session.id).where(Session.user_id == user_id, *live())
        counted = theirs.limit(COUNTED_AT_MOST).subquery()
        async with self._database.read() as session:
            return await session.scalar(select(func.count()).select_from(counted)) or 0

    async def end(self, sid: UUID, user_id: UUID, origin: Origin, reason: str = "logout") -> None:
        """End the session of one's token. Raises ``NotFound`` where it has ended."""

        async def work() -> bool:
            async with self._blocklist.transaction() as tx:
                return await self._end_in(tx, sid, user_id, origin, reason)

        await self._finish_ending(work(), sid)

    async def end_own(self, sid: UUID, user_id: UUID, origin: Origin) -> None:
        """End another session of one's own. Raises ``NotFound``, ``TokenRevoked``."""

        async def work() -> bool:
            async with self._blocklist.transaction() as tx:
                await lock_user(tx.session, user_id)
                await ensure_active(tx.session, origin)
                return await self._end_in(tx, sid, user_id, origin, "ended")

        await self._finish_ending(work(), sid)

    async def end_any(self, sid: UUID, origin: Origin) -> None:
        """End anybody's session. Raises ``NotFound`` where it has ended."""
        async with self._database.read() as session:
            user_id = await session.scalar(select(Session.user_id).where(Session.id == sid))
        if user_id is None:
            raise NotFound
        theirs = user_id

        async def work() -> bool:
            async with self._blocklist.transaction() as tx:
                await lock_role_assignments(tx.session)
                await acting(tx.session, origin, REVOKE)
                return await self._end_in(tx, sid, theirs, origin, "revoked")

        await self._finish_ending(work(), sid)

    async def _end_in(
        self, tx: RevokingTransaction, sid: UUID, user_id: UUID, origin: Origin, reason: str
    ) -> bool:
        theirs = (Session.id == sid) & (Session.user_id == user_id)
        if not await self.end_in(tx, theirs, reason):
            return False
        audit.record(tx.session, f"session.{reason}", origin, target=sid)
        return True

    async def _finish_ending(self, work: Coroutine[Any, Any, bool], sid: UUID) -> None:
        if not await finished(work):
            # whoever ended it may have died before every worker knew
            await self._blocklist.publish_again(await self.ended_by(sid))
            raise NotFound

    async def ended_by(self, sid: UUID) -> list[Subject]:
        """Return what in the ledger may have ended a session; nothing where there is none."""
        async with self._database.read() as session:
            query = select(Session.user_id, Session.client_id).where(Session.id == sid)
            row = (await session.execute(query)).one_or_none()
        through = [(CLIENT_ENDED, str(row.client_id))] if row and row.client_id else []
        user = [(USER_ENDED, str(row.user_id))] if row else []
        return [(SID, str(sid)), *user, *through]

    async def end_all(self, user_id: UUID, origin: Origin) -> int:
        """End every session of one's own; return how many there were. Raises ``TokenRevoked``."""
        count = await self.count_live(user_id)

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                await lock_user(tx.session, user_id)
                await ensure_active(tx.session, origin)
                await self._end_all_in(tx, user_id, origin, "logout_all", count)

        await finished(work())
        return count

    async def end_all_of(self, user_id: UUID, origin: Origin) -> int:
        """End every session of anybody; return how many there were. Raises ``NotFound``."""
        count = await self.count_live(user_id)

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                await lock_role_assignments(tx.session)
                exists = await lock_user(tx.session, user_id)
                await acting(tx.session, origin, REVOKE)
                if not exists:
                    raise NotFound
                await self._end_all_in(tx, user_id, origin, "revoked_all", count)

        await finished(work())
        return count

    async def _end_all_in(
        self, tx: RevokingTransaction, user_id: UUID, origin: Origin, reason: str, count: int
    ) -> None:
        audit.record(tx.session, f"session.{reason}", origin, target=user_id, sessions=count)
        await end_sessions_of_user(tx, user_id, reason, self.lifetimes)

    async def end_in(
        self, tx: RevokingTransaction, which: ColumnElement[bool], reason: str
    ) -> Sequence[UUID]:
        """End a few sessions in the caller's transaction, each by a row; return which."""
        rows = await tx.session.execute(
            update(Session)
            .where(which, *live())
            .values(revoked_at=db_now(), revoked_reason=reason)
            .returning(*ENDED)
            .execution_options(synchronize_session=False)
        )
        ended = rows.all()
        access_until = access_tokens_until(self.lifetimes)
        # a client app may have its access tokens live longer than others do
        through_client = floor_until(self.lifetimes)
        leeway = timedelta(seconds=self.lifetimes.leeway)
        for sid, client_id, idle in ended:
            longest = through_client if client_id else access_until
            tx.revoke_session(sid, max(idle + leeway, longest))
        return [row.id for row in ended]

    async def page(self, which: SessionFilter, limit: int, cursor: str | None) -> Page[SessionView]:
        """Return one page of live sessions, the newest first."""
        query: Any = select(Session, User.username).join(User, User.id == Session.user_id)
        query = query.where(*live(), *_filtered(which))
        query = after(query, (Session.id,), cursor, scope=which, reverse=True)
        async with self._database.read() as session:
            found = (await session.execute(query.limit(limit + 1))).all()
        return page_of(
            found,
            limit,
            scope=which,
            key=lambda row: (row[0].id,),
            present=lambda row: view(row[0], row[1]),
        )

    async def revoke_any_token(self, jti: str, origin: Origin, **detail: Any) -> None:
        """Refuse anybody's token; its session goes on."""
        await self.revoke_token(jti, origin, REVOKE, **detail)

    async def revoke_token(self, jti: str, origin: Origin, *needed: str, **detail: Any) -> None:
        """Refuse one token for as long as any of ours can live, whatever is said of its expiry.

        The actor must hold what is ``needed``; nothing where the token is theirs.
        """
        longest = max(self.lifetimes.absolute, self.lifetimes.access) + self.lifetimes.leeway
        until = datetime.now(UTC) + timedelta(seconds=longest)

        async def work() -> bool:
            async with self._blocklist.transaction() as tx:
                if needed:
                    await lock_role_assignments(tx.session)
                    await acting(tx.session, origin, *needed)
                if await tx.session.scalar(select(Revocation.kind).where(*_is_revoked(jti))):
                    return False
                tx.revoke_token(jti, until)
                audit.record(tx.session, "token.revoked", origin, target=jti, **detail)
                return True

        if not await finished(work()):
            # whoever revoked it may have died before every worker knew
            await self._blocklist.publish_again([(JTI, jti)])

    async def prune(self, most: int) -> int:
        """Forget up to ``most`` sessions that could not be refreshed any more; return how many."""
        query = select(Session.id).where(Session.expires_at < db_now(-KEPT_SECONDS)).limit(most)
        async with self._database.read() as session:
            old = list(await session.scalars(query))
        if old:
            async with self._database.write() as session:
                await session.execute(delete(Session).where(Session.id.in_(old)))
        return len(old)


def view(session: Session, username: str) -> SessionView:
    """Return a session as shown; it expires when it goes idle."""
    return SessionView(
        id=session.id,
        user_id=session.user_id,
        username=username,
        created_at=session.created_at,
        last_used_at=session.last_used_at,
        expires_at=session.idle_expires_at,
        ip=session.ip,
        user_agent=session.user_agent,
    )


def _filtered(which: SessionFilter) -> list[ColumnElement[bool]]:
    wanted = {Session.user_id: which.user_id, Session.ip: which.ip}
    return [column == value for column, value in wanted.items() if value is not None]


def _is_revoked(jti: str) -> tuple[ColumnElement[bool], ...]:
    return Revocation.kind == JTI, Revocation.subject == jti


def _open() -> ReturningInsert[Any]:
    until = {
        name: db_now(bindparam(seconds, type_=Integer))
        for name, seconds in (("idle_expires_at", "idle"), ("expires_at", "absolute"))
    }
    given = ("id", "user_id", "client_id", "current_jti", "ip", "user_agent")
    # read in this statement: whoever ends all sessions of the user has either ended before it, or
    # waits for the user's row until this one is there
    opened = {"opened_seq": sequence.CURRENT.scalar_subquery()}
    values: dict[str, Any] = {name: bindparam(name) for name in given}
    values |= until | opened
    return insert(TABLE).values(values).returning(*GRANTED)


# Made once: building such a statement costs more than running it.
OPEN = _open()
