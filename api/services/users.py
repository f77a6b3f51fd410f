"""Users, as operators keep them: made, found, changed, given roles, deleted."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Row, Select, bindparam, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.passwords import Passwords
from api.blocklist import Blocklist
from api.blocklist.ledger import USER, USER_ENDED
from api.db import Database, Executor
from api.db.models import User, UserRole, table_of
from api.errors import InsufficientPermission, NotFound, PreconditionFailed, UsernameTaken
from api.services import audit, explanation, holding
from api.services.audit import Origin
from api.services.delegation import (
    acting,
    assign,
    ensure_admin_left,
    ensure_may_grant,
    lock_role_assignments,
    lock_user,
)
from api.services.explanation import GrantPaths
from api.services.floors import DELETED, end_sessions_of_user, invalidate_user
from api.services.paging import Page, ordered, page_of, seen_by
from api.services.sessions import Sessions
from api.services.token_limits import ensure_user_fits
from api.services.usernames import fold, refuse_deceptive, refuse_reserved, skeleton
from api.shielding import finished

Etags = frozenset[str]


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
SORTS = {"created_at": "created_at", "username": "username_key"}


class UserView(NamedTuple):
    """A user as shown: never with the password's hash."""

    id: UUID
    username: str
    email: str | None
    is_active: bool
    created_at: datetime
    version: int
    updated_at: datetime
    last_login_at: datetime | None
    roles: tuple[str, ...]
    permissions: tuple[str, ...]

    @property
    def etag(self) -> str:
        """What ``If-Match`` is compared with: another once anything but a sign-in changed it."""
        said = repr(tuple(self._replace(last_login_at=None)))
        return hashlib.sha256(said.encode()).hexdigest()[:32]


# Its columns: all but what is held.
SHOWN = [USERS[name] for name in UserView._fields[:-2]]
SHOWN_ONE = select(*SHOWN).where(USERS.id == bindparam("user_id"))


@dataclass(frozen=True, slots=True)
class UserFilter:
    """Which users, in which order: ``sort`` is a name of ``SORTS``, ``-`` before it reverses."""

    q: str | None = None
    role: str | None = None
    active: bool | None = None
    sort: str = "created_at"


class Users:
    """What operators do with users. Each change is one transaction, with its audit row.

    The actor must hold all permissions of a user whose password, status, address or existence they
    change.

    ``match`` holds etags: ``PreconditionFailed`` where the user is not as it was when one of them
    was read.
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
        needed: Iterable[str] = ("users:write",),
        checked: bool = True,
        is_active: bool = True,
        may_be_reserved: bool = False,
    ) -> UserView:
        """Make an account. Raises ``WeakPassword``, ``UsernameTaken``, ``ValidationFailed``.

        The actor must hold what is ``needed``, and the roles given but for ``user``.
        ``checked=False`` lets a weak password by: the demo accounts have well-known ones.
        ``may_be_reserved`` lets a name such as ``support`` by, for operators to give.
        """
        refuse_deceptive(username)
        if not may_be_reserved:
            refuse_reserved(username)
        if checked:
            await self._passwords.refuse_weak(password, username)
        hashed = await self._passwords.hash(password)
        user = User(
            username=username,
            username_key=fold(username),
            username_skeleton=skeleton(username),
            email=email,
            password_hash=hashed,
            is_active=is_active,
        )
        async with self._database.write() as session:
            await lock_role_assignments(session)
            own = await acting(session, origin, *needed)
            session.add(user)
            try:
                await session.flush()
            except IntegrityError as error:
                raise UsernameTaken from error
            await assign(session, user.id, role_names, own)
            await ensure_user_fits(session, user.id)
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
        ends = changes.get("is_active") is False or "password" in changes
        count = await self._sessions.count_live(user_id) if ends else 0

        async def work() -> UserView:
            async with self._blocklist.transaction() as tx:
                await self._locked(tx.session, user_id, origin, match)
                await self._raise_version(tx.session, user_id, **values)
                if changes.get("is_active") is False:
                    await ensure_admin_left(tx.session)
                audit.record(
                    tx.session, "user.changed", origin, target=user_id, fields=sorted(changes),
                    sessions=count,
                )  # fmt: skip
                if ends:
                    lifetimes = self._sessions.lifetimes
                    await end_sessions_of_user(tx, user_id, "changed", lifetimes)
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
        count = await self._sessions.count_live(user_id)

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                before = await self._locked(tx.session, user_id, origin, match)
                await tx.session.execute(delete(UserRole).where(UserRole.user_id == user_id))
                await tx.session.execute(delete(User).where(User.id == user_id))
                await ensure_admin_left(tx.session)
                audit.record(
                    tx.session, "user.deleted", origin, target=user_id,
                    username=before.username, sessions=count,
                )  # fmt: skip
                await end_sessions_of_user(tx, user_id, DELETED, self._sessions.lifetimes)

        try:
            await finished(work())
        except NotFound:
            # it was deleted before, and that request may have had no answer
            await self._blocklist.publish_again([(USER_ENDED, str(user_id))])
            raise

    async def set_roles(
        self,
        user_id: UUID,
        names: Sequence[str],
        origin: Origin,
        match: Etags | None = None,
    ) -> UserView:
        """Give exactly these roles; tokens that say otherwise are stale from now on."""

        async def work() -> UserView:
            async with self._blocklist.transaction() as tx:
                await lock_role_assignments(tx.session)
                await lock_user(tx.session, user_id)
                own = await acting(tx.session, origin, "roles:assign")
                before = await _matching(tx.session, user_id, match)
                if not await assign(tx.session, user_id, names, own):
                    tx.confirm((USER, str(user_id)))
                    return before
                await ensure_user_fits(tx.session, user_id)
                await self._raise_version(tx.session, user_id)
                await ensure_admin_left(tx.session)
                audit.record(
                    tx.session, "user.roles", origin, target=user_id, roles=sorted(set(names))
                )
                await invalidate_user(tx, user_id, self._sessions.lifetimes)
                return await _view(tx.session, user_id)

        return await finished(work())

    async def _locked(
        self, session: AsyncSession, user_id: UUID, origin: Origin, match: Etags | None
    ) -> UserView:
        """Return a user whom nobody else changes now, and whom the actor may change."""
        await lock_role_assignments(session)
        await lock_user(session, user_id)
        own = await acting(session, origin, "users:write")
        found = await _matching(session, user_id, match)
        # one's own account too: a client app or a scope may bind what one holds just now
        ensure_may_grant(own, holding.Holding((), found.permissions))
        return found

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

    async def grant_paths(self, user_id: UUID, permission: str) -> GrantPaths:
        """Return how a user comes to hold a permission; no path where they do not."""
        async with self._database.read() as session:
            return await explanation.grant_paths(session, user_id, permission)

    async def find(self, username: str) -> UserView:
        """Return the user of that name, in whatever case. Raises ``NotFound``."""
        user = await self.by_key(fold(username))
        if user is None:
            raise NotFound(f"There is no user {username!r}.")
        return await self.get(user.id)

    async def page(self, which: UserFilter, limit: int, cursor: str | None) -> Page[UserView]:
        """Return one page of users, by keyset: the thousandth costs what the first costs."""
        name = SORTS[which.sort.removeprefix("-")]
        seen = seen_by(cursor, which, (USERS[name], USERS.id))
        values = {**_asked(which), **seen}
        query = _page(which.sort, frozenset(values))

        def work(db: Executor) -> tuple[Sequence[Row[Any]], dict[str | None, holding.Holding]]:
            users = db.execute(query, {**values, "limit": limit + 1}).all()
            return users, holding.holdings(db, {user[-1] for user in users})

        users, held = await self._database.look(work)
        return page_of(
            users,
            limit,
            scope=which,
            key=lambda user: (getattr(user, name), user.id),
            present=lambda user: view(user, held[user[-1]]),
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


async def _matching(session: AsyncSession, user_id: UUID, match: Etags | None) -> UserView:
    """Return a user, locked already. Raises ``NotFound``, ``PreconditionFailed``."""
    found = await _view(session, user_id)
    if match is not None and found.etag not in match:
        raise PreconditionFailed
    return found


async def _view(session: AsyncSession, user_id: UUID, within: UUID | None = None) -> UserView:
    user = (await session.execute(SHOWN_ONE, {"user_id": user_id})).one_or_none()
    if user is None:
        raise NotFound
    return view(user, await holding.holding(session, user_id, within))


def view(user: Row[Any], held: holding.Holding) -> UserView:
    """Return a user as shown, from a row that begins with the columns that are."""
    # by their places: by its names a row costs thrice as much
    return UserView._make((*user[: len(SHOWN)], held.roles, held.permissions))


def _asked(which: UserFilter) -> dict[str, Any]:
    """Return the values of the statement of ``_page`` for a filter."""
    asked: dict[str, Any] = {}
    if which.q:
        asked |= {"key": _escaped(fold(which.q)), "text": _escaped(which.q)}
    if which.active is not None:
        asked["active"] = which.active
    if which.role is not None:
        asked["role"] = which.role
    return asked


def _escaped(text: str) -> str:
    """Return a text that LIKE takes by the letter."""
    return re.sub(r"([/%_])", r"/\1", text)


@functools.cache
def _page(sort: str, asked: frozenset[str]) -> Select[Any]:
    """Select users, and as the last column what ``holding.given_to`` says of them.

    ``asked`` are the names of the values to come.
    """
    name, reverse = SORTS[sort.removeprefix("-")], sort.startswith("-")
    query: Any = select(*SHOWN, USERS.username_key).limit(bindparam("limit"))
    if "key" in asked:
        query = query.where(
            USERS.username_key.contains(bindparam("key"), escape="/")
            | USERS.email.icontains(bindparam("text"), escape="/")
        )
    if "active" in asked:
        query = query.where(USERS.is_active == bindparam("active"))
    if "role" in asked:
        query = query.where(USERS.id.in_(holding.who_hold(bindparam("role"))))
    begun = "seen_id" in asked
    order = (USERS[name], USERS.id)
    page = ordered(query, order, reverse=reverse, begun=begun).subquery("page")
    # of those who are on the page only, whatever the database sorts
    shown = select(page, holding.given_to(page.c.id))
    return ordered(shown, (page.c[name], page.c.id), reverse=reverse)
