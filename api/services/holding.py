"""What users hold: roles and permissions flattened through ``includes``, and who may give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, String, bindparam, cast, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.claims import LARGEST_COOKIE, cookie_bytes, permitted
from api.db import Executor
from api.db.models import ClientRole, Role, RoleInclude, RolePermission, User, UserRole, table_of
from api.errors import InsufficientPermission, InvalidScope, LastAdmin, ValidationFailed
from api.services.audit import Origin

ADMIN, USER = "admin", "user"
EVERYTHING = "*"
CONSOLE = "console"
# What every user may do with their own account. Only a scope names these; no role has to.
OWN_ACCOUNT = ("me:read", "me:write")
Held = tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class Holding:
    """The roles and permissions that a user holds, directly or through another role; sorted."""

    roles: tuple[str, ...]
    permissions: tuple[str, ...]


# Made once: building such a statement costs more than running it. Of tables, not of classes:
# rows are all that is wanted.
USERS, ROLES, GIVEN = (table_of(model).c for model in (User, Role, UserRole))
INCLUDES, PERMISSIONS = table_of(RoleInclude).c, table_of(RolePermission).c
ALLOWED = table_of(ClientRole).c


def all_held(whose: ColumnElement[bool], *, within: bool = False) -> Select[Any]:
    """Select (user id, role, permission or None) of users, through every ``includes``.

    ``within``: of the roles only those that the client app ``client_id`` is allowed too.
    """
    held = select(GIVEN.user_id, GIVEN.role_id).where(whose).cte("held", recursive=True)
    held = held.union(
        select(held.c.user_id, INCLUDES.included_id).where(INCLUDES.role_id == held.c.role_id)
    )
    joined = held.join(table_of(Role), ROLES.id == held.c.role_id).outerjoin(
        table_of(RolePermission), PERMISSIONS.role_id == ROLES.id
    )
    query = select(held.c.user_id, ROLES.name, PERMISSIONS.permission).select_from(joined)
    if not within:
        return query
    given = select(ALLOWED.role_id.label("id")).where(ALLOWED.client_id == bindparam("client_id"))
    allowed = given.cte("allowed", recursive=True)
    allowed = allowed.union(select(INCLUDES.included_id).where(INCLUDES.role_id == allowed.c.id))
    return query.where(ROLES.id.in_(select(allowed.c.id)))


def who_hold(role: ColumnElement[str]) -> Select[tuple[UUID]]:
    """Select the ids of users who hold the role of a name, given or through another."""
    cte = select(ROLES.id.label("id")).where(ROLES.name == role).cte("giving", recursive=True)
    cte = cte.union(select(INCLUDES.role_id).where(INCLUDES.included_id == cte.c.id))
    return select(GIVEN.user_id).where(GIVEN.role_id.in_(select(cte.c.id)))


def _bearer(*, within: bool) -> Select[Any]:
    """Select a user with what they hold; a row even of who holds nothing."""
    held = all_held(ONE, within=within).subquery()
    return (
        select(USERS.username, USERS.version, held.c.name, held.c.permission)
        .select_from(table_of(User).outerjoin(held, held.c.user_id == USERS.id))
        .where(USERS.id == bindparam("user_id"))
    )


def _comes_to() -> Select[Any]:
    """Select (id of the role asked about, role, permission or None), through ``includes``."""
    held = select(ROLES.id.label("given"), ROLES.id.label("id")).where(
        ROLES.id.in_(bindparam("role_ids", expanding=True))
    )
    cte = held.cte("held", recursive=True)
    cte = cte.union(select(cte.c.given, INCLUDES.included_id).where(INCLUDES.role_id == cte.c.id))
    joined = cte.join(table_of(Role), ROLES.id == cte.c.id).outerjoin(
        table_of(RolePermission), PERMISSIONS.role_id == ROLES.id
    )
    return select(cte.c.given, ROLES.name, PERMISSIONS.permission).select_from(joined)


# By whether it is within a client app.
ONE = GIVEN.user_id == bindparam("user_id")
HELD = {within: all_held(ONE, within=within) for within in (False, True)}
BEARER = {within: _bearer(within=within) for within in (False, True)}
COMES_TO = _comes_to()


@dataclass(frozen=True, slots=True)
class Bearer:
    """What tokens say of a user."""

    username: str
    version: int
    holding: Holding


def bearer(db: Executor, user_id: UUID, within: UUID | None = None) -> Bearer:
    """Return what the tokens of a user say, ``within`` a client app or altogether, in one query."""
    asked = {"user_id": user_id} | ({"client_id": within} if within else {})
    rows = db.execute(BEARER[within is not None], asked).all()
    held = gathered((name, permission) for _, _, name, permission in rows)
    return Bearer(rows[0].username, rows[0].version, held)


async def holding(session: AsyncSession, user_id: UUID, within: UUID | None = None) -> Holding:
    """Return what one user holds, altogether or ``within`` a client app.

    There only those roles count that the client app is allowed too.
    """
    asked = {"user_id": user_id} | ({"client_id": within} if within else {})
    rows = await session.execute(HELD[within is not None], asked)
    return gathered((name, permission) for _, name, permission in rows)


def given_to(user_id: ColumnElement[UUID]) -> ColumnElement[str | None]:
    """Select the ids of the roles given to a user, in one text, as ``holdings`` takes it."""
    ids = func.aggregate_strings(cast(GIVEN.role_id, String), ",")
    return select(ids).where(GIVEN.user_id == user_id).scalar_subquery()


def holdings(db: Executor, given: Iterable[str | None]) -> dict[str | None, Holding]:
    """Return what each set of roles comes to, in one query: many users have the same ones."""
    sets = {ids: [UUID(one) for one in (ids or "").split(",") if one] for ids in given}
    held: dict[UUID, list[Held]] = {role_id: [] for ids in sets.values() for role_id in ids}
    for role_id, name, permission in db.execute(COMES_TO, {"role_ids": list(held)}):
        held[role_id].append((name, permission))
    return {
        text: gathered(pair for role_id in ids for pair in held[role_id])
        for text, ids in sets.items()
    }


def gathered(rows: Iterable[Held]) -> Holding:
    """Return what (role, permission) pairs come to."""
    names: set[str] = set()
    permissions: set[str] = set()
    for name, permission in rows:
        if name is not None:
            names.add(name)
        if permission is not None:
            permissions.add(permission)
    return Holding(tuple(sorted(names)), tuple(sorted(permissions)))


async def client(session: AsyncSession, client_id: UUID) -> Holding:
    """Return what a client app itself holds: all that it is allowed."""
    allowed = select(ClientRole.role_id).where(ClientRole.client_id == client_id)
    return await role_holding(session, (await session.scalars(allowed)).all())


def narrowed(held: Holding, scope: Sequence[str] | None, *, is_user: bool) -> Holding:
    """Return what is left of ``held`` in a token for ``scope``; everything for None.

    ``held`` is what a user holds, or a client app itself. A role stands for all that it permits:
    no role is left where the scope leaves out a permission. Raises ``InvalidScope`` where
    ``scope`` is not all held.
    """
    if scope is None:
        return held
    if lacking := [p for p in scope if not _is_held(held, p, is_user=is_user)]:
        raise InvalidScope(f"Not held: {' '.join(lacking)}.")
    return _cut(held, scope, is_user=is_user)


def refuse_long_scope(
    username: str, held: Holding, scope: Sequence[str], audiences: Sequence[str]
) -> None:
    """Raise ``InvalidScope`` if the token that ``scope`` narrowed to ``held`` would be too long."""
    size = cookie_bytes(username, held.roles, held.permissions, scope=scope, audiences=audiences)
    if size > LARGEST_COOKIE:
        raise InvalidScope("The scope does not fit in a token; ask for fewer permissions.")


def _cut(held: Holding, scope: Sequence[str], *, is_user: bool) -> Holding:
    everything = (*held.permissions, *OWN_ACCOUNT) if is_user else held.permissions
    whole = all(permitted(scope, p) for p in everything)
    return Holding(
        held.roles if whole else (),
        tuple(sorted(p for p in scope if _is_held(held, p, is_user=is_user))),
    )


def _is_held(held: Holding, permission: str, *, is_user: bool) -> bool:
    if permission.startswith("me:"):
        # a client app has no account of its own, whatever its roles permit
        if not is_user:
            return False
        if permission in {*OWN_ACCOUNT, "me:*"}:
            return True
    return permitted(held.permissions, permission)


async def role_ids(session: AsyncSession, names: Iterable[str], field: str) -> list[UUID]:
    """Return the ids of the roles named. Raises ``ValidationFailed`` on ``field``."""
    wanted = set(names)
    found = await session.execute(select(Role.name, Role.id).where(Role.name.in_(wanted)))
    known = {row.name: row.id for row in found}
    unknown = sorted(wanted - known.keys())
    if unknown:
        raise ValidationFailed(
            errors=[{"field": field, "message": f"There is no role {name!r}."} for name in unknown]
        )
    return list(known.values())


async def assign(
    session: AsyncSession, user_id: UUID, names: Iterable[str], origin: Origin
) -> None:
    """Give a user exactly the roles named; whoever asks must hold what the user gains.

    Raises ``ValidationFailed`` for unknown ones, ``InsufficientPermission``.
    """
    ids = await role_ids(session, names, "roles")
    own, before = await held_by(session, origin), await holding(session, user_id)
    await session.execute(delete(UserRole).where(UserRole.user_id == user_id))
    session.add_all(UserRole(user_id=user_id, role_id=role_id) for role_id in ids)
    await session.flush()
    after = await holding(session, user_id)
    refuse_beyond(own, beyond(after, before))
    await refuse_too_many(session, user_id)


async def refuse_too_many(session: AsyncSession, user_id: UUID) -> None:
    """Raise ``ValidationFailed`` if the user's access token would not fit in a cookie."""
    held = await holding(session, user_id)
    username = await session.scalar(select(User.username).where(User.id == user_id)) or ""
    if cookie_bytes(username, held.roles, held.permissions) > LARGEST_COOKIE:
        raise ValidationFailed(
            errors=[{"field": "roles", "message": "Together they do not fit in a token."}]
        )


async def one_change_at_a_time(session: AsyncSession) -> None:
    """Lock the row of the role ``admin``: first of all in whatever changes who holds what.

    What such a change looks at (holders, circles, the last admin) cannot change under it, and
    no two of them wait for each other's rows.
    """
    await session.execute(select(Role.id).where(Role.name == ADMIN).with_for_update(key_share=True))


async def refuse_without_admin(session: AsyncSession) -> None:
    """Raise ``LastAdmin`` if this transaction would leave no active administrator."""
    if not await session.scalar(select(func.count()).select_from(active_admins().subquery())):
        raise LastAdmin


def active_admins() -> Select[UUID]:
    """Select the ids of active users who hold ``admin`` itself or through another role."""
    admin = select(Role.id).where(Role.name == ADMIN)
    holders = admin.cte("admin_holders", recursive=True)
    holders = holders.union(
        select(RoleInclude.role_id).join(holders, RoleInclude.included_id == holders.c.id)
    )
    return (
        select(User.id)
        .join(UserRole, UserRole.user_id == User.id)
        .where(User.is_active, UserRole.role_id.in_(select(holders.c.id)))
        .distinct()
    )


async def role_holding(session: AsyncSession, role_ids: Sequence[UUID]) -> Holding:
    """Return what some roles come to together, their own names included."""
    held = select(Role.id).where(Role.id.in_(role_ids)).cte("held", recursive=True)
    held = held.union(select(RoleInclude.included_id).join(held, RoleInclude.role_id == held.c.id))
    rows = await session.execute(
        select(Role.name, RolePermission.permission)
        .join(held, held.c.id == Role.id)
        .outerjoin(RolePermission, RolePermission.role_id == Role.id)
    )
    return gathered((name, permission) for name, permission in rows)


async def held_by(session: AsyncSession, origin: Origin) -> Holding:
    """Return what whoever asks holds, by the database and not by their token; the console all.

    What their token was bound to (a client app, a scope) binds them here too. Ask before anything
    is changed: it may be their own roles that are.
    """
    if origin.actor is None or origin.actor == CONSOLE:
        return Holding((), (EVERYTHING,))
    try:
        actor = UUID(origin.actor)
    except ValueError:
        return Holding((), ())
    if origin.client_id is None:
        return await holding(session, actor)
    is_user = origin.client_id != origin.actor
    if is_user:
        held = await holding(session, actor, within=UUID(origin.client_id))
    else:
        held = await client(session, actor)
    return held if origin.scope is None else _cut(held, origin.scope, is_user=is_user)


def refuse_beyond(own: Holding, wanted: Holding) -> None:
    """Raise ``InsufficientPermission`` unless ``own`` has all of ``wanted``."""
    if EVERYTHING in own.permissions:
        return
    lacking = set(wanted.roles) - set(own.roles)
    lacking |= {p for p in wanted.permissions if not permitted(own.permissions, p)}
    if lacking:
        listed = ", ".join(sorted(lacking))
        raise InsufficientPermission(f"Nobody gives or takes over what they do not hold: {listed}.")


def beyond(wanted: Holding, held: Holding) -> Holding:
    """Return what ``wanted`` has and ``held`` has not."""
    return Holding(
        tuple(sorted(set(wanted.roles) - set(held.roles))),
        tuple(sorted(set(wanted.permissions) - set(held.permissions))),
    )
