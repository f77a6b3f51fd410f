"""Roles and permissions: what a user holds, flattened through ``includes``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Row, Select, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.claims import LARGEST_COOKIE, cookie_bytes
from api.db import Database
from api.db.models import Role, RoleInclude, RolePermission, User, UserRole
from api.errors import LastAdmin, ValidationFailed

ADMIN, USER = "admin", "user"
BUILT_IN = {
    ADMIN: ("Everything, everywhere.", ("*",)),
    USER: ("Somebody who may sign in.", ()),
}


@dataclass(frozen=True, slots=True)
class Holding:
    """The roles and permissions that a user holds, directly or through another role; sorted."""

    roles: tuple[str, ...]
    permissions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoleView:
    """A role as it is shown."""

    name: str
    description: str
    permissions: tuple[str, ...]
    includes: tuple[str, ...]


class Roles:
    """Reads of roles for the CLI and the admin API."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[RoleView]:
        """Return every role by name."""
        async with self._database.read() as session:
            roles = list(await session.scalars(select(Role).order_by(Role.name)))
            permissions = await session.execute(
                select(RolePermission.role_id, RolePermission.permission)
            )
            includes = await session.execute(
                select(RoleInclude.role_id, Role.name).join(
                    Role, Role.id == RoleInclude.included_id
                )
            )
        held, included = _grouped(permissions), _grouped(includes)
        return [
            RoleView(r.name, r.description, held.get(r.id, ()), included.get(r.id, ()))
            for r in roles
        ]


async def ensure_built_in(session: AsyncSession) -> None:
    """Make the roles that Rolecall itself speaks of, where they are missing."""
    present = set(await session.scalars(select(Role.name).where(Role.name.in_(BUILT_IN))))
    for name, (description, permissions) in BUILT_IN.items():
        if name not in present:
            role = Role(name=name, description=description)
            session.add(role)
            await session.flush()
            session.add_all(RolePermission(role_id=role.id, permission=p) for p in permissions)
    await session.flush()


async def holdings(session: AsyncSession, user_ids: Sequence[UUID]) -> dict[UUID, Holding]:
    """Return what each of ``user_ids`` holds, in one query."""
    held = (
        select(UserRole.user_id, UserRole.role_id)
        .where(UserRole.user_id.in_(user_ids))
        .cte("held", recursive=True)
    )
    held = held.union(
        select(held.c.user_id, RoleInclude.included_id).join(
            RoleInclude, RoleInclude.role_id == held.c.role_id
        )
    )
    rows = await session.execute(
        select(held.c.user_id, Role.name, RolePermission.permission)
        .join(Role, Role.id == held.c.role_id)
        .outerjoin(RolePermission, RolePermission.role_id == Role.id)
    )
    roles: dict[UUID, set[str]] = {}
    permissions: dict[UUID, set[str]] = {}
    for user_id, name, permission in rows:
        roles.setdefault(user_id, set()).add(name)
        permissions.setdefault(user_id, set()).update([permission] if permission else [])
    return {
        user_id: Holding(
            tuple(sorted(roles.get(user_id, ()))), tuple(sorted(permissions.get(user_id, ())))
        )
        for user_id in user_ids
    }


async def holding(session: AsyncSession, user_id: UUID) -> Holding:
    """Return what one user holds."""
    return (await holdings(session, [user_id]))[user_id]


async def assign(session: AsyncSession, user_id: UUID, names: Iterable[str]) -> None:
    """Give a user exactly the roles named. Raises ``ValidationFailed`` for unknown ones."""
    wanted = set(names)
    found = await session.execute(select(Role.name, Role.id).where(Role.name.in_(wanted)))
    known = {row.name: row.id for row in found}
    unknown = sorted(wanted - known.keys())
    if unknown:
        raise ValidationFailed(
            errors=[
                {"field": "roles", "message": f"There is no role {name!r}."} for name in unknown
            ]
        )
    await session.execute(delete(UserRole).where(UserRole.user_id == user_id))
    session.add_all(UserRole(user_id=user_id, role_id=role_id) for role_id in known.values())
    await session.flush()
    await refuse_too_many(session, user_id)


async def refuse_too_many(session: AsyncSession, user_id: UUID) -> None:
    """Raise ``ValidationFailed`` if the user's access token would not fit in a cookie."""
    held = await holding(session, user_id)
    username = await session.scalar(select(User.username).where(User.id == user_id)) or ""
    if cookie_bytes(username, held.roles, held.permissions) > LARGEST_COOKIE:
        raise ValidationFailed(
            errors=[{"field": "roles", "message": "Together they do not fit in a token."}]
        )


async def refuse_without_admin(session: AsyncSession) -> None:
    """Raise ``LastAdmin`` if this transaction would leave no active administrator.

    Locks the role's row first, so that two demotions at once cannot each spare the other's.
    """
    await session.execute(select(Role.id).where(Role.name == ADMIN).with_for_update(key_share=True))
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


def _grouped(pairs: Iterable[Row[UUID, str]]) -> dict[UUID, tuple[str, ...]]:
    grouped: dict[UUID, list[str]] = {}
    for key, value in pairs:
        grouped.setdefault(key, []).append(value)
    return {key: tuple(sorted(values)) for key, values in grouped.items()}
