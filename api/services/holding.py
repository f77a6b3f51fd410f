"""What users hold: roles and permissions flattened through ``includes``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, String, bindparam, case, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.claims import LARGEST_COOKIE, cookie_bytes, permitted
from api.db import Executor, sequence
from api.db.models import ClientRole, Role, RoleInclude, RolePermission, User, UserRole, table_of
from api.errors import InvalidScope, TokenRevoked

ADMIN, USER = "admin", "user"
EVERYTHING = "*"
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
# None of a role that was deleted: only what it includes is held.
NAME = case((ROLES.deleted_at.is_(None), ROLES.name)).label("name")


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
    query = select(held.c.user_id, NAME, PERMISSIONS.permission).select_from(joined)
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
    """Select a user with what they hold; a row even of who holds nothing.

    One statement sees one moment: the sequence is no later than what is held.
    """
    held = all_held(ONE, within=within).subquery()
    return (
        select(
            USERS.username,
            USERS.version,
            sequence.CURRENT.scalar_subquery().label("seq"),
            held.c.name,
            held.c.permission,
        )
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
    return select(cte.c.given, NAME, PERMISSIONS.permission).select_from(joined)


# By whether it is within a client app.
ONE = GIVEN.user_id == bindparam("user_id")
HELD = {within: all_held(ONE, within=within) for within in (False, True)}
BEARER = {within: _bearer(within=within) for within in (False, True)}
COMES_TO = _comes_to()


@dataclass(frozen=True, slots=True)
class Bearer:
    """What tokens say of a user; ``seq`` is the authorization sequence as it was then."""

    username: str
    version: int
    seq: int
    holding: Holding


def bearer(db: Executor, user_id: UUID, within: UUID | None = None) -> Bearer:
    """Return what the tokens of a user say, ``within`` a client app or altogether, in one query.

    Raises ``TokenRevoked`` where there is no such user any more.
    """
    asked = {"user_id": user_id} | ({"client_id": within} if within else {})
    rows = db.execute(BEARER[within is not None], asked).all()
    if not rows:
        raise TokenRevoked
    held = gathered((row.name, row.permission) for row in rows)
    return Bearer(rows[0].username, rows[0].version, rows[0].seq, held)


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
    return cut(held, scope, is_user=is_user)


def refuse_long_scope(
    username: str, held: Holding, scope: Sequence[str], audiences: Sequence[str]
) -> None:
    """Raise ``InvalidScope`` if the token that ``scope`` narrowed to ``held`` would be too long."""
    size = cookie_bytes(username, held.roles, held.permissions, scope=scope, audiences=audiences)
    if size > LARGEST_COOKIE:
        raise InvalidScope("The scope does not fit in a token; ask for fewer permissions.")


def cut(held: Holding, scope: Sequence[str], *, is_user: bool) -> Holding:
    """Return what is left of ``held`` in a token for ``scope``, whatever more that asks for."""
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


async def role_holding(session: AsyncSession, role_ids: Sequence[UUID] | None) -> Holding:
    """Return what some roles come to together, their own names included; None for all roles."""
    given = select(Role.id)
    if role_ids is not None:
        given = given.where(Role.id.in_(role_ids))
    held = given.cte("held", recursive=True)
    held = held.union(select(RoleInclude.included_id).join(held, RoleInclude.role_id == held.c.id))
    rows = await session.execute(
        select(NAME, RolePermission.permission)
        .select_from(Role)
        .join(held, held.c.id == Role.id)
        .outerjoin(RolePermission, RolePermission.role_id == Role.id)
    )
    return gathered((name, permission) for name, permission in rows)
