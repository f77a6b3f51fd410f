"""Users, as operators keep them: made, found, changed, given roles, deleted."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, bindparam, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.passwords import Passwords
from api.blocklist import Blocklist
from api.db import Database
from api.db.models import Role, User, UserRole, table_of
from api.errors import InsufficientPermission, NotFound, PreconditionFailed, UsernameTaken
from api.services import audit, holding
from api.services.audit import Origin
from api.services.lifetimes import floor_until
from api.services.paging import Page, after, page_of
from api.services.sessions import Sessions
from api.shielding import finished

# Ending tens of thousands of sessions is one transaction too.
LONG_SECONDS = 60.0
Etags = frozenset[str]
# Rows of these, not models, where there are many: half the price.
SHOWN = (
    User.id, User.username, User.username_key, User.email, User.is_active, User.created_at,
    User.version, User.updated_at, User.last_login_at,
)  # fmt: skip
SORTS = {"created_at": User.created_at, "username": User.username_key}


@dataclass(frozen=True, slots=True)
class Account:
    """A user as whoever signs in is compared with."""

    id: UUID
    username: str
    username_key: str
    password_hash: str = field(repr=False)
    is_active: bool


# Made once: building such a statement costs more than running it.
USERS = table_of(User).c
ACCOUNT = select(*(USERS[member.name] for member in fields(Account)))
BY_ID = ACCOUNT.where(USERS.id == bindparam("user_id"))
BY_KEY = ACCOUNT.where(USERS.username_key == bindparam("key"))


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
    version: int
    updated_at: datetime
    last_login_at: datetime | None

    @property
    def etag(self) -> str:
        """What ``If-Match`` is compared with: another once anything but a sign-in changed it."""
        said = repr(astuple(self)[:-1])
        return hashlib.sha256(said.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class UserFilter:
    """Which users, in which order: ``sort`` is a name of ``SORTS``, ``-`` before it reverses."""

    q: str | None = None
    role: str | None = None
    active: bool | None = None
    sort: str = "created_at"


class Users:
    """What operators do with users. Each change is one transaction, with its audit row.

    Whoever changes a user in a way that would let them act as that user (password, status,
    deletion) must hold what the user holds. ``match`` holds etags:
    ``PreconditionFailed`` where the user is not as it was when one of them was read.
    """

    def __init__(
        self, database: Database, blocklist: Blocklist, sessions: Sessions, passwords: Passwords
    ) -> None:
        self._database = database
        self._blocklist = blocklist
        self._sessions = sessions
        self._passwords = passwords

    async def create(
        self,
        username: str,
        password: str,
        email: str | None,
        role_names: Iterable[str],
        origin: Origin,
        *,
        checked: bool = True,
        is_active: bool = True,
    ) -> UserView:
        """Make an account. Raises ``WeakPassword``, ``UsernameTaken``, ``ValidationFailed``.

        ``checked=False`` lets a weak password by: the demo accounts have well-known ones.
        """
        if checked:
            await self._passwords.refuse_weak(password, username)
        hashed = await self._passwords.hash(password)
        user = User(
            username=username,
            username_key=fold(username),
            email=email,
            password_hash=hashed,
            is_active=is_active,
        )
        async with self._database.write() as session:
            await holding.one_change_at_a_time(session)
            session.add(user)
            try:
                await session.flush()
            except IntegrityError as error:
                raise UsernameTaken from error
            await holding.assign(session, user.id, role_names, origin)
            audit.record(session, "user.created", origin, target=user.id, roles=sorted(role_names))
            return await _view(session, user.id)

    async def change(
        self,
        user_id: UUID,
        changes: dict[str, Any],
        origin: Origin,
        match: Etags | None = None,
    ) -> UserView:
        """Change ``email``, ``is_active`` or ``password``.

        A disabled user's sessions end, and so do those of a user whose password is set. Raises
        ``NotFound``, ``LastAdmin``, ``WeakPassword``, ``InsufficientPermission``.
        """
        if "password" in changes and origin.actor == str(user_id):
            raise InsufficientPermission("One's own password is changed at /me/password.")
        values: dict[str, Any] = {
            name: changes[name] for name in ("email", "is_active") if name in changes
        }
        if "password" in changes:
            user = await self.row(user_id)
            await self._passwords.refuse_weak(changes["password"], user.username)
            values["password_hash"] = await self._passwords.hash(changes["password"])

        async def work() -> UserView:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                before = await self._locked(tx.session, user_id, match)
                await self._refuse_beyond(tx.session, origin, before)
                version = await self._raise_version(tx.session, user_id, **values)
                ended = 0
                if changes.get("is_active") is False or "password" in changes:
                    await tx.raise_floor(user_id, version, floor_until(self._sessions.lifetimes))
                    ended = len(await self._sessions.end_all_in(tx, user_id, "changed"))
                if changes.get("is_active") is False:
                    await holding.refuse_without_admin(tx.session)
                audit.record(
                    tx.session, "user.changed", origin, target=user_id, fields=sorted(changes),
                    sessions=ended,
                )  # fmt: skip
                return await _view(tx.session, user_id)

        return await finished(work())

    async def deactivate(self, user_id: UUID, origin: Origin) -> UserView:
        """Disable an account and end its sessions."""
        return await self.change(user_id, {"is_active": False}, origin)

    async def set_password(self, user_id: UUID, new: str, origin: Origin) -> None:
        """Set somebody's password and end every session of theirs."""
        await self.change(user_id, {"password": new}, origin)

    async def delete(self, user_id: UUID, origin: Origin, match: Etags | None = None) -> None:
        """Delete a user and end their sessions; the audit log keeps what it says of them."""

        async def work() -> None:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                before = await self._locked(tx.session, user_id, match)
                await self._refuse_beyond(tx.session, origin, before)
                ended = await self._sessions.end_all_in(tx, user_id, "deleted")
                await tx.session.execute(delete(UserRole).where(UserRole.user_id == user_id))
                await tx.session.execute(delete(User).where(User.id == user_id))
                await holding.refuse_without_admin(tx.session)
                audit.record(
                    tx.session, "user.deleted", origin, target=user_id,
                    username=before.username, sessions=len(ended),
                )  # fmt: skip

        await finished(work())

    async def set_roles(
        self,
        user_id: UUID,
        names: Sequence[str],
        origin: Origin,
        match: Etags | None = None,
    ) -> UserView:
        """Give exactly these roles; tokens that say otherwise are stale from now on."""

        async def work() -> UserView:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                await self._locked(tx.session, user_id, match)
                version = await self._raise_version(tx.session, user_id)
                await holding.assign(tx.session, user_id, names, origin)
                await holding.refuse_without_admin(tx.session)
                await tx.raise_floor(user_id, version, floor_until(self._sessions.lifetimes))
                audit.record(
                    tx.session, "user.roles", origin, target=user_id, roles=sorted(set(names))
                )
                return await _view(tx.session, user_id)

        return await finished(work())

    async def _locked(self, session: AsyncSession, user_id: UUID, match: Etags | None) -> UserView:
        """Return a user whom nobody else changes until this transaction ends."""
        await holding.one_change_at_a_time(session)
        await session.execute(select(User.id).where(User.id == user_id).with_for_update())
        found = await _view(session, user_id)
        if match is not None and found.etag not in match:
            raise PreconditionFailed
        return found

    async def _refuse_beyond(self, session: AsyncSession, origin: Origin, user: UserView) -> None:
        # one's own account too: a client app or a scope may bind what one holds just now
        own = await holding.held_by(session, origin)
        holding.refuse_beyond(own, holding.Holding(user.roles, user.permissions))

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

    async def get(self, user_id: UUID, within: UUID | None = None) -> UserView:
        """Return one user, as a client app may see them or altogether. Raises ``NotFound``."""
        async with self._database.read() as session:
            return await _view(session, user_id, within)

    async def ways(self, user_id: UUID, permission: str) -> list[holding.Way]:
        """Return how a user comes to hold a permission; nothing where they do not."""
        async with self._database.read() as session:
            await _view(session, user_id)
            return await holding.ways(session, user_id, permission)

    async def find(self, username: str) -> UserView:
        """Return the user of that name, in whatever case. Raises ``NotFound``."""
        user = await self.by_key(fold(username))
        if user is None:
            raise NotFound(f"There is no user {username!r}.")
        return await self.get(user.id)

    async def page(self, which: UserFilter, limit: int, cursor: str | None) -> Page[UserView]:
        """Return one page of users, by keyset: the thousandth costs what the first costs."""
        column, descending = SORTS[which.sort.lstrip("-")], which.sort.startswith("-")
        query = after(_filtered(which), (column, User.id), cursor, scope=which, reverse=descending)
        async with self._database.read() as session:
            users = (await session.execute(query.limit(limit + 1))).all()
            held = await holding.holdings(session, [user.id for user in users])
            name = column.key
            return page_of(
                users,
                limit,
                scope=which,
                key=lambda user: (getattr(user, name), user.id),
                present=lambda user: view(user, held[user.id]),
            )

    async def row(self, user_id: UUID) -> Account:
        """Return an account. Raises ``NotFound``."""
        found = await self._database.rows(BY_ID, {"user_id": user_id})
        if not found:
            raise NotFound
        return Account(*found[0])

    async def by_key(self, key: str) -> Account | None:
        """Return the account of a folded username."""
        found = await self._database.rows(BY_KEY, {"key": key})
        return Account(*found[0]) if found else None


async def _view(session: AsyncSession, user_id: UUID, within: UUID | None = None) -> UserView:
    user = await session.get(User, user_id, populate_existing=True)
    if user is None:
        raise NotFound
    return view(user, await holding.holding(session, user_id, within))


def fold(username: str) -> str:
    """Return the form in which two usernames are compared: NFKC, case folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", username).casefold())


def view(user: User | Row[Any], held: holding.Holding) -> UserView:
    """Return a user as shown: a model, or a row with the columns that are."""
    return UserView(
        id=user.id,
        username=user.username,
        email=user.email,
        is_active=user.is_active,
        roles=held.roles,
        permissions=held.permissions,
        created_at=user.created_at,
        version=user.version,
        updated_at=user.updated_at,
        last_login_at=user.last_login_at,
    )


def _filtered(which: UserFilter) -> Any:
    query: Any = select(*SHOWN)
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
