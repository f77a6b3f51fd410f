"""Roles: their permissions, and the roles that they include."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.blocklist import Blocklist, RevokingTransaction
from api.db import Database
from api.db.models import Client, ClientRole, Role, RoleInclude, RolePermission, User, UserRole
from api.errors import Conflict, NotFound, RoleExists, ValidationFailed
from api.services import audit
from api.services.audit import Origin
from api.services.floors import raise_floors, users_through
from api.services.holding import (
    ADMIN,
    EVERYTHING,
    USER,
    Holding,
    beyond,
    held_by,
    one_change_at_a_time,
    refuse_beyond,
    refuse_too_many,
    refuse_without_admin,
    role_holding,
)
from api.services.lifetimes import Lifetimes
from api.services.paging import Page, after, page_of
from api.shielding import finished

BUILT_IN = {
    ADMIN: ("Everything, everywhere.", (EVERYTHING,)),
    USER: ("Somebody who may sign in.", ()),
}
SCOPE = "roles"
ROLES: Any = select(Role.id, Role.name, Role.description)
# A change of a role measures the tokens of this many holders, those with the most roles.
MEASURED = 200
# Whoever holds the role is written to, which may be everybody.
LONG_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class RoleView:
    """A role as it is shown."""

    name: str
    description: str
    permissions: tuple[str, ...]
    includes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Holders:
    """The users and the client apps that hold a role."""

    users: list[UUID]
    clients: list[UUID]


class Roles:
    """Reads and changes roles. Each change is one transaction, and bites on the next request."""

    def __init__(self, database: Database, blocklist: Blocklist, lifetimes: Lifetimes) -> None:
        self._database = database
        self._blocklist = blocklist
        self._lifetimes = lifetimes

    async def page(self, limit: int, cursor: str | None) -> Page[RoleView]:
        """Return one page of the roles, by name."""
        query = after(ROLES, (Role.name,), cursor, scope=SCOPE, reverse=False)
        async with self._database.read() as session:
            found = await _views(session, query.limit(limit + 1))
        return page_of(
            found, limit, scope=SCOPE, key=lambda role: (role.name,), present=lambda role: role
        )

    async def get(self, name: str) -> RoleView:
        """Return one role. Raises ``NotFound``."""
        async with self._database.read() as session:
            return await _view(session, name)

    async def create(self, wanted: RoleView, origin: Origin) -> RoleView:
        """Make a role. Raises ``RoleExists``, ``ValidationFailed``, ``InsufficientPermission``."""
        async with self._database.write() as session:
            await one_change_at_a_time(session)
            role = Role(name=wanted.name, description=wanted.description)
            session.add(role)
            try:
                await session.flush()
            except IntegrityError as error:
                raise RoleExists from error
            await self._fill(
                session, role.id, wanted.name, wanted.permissions, wanted.includes, origin
            )
            audit.record(session, "role.created", origin, target=wanted.name, **_said(wanted))
            return await _view(session, wanted.name)

    async def change(self, name: str, changes: dict[str, Any], origin: Origin) -> RoleView:
        """Change ``description``, ``permissions`` or ``includes``; holders' tokens become stale."""

        async def work() -> RoleView:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                role_id = await _locked(tx.session, name)
                before = await _view(tx.session, name)
                if "description" in changes:
                    await tx.session.execute(
                        update(Role)
                        .where(Role.id == role_id)
                        .values(description=changes["description"])
                    )
                if {"permissions", "includes"} & changes.keys():
                    if name == ADMIN:
                        raise Conflict("The role admin holds everything, and stays so.")
                    permissions = changes.get("permissions", before.permissions)
                    includes = changes.get("includes", before.includes)
                    await self._fill(tx.session, role_id, name, permissions, includes, origin)
                    await refuse_without_admin(tx.session)
                    holders = await _holders(tx.session, role_id)
                    await _refuse_large(tx.session, holders.users)
                    await self._raise_floors(tx, holders)
                audit.record(
                    tx.session, "role.changed", origin, target=name, fields=sorted(changes)
                )
                return await _view(tx.session, name)

        return await finished(work())

    async def delete(self, name: str, reassign_to: str | None, origin: Origin) -> None:
        """Delete a role; its users get ``reassign_to``. ``Conflict`` while it is assigned."""
        if name in BUILT_IN:
            raise Conflict("Rolecall itself speaks of this role: it cannot be deleted.")
        if name == reassign_to:
            raise ValidationFailed(
                errors=[{"field": "reassign_to", "message": "Must be another role."}]
            )

        async def work() -> None:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                role_id = await _locked(tx.session, name)
                holders = await _holders(tx.session, role_id)
                if reassign_to is not None:
                    await self._reassign(tx.session, role_id, reassign_to, origin)
                await self._refuse_assigned(tx.session, role_id)
                for table in (RoleInclude, RolePermission, ClientRole):
                    await tx.session.execute(delete(table).where(table.role_id == role_id))
                await tx.session.execute(
                    delete(RoleInclude).where(RoleInclude.included_id == role_id)
                )
                await tx.session.execute(delete(Role).where(Role.id == role_id))
                await refuse_without_admin(tx.session)
                await _refuse_large(tx.session, holders.users)
                await self._raise_floors(tx, holders)
                audit.record(
                    tx.session, "role.deleted", origin, target=name, reassigned_to=reassign_to
                )

        await finished(work())

    async def _raise_floors(self, tx: RevokingTransaction, holders: Holders) -> None:
        # a user who came through a client may hold less for it, though they hold the role not
        through = await users_through(tx.session, holders.clients)
        users = list(dict.fromkeys([*holders.users, *through]))
        await raise_floors(tx, User, users, self._lifetimes)
        await raise_floors(tx, Client, holders.clients, self._lifetimes)

    async def _refuse_assigned(self, session: AsyncSession, role_id: UUID) -> None:
        count = await session.scalar(
            select(func.count()).select_from(UserRole).where(UserRole.role_id == role_id)
        )
        if count:
            raise Conflict(f"{count} users have this role: give another with ?reassign_to=.")

    async def _reassign(
        self, session: AsyncSession, role_id: UUID, name: str, origin: Origin
    ) -> None:
        found = await session.scalar(select(Role.id).where(Role.name == name))
        if found is None:
            raise ValidationFailed(
                errors=[{"field": "reassign_to", "message": f"There is no role {name!r}."}]
            )
        refuse_beyond(await held_by(session, origin), await role_holding(session, [found]))
        upsert = postgresql.insert if self._database.dialect == "postgresql" else sqlite.insert
        theirs = select(UserRole.user_id, _literal(found)).where(UserRole.role_id == role_id)
        await session.execute(
            upsert(UserRole).from_select(["user_id", "role_id"], theirs).on_conflict_do_nothing()
        )
        await session.execute(delete(UserRole).where(UserRole.role_id == role_id))

    async def _fill(
        self,
        session: AsyncSession,
        role_id: UUID,
        name: str,
        permissions: Sequence[str],
        includes: Sequence[str],
        origin: Origin,
    ) -> None:
        """Make a role hold exactly these; whoever asks must hold what is added."""
        own, before = await held_by(session, origin), await role_holding(session, [role_id])
        found = await session.execute(select(Role.name, Role.id).where(Role.name.in_(includes)))
        ids = {row.name: row.id for row in found}
        faults = [f"There is no role {name!r}." for name in sorted(set(includes) - ids.keys())]
        if await _reaches(session, list(ids.values()), role_id):
            faults.append("A role cannot include itself, not even through another.")
        if faults:
            raise ValidationFailed(errors=[{"field": "includes", "message": m} for m in faults])
        for table in (RolePermission, RoleInclude):
            await session.execute(delete(table).where(table.role_id == role_id))
        rows = [{"role_id": role_id, "permission": p} for p in sorted(set(permissions))]
        if rows:
            await session.execute(insert(RolePermission), rows)
        rows = [{"role_id": role_id, "included_id": i} for i in ids.values()]
        if rows:
            await session.execute(insert(RoleInclude), rows)
        after = await role_holding(session, [role_id])
        # its own name is nobody's yet
        refuse_beyond(own, beyond(after, Holding((*before.roles, name), before.permissions)))


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


async def _locked(session: AsyncSession, name: str) -> UUID:
    await one_change_at_a_time(session)
    role_id = await session.scalar(select(Role.id).where(Role.name == name))
    if role_id is None:
        raise NotFound(f"There is no role {name!r}.")
    return role_id


async def _reaches(session: AsyncSession, start: Sequence[UUID], goal: UUID) -> bool:
    """Return whether ``goal`` is among ``start`` or what they include."""
    seen = select(Role.id).where(Role.id.in_(start)).cte("seen", recursive=True)
    seen = seen.union(select(RoleInclude.included_id).join(seen, RoleInclude.role_id == seen.c.id))
    found = await session.scalar(select(seen.c.id).where(seen.c.id == goal))
    return found is not None


async def _holders(session: AsyncSession, role_id: UUID) -> Holders:
    """Return who holds a role, itself or through another."""
    up = select(Role.id).where(Role.id == role_id).cte("up", recursive=True)
    up = up.union(select(RoleInclude.role_id).join(up, RoleInclude.included_id == up.c.id))
    found: list[list[UUID]] = []
    for whose in (UserRole.user_id, ClientRole.client_id):
        role = whose.class_.role_id
        query = select(whose).where(role.in_(select(up.c.id))).distinct()
        found.append(list(await session.scalars(query)))
    return Holders(*found)


async def _refuse_large(session: AsyncSession, holders: Sequence[UUID]) -> None:
    most = await session.execute(
        select(UserRole.user_id)
        .where(UserRole.user_id.in_(holders[:30_000]))
        .group_by(UserRole.user_id)
        .order_by(func.count().desc())
        .limit(MEASURED)
    )
    for (user_id,) in most.all():
        await refuse_too_many(session, user_id)


async def _view(session: AsyncSession, name: str) -> RoleView:
    found = await _views(session, ROLES.where(Role.name == name))
    if not found:
        raise NotFound(f"There is no role {name!r}.")
    return found[0]


async def _views(session: AsyncSession, query: Any) -> list[RoleView]:
    roles = (await session.execute(query)).all()
    ids = [role.id for role in roles]
    permissions = await session.execute(
        select(RolePermission.role_id, RolePermission.permission).where(
            RolePermission.role_id.in_(ids)
        )
    )
    held = _grouped(permissions.all())
    includes = await session.execute(
        select(RoleInclude.role_id, Role.name)
        .join(Role, Role.id == RoleInclude.included_id)
        .where(RoleInclude.role_id.in_(ids))
    )
    included = _grouped(includes.all())
    return [
        RoleView(r.name, r.description, held.get(r.id, ()), included.get(r.id, ())) for r in roles
    ]


def _said(role: RoleView) -> dict[str, Any]:
    return {"permissions": list(role.permissions), "includes": list(role.includes)}


def _literal(value: UUID) -> Any:
    return literal(value, UserRole.role_id.type)


def _grouped(pairs: Iterable[Row[UUID, str]]) -> dict[UUID, tuple[str, ...]]:
    grouped: dict[UUID, list[str]] = {}
    for key, value in pairs:
        grouped.setdefault(key, []).append(value)
    return {key: tuple(sorted(values)) for key, values in grouped.items()}
