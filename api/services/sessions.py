"""Sessions: opened by a login, carried on by refreshes (rotations.py), ended by a logout or theft.

The database's clock decides. Whatever ends a session is committed before its answer is known,
errors included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Integer,
    Row,
    bindparam,
    delete,
    exists,
    insert,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningInsert

from api.blocklist import Blocklist, RevokingTransaction
from api.db import Database, Executor, db_now
from api.db.models import Session, User, new_id
from api.errors import NotFound
from api.services import audit
from api.services.audit import Origin
from api.services.generations import GRANTED, TABLE, Grant, granted
from api.services.lifetimes import Lifetimes, access_tokens_until, floor_until
from api.services.paging import Page, after, page_of
from api.shielding import finished

# Ending tens of thousands of sessions is one transaction too.
LONG_SECONDS = 60.0
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

    async def is_live(self, session: AsyncSession, sid: UUID) -> bool:
        """Return whether a session is live, in the caller's transaction."""
        found = await session.scalar(select(Session.id).where(Session.id == sid, *live()))
        return found is not None

    async def end(self, sid: UUID, user_id: UUID, origin: Origin, reason: str = "logout") -> None:
        """End one session of a user. Raises ``NotFound`` where it is not theirs or has ended."""

        async def work() -> int:
            async with self._blocklist.transaction() as tx:
                theirs = (Session.id == sid) & (Session.user_id == user_id)
                ended = await self.end_in(tx, theirs, reason)
                if ended:
                    audit.record(tx.session, f"session.{reason}", origin, target=sid)
                else:
                    await self.tell_again(tx, theirs)
                return len(ended)

        if not await finished(work()):
            raise NotFound

    async def end_all(self, user_id: UUID, origin: Origin, *, reason: str = "logout_all") -> int:
        """End every session of a user; return how many there were."""

        async def work() -> int:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                ended = await self.end_all_in(tx, user_id, reason)
                audit.record(
                    tx.session, f"session.{reason}", origin, target=user_id, sessions=len(ended)
                )
                return len(ended)

        return await finished(work())

    async def end_all_in(
        self, tx: RevokingTransaction, user_id: UUID, reason: str, *, but: UUID | None = None
    ) -> Sequence[UUID]:
        """End a user's sessions, save ``but``, in the caller's transaction."""
        which = Session.user_id == user_id
        return await self.end_in(tx, which & (Session.id != but) if but else which, reason)

    async def end_through(
        self, tx: RevokingTransaction, client_id: UUID, reason: str
    ) -> Sequence[UUID]:
        """End the sessions that were opened through a client app, in the caller's transaction."""
        return await self.end_in(tx, Session.client_id == client_id, reason)

    async def end_in(
        self, tx: RevokingTransaction, which: ColumnElement[bool], reason: str
    ) -> Sequence[UUID]:
        """End sessions in the caller's transaction; return which."""
        rows = await tx.session.execute(
            update(Session)
            .where(which, *live())
            .values(revoked_at=db_now(), revoked_reason=reason)
            .returning(*ENDED)
            .execution_options(synchronize_session=False)
        )
        ended = rows.all()
        await self._revoke(tx, ended)
        return [row.id for row in ended]

    async def tell_again(self, tx: RevokingTransaction, which: ColumnElement[bool]) -> None:
        """Take back once more what was ended before: a worker may have died before Redis knew."""
        query = select(*ENDED)
        rows = await tx.session.execute(query.where(which, Session.revoked_at.is_not(None)))
        await self._revoke(tx, rows.all())

    async def _revoke(
        self, tx: RevokingTransaction, ended: Sequence[Row[UUID, UUID | None, datetime]]
    ) -> None:
        access_until = access_tokens_until(self.lifetimes)
        # a client app may have its access tokens live longer than others do
        through_client = floor_until(self.lifetimes)
        leeway = timedelta(seconds=self.lifetimes.leeway)
        await tx.revoke_sessions(
            {
                sid: max(idle + leeway, through_client if client_id else access_until)
                for sid, client_id, idle in ended
            }
        )

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

    async def end_any(self, sid: UUID, origin: Origin) -> None:
        """End anybody's session. Raises ``NotFound`` where it has ended."""
        async with self._database.read() as session:
            user_id = await session.scalar(select(Session.user_id).where(Session.id == sid))
        if user_id is None:
            raise NotFound
        await self.end(sid, user_id, origin, reason="revoked")

    async def revoke_token(self, jti: str, origin: Origin, **detail: Any) -> None:
        """Refuse one token for as long as any of ours can live, whatever is said of its expiry."""
        longest = max(self.lifetimes.absolute, self.lifetimes.access) + self.lifetimes.leeway
        until = datetime.now(UTC) + timedelta(seconds=longest)

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                await tx.revoke_token(jti, until)
                audit.record(tx.session, "token.revoked", origin, target=jti, **detail)

        await finished(work())

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


def live() -> tuple[ColumnElement[bool], ...]:
    return (Session.revoked_at.is_(None), live_now())


def live_now() -> ColumnElement[bool]:
    # idle_expires_at never passes expires_at: one comparison is both lifetimes
    return Session.idle_expires_at > db_now()


def active_user() -> ColumnElement[bool]:
    return exists().where(User.id == Session.user_id, User.is_active)


def _open() -> ReturningInsert[Any]:
    until = {
        name: db_now(bindparam(seconds, type_=Integer))
        for name, seconds in (("idle_expires_at", "idle"), ("expires_at", "absolute"))
    }
    given = ("id", "user_id", "client_id", "current_jti", "ip", "user_agent")
    return (
        insert(TABLE).values({name: bindparam(name) for name in given} | until).returning(*GRANTED)
    )


# Made once: building such a statement costs more than running it.
OPEN = _open()
