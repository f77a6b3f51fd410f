"""Accounts: who may sign in, and with what password."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.passwords import Passwords
from api.auth.throttle import LoginThrottle
from api.blocklist import Blocklist
from api.db import Database, db_now
from api.db.models import Role, User, UserRole
from api.errors import BadCredentials, NotFound, RegistrationClosed, UsernameTaken
from api.services import audit, roles
from api.services.audit import Origin
from api.services.paging import Page, after, page_of
from api.services.sessions import Grant, Sessions, floor_until
from api.shielding import finished

SORTS = {"created_at": User.created_at, "username": User.username_key}


@dataclass(frozen=True, slots=True)
class UserView:
    """A user as shown: never with the password's hash."""

    id: UUID
    username: str
    email: str | None
    is_active: bool
    roles: tuple[str, ...]
    permissions: tuple[str, ...]
    created_at: datetime
    last_login_at: datetime | None


@dataclass(frozen=True, slots=True)
class UserFilter:
    """Which users, in which order: ``sort`` is a name of ``SORTS``, ``-`` before it reverses."""

    q: str | None = None
    role: str | None = None
    active: bool | None = None
    sort: str = "created_at"


class Accounts:
    """What users and operators do with accounts. Each change is one transaction."""

    def __init__(
        self,
        database: Database,
        blocklist: Blocklist,
        sessions: Sessions,
        passwords: Passwords,
        throttle: LoginThrottle,
        *,
        registration_open: bool,
    ) -> None:
        self._database = database
        self._blocklist = blocklist
        self._sessions = sessions
        self._passwords = passwords
        self._throttle = throttle
        self._registration_open = registration_open

    async def sign_in(self, username: str, password: str, origin: Origin) -> Grant:
        """Open a session. Raises ``BadCredentials`` or ``TooManyRequests``.

        Unknown user, wrong password and disabled user cost the same: one throttle, one read,
        one verification, one audit row.
        """
        key = fold(username)
        async with self._throttle.attempt(key, origin.ip) as attempt:
            user = await self._by_key(key)
            right = await self._passwords.verify(password, user.password_hash if user else None)
            attempt.right = user is not None and right and user.is_active
        if user is None or not attempt.right:
            await self._note_failure(user, origin)
            raise BadCredentials
        rehashed = None
        if self._passwords.outdated(user.password_hash):
            rehashed = await self._passwords.hash(password)
        grant = await finished(self._enter(user, rehashed, origin))
        if grant is None:
            raise BadCredentials
        return grant

    async def _enter(self, user: User, rehashed: str | None, origin: Origin) -> Grant | None:
        async with self._database.write() as session:
            # the password may have changed, or the user been disabled, while it was verified
            unchanged = (User.id == user.id) & (User.password_hash == user.password_hash)
            values: dict[str, Any] = {"last_login_at": db_now(), "updated_at": User.updated_at}
            if rehashed:
                values["password_hash"] = rehashed
            entered = await session.scalar(
                update(User)
                .where(unchanged, User.is_active)
                .values(**values)
                .returning(User.id)
                .execution_options(synchronize_session=False)
            )
            if entered is None:
                return None
            audit.record(session, "login", origin, actor=user.id, target=user.id)
            return await self._sessions.open(session, user, origin)

    async def _note_failure(self, user: User | None, origin: Origin) -> None:
        # what was typed may be a password in the wrong field: only known accounts are named
        async with self._database.write() as session:
            audit.record(session, "login.failed", origin, target=user.id if user else None)

    async def register(
        self, username: str, password: str, email: str | None, origin: Origin
    ) -> UserView:
        """Make an account for whoever asks, with the role ``user``, where that is open."""
        if not self._registration_open:
            raise RegistrationClosed
        return await self.create(username, password, email, [roles.USER], origin)

    async def create(
        self,
        username: str,
        password: str,
        email: str | None,
        role_names: Iterable[str],
        origin: Origin,
        *,
        checked: bool = True,
    ) -> UserView:
        """Make an account. Raises ``WeakPassword``, ``UsernameTaken``, ``ValidationFailed``.

        ``checked=False`` lets a weak password by: the demo accounts have well-known ones.
        """
        if checked:
            await self._passwords.refuse_weak(password, username)
        hashed = await self._passwords.hash(password)
        user = User(
            username=username, username_key=fold(username), email=email, password_hash=hashed
        )
        async with self._database.write() as session:
            session.add(user)
            try:
                await session.flush()
            except IntegrityError as error:
                raise UsernameTaken from error
            await roles.assign(session, user.id, role_names)
            audit.record(session, "user.created", origin, target=user.id, roles=sorted(role_names))
        return await self.get(user.id)

    async def change_password(
        self, user_id: UUID, sid: UUID, current: str, new: str, origin: Origin
    ) -> None:
        """Change one's own password and end every session but this one."""
        user = await self._row(user_id)
        async with self._throttle.attempt(user.username_key, origin.ip) as attempt:
            attempt.right = await self._passwords.verify(current, user.password_hash)
        if not attempt.right:
            await self._note_failure(user, origin)
            raise BadCredentials("The current password is wrong.")
        await self._passwords.refuse_weak(new, user.username, field="new_password")
        hashed = await self._passwords.hash(new)
        # somebody may have set another, or disabled the user, while these were hashed
        still = (User.password_hash == user.password_hash) & User.is_active
        await self._store_password(user_id, hashed, origin, keep=sid, where=still)

    async def set_password(self, user_id: UUID, new: str, origin: Origin) -> None:
        """Set somebody's password and end every session of theirs."""
        user = await self._row(user_id)
        await self._passwords.refuse_weak(new, user.username)
        await self._store_password(user_id, await self._passwords.hash(new), origin)

    async def _store_password(
        self,
        user_id: UUID,
        hashed: str,
        origin: Origin,
        *,
        keep: UUID | None = None,
        where: ColumnElement[bool] | None = None,
    ) -> None:
        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                stored = await tx.session.scalar(
                    update(User)
                    .where(User.id == user_id, true() if where is None else where)
                    .values(password_hash=hashed)
                    .returning(User.id)
                    .execution_options(synchronize_session=False)
                )
                if stored is None or (keep and not await self._sessions.is_live(tx.session, keep)):
                    # nothing is kept: what was stored is rolled back
                    raise BadCredentials("The current password is wrong.")
                ended = await self._sessions.end_all_in(tx, user_id, "password", but=keep)
                audit.record(
                    tx.session, "user.password", origin, target=user_id, sessions=len(ended)
                )

        await finished(work())

    async def set_email(self, user_id: UUID, email: str | None, origin: Origin) -> UserView:
        """Change one's own address."""
        async with self._database.write() as session:
            await session.execute(update(User).where(User.id == user_id).values(email=email))
            audit.record(session, "user.changed", origin, target=user_id, fields=["email"])
        return await self.get(user_id)

    async def set_roles(self, user_id: UUID, names: Sequence[str], origin: Origin) -> UserView:
        """Give exactly these roles; tokens that say otherwise are stale from now on."""

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                # first: it locks the user's row, so that of two changes at once one is whole
                version = await self._raise_version(tx.session, user_id)
                await roles.assign(tx.session, user_id, names)
                await roles.refuse_without_admin(tx.session)
                await tx.raise_floor(user_id, version, floor_until(self._sessions.lifetimes))
                audit.record(
                    tx.session, "user.roles", origin, target=user_id, roles=sorted(set(names))
                )

        await self._row(user_id)
        await finished(work())
        return await self.get(user_id)

    async def deactivate(self, user_id: UUID, origin: Origin) -> UserView:
        """Disable an account and end its sessions."""

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                version = await self._raise_version(tx.session, user_id, is_active=False)
                await roles.refuse_without_admin(tx.session)
                await tx.raise_floor(user_id, version, floor_until(self._sessions.lifetimes))
                ended = await self._sessions.end_all_in(tx, user_id, "deactivated")
                audit.record(
                    tx.session, "user.deactivated", origin, target=user_id, sessions=len(ended)
                )

        await self._row(user_id)
        await finished(work())
        return await self.get(user_id)

    async def _raise_version(self, session: AsyncSession, user_id: UUID, **values: object) -> int:
        version = await session.scalar(
            update(User)
            .where(User.id == user_id)
            .values(version=User.version + 1, **values)
            .returning(User.version)
            .execution_options(synchronize_session=False)
        )
        if version is None:
            raise NotFound
        return version

    async def opens(self, username: str, password: str) -> bool:
        """Return whether an active account of that name has that password."""
        user = await self._by_key(fold(username))
        if user is None or not user.is_active:
            return False
        return await self._passwords.verify(password, user.password_hash)

    async def get(self, user_id: UUID) -> UserView:
        """Return one user. Raises ``NotFound``."""
        async with self._database.read() as session:
            user = await session.get(User, user_id)
            if user is None:
                raise NotFound
            return view(user, await roles.holding(session, user_id))

    async def find(self, username: str) -> UserView:
        """Return the user of that name, in whatever case. Raises ``NotFound``."""
        user = await self._by_key(fold(username))
        if user is None:
            raise NotFound(f"There is no user {username!r}.")
        return await self.get(user.id)

    async def page(self, which: UserFilter, limit: int, cursor: str | None) -> Page[UserView]:
        """Return one page of users, by keyset: the thousandth costs what the first costs."""
        column, descending = SORTS[which.sort.lstrip("-")], which.sort.startswith("-")
        query = after(_filtered(which), (column, User.id), cursor, scope=which, reverse=descending)
        async with self._database.read() as session:
            users = (await session.scalars(query.limit(limit + 1))).all()
            held = await roles.holdings(session, [user.id for user in users])
            name = column.key
            return page_of(
                users,
                limit,
                scope=which,
                key=lambda user: (getattr(user, name), user.id),
                present=lambda user: view(user, held[user.id]),
            )

    async def _row(self, user_id: UUID) -> User:
        async with self._database.read() as session:
            user = await session.get(User, user_id)
        if user is None:
            raise NotFound
        return user

    async def _by_key(self, key: str) -> User | None:
        async with self._database.read() as session:
            return await session.scalar(select(User).where(User.username_key == key))


def fold(username: str) -> str:
    """Return the form in which two usernames are compared: NFKC, case folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", username).casefold())


def view(user: User, holding: roles.Holding) -> UserView:
    """Return a user as shown."""
    return UserView(
        id=user.id,
        username=user.username,
        email=user.email,
        is_active=user.is_active,
        roles=holding.roles,
        permissions=holding.permissions,
        created_at=user.created_at,
        last_login_at=user.last_login_at,
    )


def _filtered(which: UserFilter) -> Select[User]:
    query = select(User)
    if which.q:
        key = fold(which.q)
        query = query.where(
            User.username_key.contains(key, autoescape=True)
            | User.email.icontains(which.q, autoescape=True)
        )
    if which.active is not None:
        query = query.where(User.is_active == which.active)
    if which.role is not None:
        named = select(UserRole.user_id).join(Role, Role.id == UserRole.role_id)
        query = query.where(User.id.in_(named.where(Role.name == which.role)))
    return query
