"""Sessions: opened by a login, carried on by refreshes, ended by a logout or by theft.

The database's clock and one conditional UPDATE decide every race. Whatever ends a session is
committed before its answer is known, errors included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Integer,
    Row,
    Select,
    Update,
    bindparam,
    case,
    delete,
    exists,
    insert,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningInsert

from api.blocklist import Blocklist, RevokingTransaction
from api.db import STATEMENT_SECONDS, Database, db_now
from api.db.models import Session, User, new_id, table_of
from api.errors import NotFound, RefreshReused, Refused, TokenExpired, TokenRevoked
from api.services import audit, holding
from api.services.audit import Origin
from api.services.client_terms import ClientTerms, terms
from api.services.holding import Holding
from api.services.paging import Page, after, page_of
from api.shielding import finished
from api.together import Together

# Longer than any client app may have its tokens live (schemas/clients.py), leeway included.
FLOOR_KEPT = timedelta(days=1, minutes=10)
# Ending tens of thousands of sessions is one transaction too.
LONG_SECONDS = 60.0
# How many refreshes share a transaction at most.
ROTATED_TOGETHER = 64
# A session is forgotten this long after it ended for good.
KEPT_SECONDS = 86_400
GRANTED = (
    Session.id,
    Session.user_id,
    Session.client_id,
    Session.current_jti,
    Session.idle_expires_at,
    Session.expires_at,
)

ENDED = (Session.id, Session.client_id, Session.idle_expires_at)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """In seconds: of an access token, of an idle session, of any session, and the grace.

    ``leeway`` is how long after its ``exp`` a token is accepted still.
    """

    access: int
    idle: int
    absolute: int
    grace: int
    leeway: int = 0

    def of_access(self, terms: ClientTerms | None) -> timedelta:
        """Return how long an access token lives, of a client app or of none; never too long.

        Keys verify for as long as a session may last, and no longer.
        """
        wanted = (terms and terms.access_token_expires) or self.access
        return timedelta(seconds=min(wanted, max(self.access, self.absolute)))


@dataclass(frozen=True, slots=True)
class Grant:
    """What the tokens of one generation of a session are made from."""

    sid: UUID
    user_id: UUID
    username: str
    version: int
    holding: Holding
    refresh_jti: str
    refresh_expires_at: datetime
    client: ClientTerms | None = None
    scope: tuple[str, ...] | None = None


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
        self._together = Together(
            self._rotate_together, most=ROTATED_TOGETHER, seconds=2 * STATEMENT_SECONDS
        )

    async def stop(self) -> None:
        """Let rotations end that nobody waits for any more."""
        await self._together.stop()

    async def open(
        self, session: AsyncSession, user: User, origin: Origin, client_id: UUID | None = None
    ) -> Grant:
        """Begin a session in the caller's transaction, through a client app or none."""
        opened = {
            "id": new_id(),
            "user_id": user.id,
            "client_id": client_id,
            "current_jti": str(new_id()),
            "idle": min(self.lifetimes.idle, self.lifetimes.absolute),
            "absolute": self.lifetimes.absolute,
            "ip": origin.ip,
            "user_agent": origin.user_agent,
        }
        row = (await session.execute(OPEN, opened)).one()
        return await _grant(session, row)

    async def rotate(
        self, sid: UUID, jti: str, origin: Origin, scope: tuple[str, ...] | None = None
    ) -> Grant:
        """Spend the refresh token ``jti`` for the next generation.

        ``scope`` narrows this access token (RFC 6749 section 6). Raises ``TokenRevoked``,
        ``TokenExpired``, ``InvalidScope`` with the token unspent, or, after ending the session,
        ``RefreshReused``.
        """
        # most are plain ones; what the lot does not rotate is looked at alone
        if scope is None and (grant := await self._together.ask((sid, jti))) is not None:
            return grant
        outcome = await finished(self._rotate(sid, jti, origin, scope))
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    async def _rotate_together(self, asked: list[tuple[UUID, str]]) -> list[Grant | None]:
        """Spend many refresh tokens in one transaction; None for what is not spent so.

        The UPDATE decides each as it would alone. Sessions of client apps, retries and thefts are
        not its business.
        """
        async with self._database.write() as session:
            free = await self._free(session, [sid for sid, _ in asked])
            spending = [
                {"sid": sid, "jti": jti, "next_jti": str(new_id()), "idle": self.lifetimes.idle}
                for sid, jti in asked
            ]
            spent = [one for one in spending if one["sid"] in free]
            if not spent:
                return [None] * len(asked)
            await session.execute(SPEND_MANY, spent)
            rows = await session.execute(GRANTED_MANY, {"sids": [one["sid"] for one in spent]})
            grants = {grant.refresh_jti: grant for grant in _grants(rows.all())}
        return [grants.get(str(one["next_jti"])) for one in spending]

    async def _free(self, session: AsyncSession, sids: list[UUID]) -> set[UUID]:
        """Lock what nobody else has locked: a lot that waits for one row keeps everybody waiting.

        SQLite's writers are alone already.
        """
        if self._database.dialect == "sqlite":
            return set(sids)
        return set(await session.scalars(LOCK_FREE, {"sids": sids}))

    async def _rotate(
        self, sid: UUID, jti: str, origin: Origin, scope: tuple[str, ...] | None
    ) -> Grant | Refused:
        async with self._blocklist.transaction() as tx:
            spent = await tx.session.execute(
                SPEND_ONE,
                {"sid": sid, "jti": jti, "next_jti": str(new_id()), "idle": self.lifetimes.idle},
            )
            rotated = spent.one_or_none()
            if rotated is not None:
                return await _grant(tx.session, rotated, scope)
            return await self._retried_or_refused(tx, sid, jti, origin, scope)

    async def _retried_or_refused(
        self,
        tx: RevokingTransaction,
        sid: UUID,
        jti: str,
        origin: Origin,
        scope: tuple[str, ...] | None,
    ) -> Grant | Refused:
        """Tell a lost answer from a theft: the same generation again, or the session's end."""
        in_grace = Session.rotated_at >= db_now(-self.lifetimes.grace)
        row = (
            await tx.session.execute(
                select(
                    *GRANTED,
                    Session.revoked_at,
                    (Session.previous_jti == jti).label("is_previous"),
                    in_grace.label("in_grace"),
                    (_live_now()).label("live"),
                    User.is_active,
                )
                .join(User, User.id == Session.user_id)
                .where(Session.id == sid)
                .with_for_update(of=Session)
            )
        ).one_or_none()
        if row is None or row.revoked_at is not None or not row.is_active:
            await self._tell_again(tx, Session.id == sid)
            return TokenRevoked()
        if not row.live:
            return TokenExpired()
        if row.is_previous and row.in_grace and self.lifetimes.grace:
            return await _grant(tx.session, row, scope)
        await self._end(tx, Session.id == sid, "refresh_reused")
        audit.record(tx.session, "session.refresh_reused", origin, target=sid, actor=row.user_id)
        return RefreshReused()

    async def is_live(self, session: AsyncSession, sid: UUID) -> bool:
        """Return whether a session is live, in the caller's transaction."""
        found = await session.scalar(select(Session.id).where(Session.id == sid, *_live()))
        return found is not None

    async def is_current(self, sid: UUID, jti: str) -> bool:
        """Return whether ``jti`` is the refresh token that a live session may spend."""
        which = (Session.id == sid, Session.current_jti == jti, *_live(), _active_user())
        async with self._database.read() as session:
            return await session.scalar(select(Session.id).where(*which)) is not None

    async def end(self, sid: UUID, user_id: UUID, origin: Origin, reason: str = "logout") -> None:
        """End one session of a user. Raises ``NotFound`` where it is not theirs or has ended."""

        async def work() -> int:
            async with self._blocklist.transaction() as tx:
                theirs = (Session.id == sid) & (Session.user_id == user_id)
                ended = await self._end(tx, theirs, reason)
                if ended:
                    audit.record(tx.session, f"session.{reason}", origin, target=sid)
                else:
                    await self._tell_again(tx, theirs)
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
        return await self._end(tx, which & (Session.id != but) if but else which, reason)

    async def end_through(
        self, tx: RevokingTransaction, client_id: UUID, reason: str
    ) -> Sequence[UUID]:
        """End the sessions that were opened through a client app, in the caller's transaction."""
        return await self._end(tx, Session.client_id == client_id, reason)

    async def _end(
        self, tx: RevokingTransaction, which: ColumnElement[bool], reason: str
    ) -> Sequence[UUID]:
        rows = await tx.session.execute(
            update(Session)
            .where(which, *_live())
            .values(revoked_at=db_now(), revoked_reason=reason)
            .returning(*ENDED)
            .execution_options(synchronize_session=False)
        )
        ended = rows.all()
        await self._revoke(tx, ended)
        return [row.id for row in ended]

    async def _tell_again(self, tx: RevokingTransaction, which: ColumnElement[bool]) -> None:
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
        query = query.where(*_live(), *_filtered(which))
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


def access_tokens_until(lifetimes: Lifetimes) -> datetime:
    """Return when the last access token made until now will be refused for its age."""
    return datetime.now(UTC) + timedelta(seconds=lifetimes.access + lifetimes.leeway)


def floor_until(lifetimes: Lifetimes) -> datetime:
    """Return how long a floor must stand: tokens made under longer lifetimes may still be out."""
    return max(access_tokens_until(lifetimes), datetime.now(UTC) + FLOOR_KEPT)


async def _grant(session: AsyncSession, row: Any, scope: tuple[str, ...] | None = None) -> Grant:
    through = await terms(session, row.client_id) if row.client_id else None
    if row.client_id and through is None:
        # disabled in this moment: nothing is spent
        raise TokenRevoked
    bearer = await holding.bearer(session, row.user_id, within=row.client_id)
    return Grant(
        sid=row.id,
        user_id=row.user_id,
        username=bearer.username,
        version=bearer.version,
        holding=holding.narrowed(bearer.holding, scope),
        refresh_jti=row.current_jti,
        refresh_expires_at=row.idle_expires_at,
        client=through,
        scope=scope,
    )


def _filtered(which: SessionFilter) -> list[ColumnElement[bool]]:
    wanted = {Session.user_id: which.user_id, Session.ip: which.ip}
    return [column == value for column, value in wanted.items() if value is not None]


def _live() -> tuple[ColumnElement[bool], ...]:
    return (Session.revoked_at.is_(None), _live_now())


def _live_now() -> ColumnElement[bool]:
    # idle_expires_at never passes expires_at: one comparison is both lifetimes
    return Session.idle_expires_at > db_now()


def _active_user() -> ColumnElement[bool]:
    return exists().where(User.id == Session.user_id, User.is_active)


def _earlier(one: Any, other: Any) -> ColumnElement[datetime]:
    return case((one < other, one), else_=other)


def _spend() -> Update:
    """The one UPDATE that decides who rotates."""
    now_idle = db_now(bindparam("idle", type_=Integer))
    return (
        update(TABLE)
        .where(SESSIONS.id == bindparam("sid"), SESSIONS.current_jti == bindparam("jti"))
        .where(*_live(), _active_user())
        .values(
            previous_jti=SESSIONS.current_jti,
            current_jti=bindparam("next_jti"),
            generation=SESSIONS.generation + 1,
            rotated_at=db_now(),
            last_used_at=db_now(),
            idle_expires_at=_earlier(now_idle, SESSIONS.expires_at),
        )
    )


def _open() -> ReturningInsert[Any]:
    until = {
        name: db_now(bindparam(seconds, type_=Integer))
        for name, seconds in (("idle_expires_at", "idle"), ("expires_at", "absolute"))
    }
    given = ("id", "user_id", "client_id", "current_jti", "ip", "user_agent")
    return (
        insert(TABLE)
        .values({name: bindparam(name) for name in given} | until)
        .returning(*(SESSIONS[column.key] for column in GRANTED))
    )


def _granted_many() -> Select[Any]:
    """Select sessions, their users and what these hold: a row for each permission, or one."""
    asked = SESSIONS.id.in_(SIDS)
    users = select(SESSIONS.user_id).where(asked)
    held = holding.all_held(holding.GIVEN.user_id.in_(users)).subquery()
    columns = (SESSIONS[column.key] for column in GRANTED)
    return (
        select(*columns, USERS.username, USERS.version, held.c.name, held.c.permission)
        .select_from(TABLE)
        .join(table_of(User), USERS.id == SESSIONS.user_id)
        .outerjoin(held, held.c.user_id == SESSIONS.user_id)
        .where(asked)
    )


def _grants(rows: Iterable[Row[Any]]) -> Iterator[Grant]:
    of_sessions: dict[UUID, list[Row[Any]]] = {}
    for row in rows:
        of_sessions.setdefault(row.id, []).append(row)
    for sid, (row, *more) in of_sessions.items():
        yield Grant(
            sid=sid,
            user_id=row.user_id,
            username=row.username,
            version=row.version,
            holding=holding.gathered((one.name, one.permission) for one in (row, *more)),
            refresh_jti=row.current_jti,
            refresh_expires_at=row.idle_expires_at,
        )


# Made once: building such a statement costs more than running it. Of tables, not of classes: rows
# are all that is wanted.
TABLE = table_of(Session)
SESSIONS, USERS = TABLE.c, table_of(User).c
SIDS: BindParameter[Sequence[UUID]] = bindparam("sids", expanding=True)
OPEN = _open()
SPEND_ONE = _spend().returning(*(SESSIONS[column.key] for column in GRANTED))
SPEND_MANY = _spend().where(SESSIONS.client_id.is_(None))
GRANTED_MANY = _granted_many()
LOCK_FREE = select(SESSIONS.id).where(SESSIONS.id.in_(SIDS)).with_for_update(skip_locked=True)
