"""Roles: their permissions, and the roles that they include."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.blocklist import Blocklist, RevokingTransaction
from api.blocklist.ledger import ROLE, SCOPE
from api.db import Database, db_now
from api.db.models import (
    DELETED_NAME,
    CleanupTask,
    ClientRole,
    Role,
    RoleInclude,
    RolePermission,
    UserRole,
)
from api.errors import Conflict, NotFound, RoleExists, ValidationFailed
from api.services import audit, cleanup
from api.services.audit import Origin
from api.services.changes import differing
from api.services.delegation import (
    acting,
    ensure_admin_left,
    ensure_may_grant,
    lock_role_assignments,
    role_ids,
)
from api.services.floors import invalidate_roles
from api.services.holding import ADMIN, EVERYTHING, USER, Holding, role_holding
from api.services.lifetimes import Lifetimes
from api.services.paging import Page, after, page_of
from api.services.token_limits import ensure_holders_fit
from api.shielding import finished

BUILT_IN = {
    ADMIN: ("Everything, everywhere.", (EVERYTHING,)),
    USER: ("Somebody who may sign in.", ()),
}
LIST = "roles"
ROLES: Any = select(Role.id, Role.name, Role.description).where(Role.deleted_at.is_(None))
# The kinds of all floors that a change of a role raises: of that role, of what it included, and of
# tokens that a scope narrowed. Which those were is not known any more when it is asked for again.
OF_ROLES = (ROLE, SCOPE)
# What it takes to change roles.
WRITE = "roles:write"


@dataclass(frozen=True, slots=True)
class RoleView:
    """A role as it is shown."""

    name: str
    description: str
    permissions: tuple[str, ...]
    includes: tuple[str, ...]


class Roles:
    """Reads and changes roles. Each change is one transaction, and holds from the next request."""

    def __init__(self, database: Database, blocklist: Blocklist, lifetimes: Lifetimes) -> None:
        self._database = database
        self._blocklist = blocklist
        self._lifetimes = lifetimes

    async def page(self, limit: int, cursor: str | None) -> Page[RoleView]:
        """Return one page of the roles, by name."""
        query = after(ROLES, (Role.name,), cursor, scope=LIST, reverse=False)
        async with self._database.read() as session:
            found = await _views(session, query.limit(limit + 1))
        return page_of(
            found, limit, scope=LIST, key=lambda role: (role.name,), present=lambda role: role
        )

    async def get(self, name: str) -> RoleView:
        """Return one role. Raises ``NotFound``."""
        async with self._database.read() as session:
            return await _view(session, name)

    async def create(self, wanted: RoleView, origin: Origin) -> RoleView:
        """Make a role. Raises ``RoleExists``, ``ValidationFailed``, ``InsufficientPermission``."""
        async with self._database.write() as session:
            await lock_role_assignments(session)
            own = await acting(session, origin, WRITE)
            role = Role(name=wanted.name, description=wanted.description)
            session.add(role)
            try:
                await session.flush()
            except IntegrityError as error:
                raise RoleExists from error
            await _fill(session, role.id, wanted.permissions, wanted.includes)
            after = await role_holding(session, [role.id])
            # nobody holds the new role yet
            ensure_may_grant(own, _without(after, wanted.name))
            audit.record(session, "role.created", origin, target=wanted.name, **_said(wanted))
            return await _view(session, wanted.name)

    async def change(self, name: str, changes: dict[str, Any], origin: Origin) -> RoleView:
        """Change ``description``, ``permissions`` or ``includes``; holders' tokens become stale.

        The actor must hold all permissions that the role gives before and after, and the name
        of each role that it includes no more, or from now on.
        """

        async def work() -> RoleView:
            async with self._blocklist.transaction() as tx:
                role_id = await _locked(tx.session, name)
                own = await acting(tx.session, origin, WRITE)
                view = await _view(tx.session, name)
                before = await role_holding(tx.session, [role_id])
                ensure_may_grant(own, Holding((), before.permissions))
                changed = differing(view, changes)
                if changes.keys() - changed:
                    # made before, by a request that may have had no answer
                    tx.confirm(kinds=OF_ROLES)
                if not changed:
                    return view
                if "description" in changed:
                    await tx.session.execute(
                        update(Role)
                        .where(Role.id == role_id)
                        .values(description=changes["description"])
                    )
                audit.record(
                    tx.session, "role.changed", origin, target=name, fields=sorted(changed)
                )
                if {"permissions", "includes"} & changed:
                    await self._refill(tx, role_id, view, changes, own, before)
                return await _view(tx.session, name)

        return await finished(work())

    async def _refill(
        self,
        tx: RevokingTransaction,
        role_id: UUID,
        view: RoleView,
        changes: dict[str, Any],
        own: Holding,
        before: Holding,
    ) -> None:
        """Make a role hold other permissions and roles; tokens that carry it are stale then."""
        if view.name == ADMIN:
            raise Conflict("The role admin cannot be changed.")
        permissions = changes.get("permissions", view.permissions)
        includes = changes.get("includes", view.includes)
        await _fill(tx.session, role_id, permissions, includes)
        after = await role_holding(tx.session, [role_id])
        other_names = tuple(set(before.roles) ^ set(after.roles))
        ensure_may_grant(own, Holding(other_names, after.permissions))
        await ensure_admin_left(tx.session)
        await ensure_holders_fit(tx.session, role_id, before)
        # a token that came through a client app may carry what was included and not the role
        lost = set(before.roles) - set(after.roles)
        await invalidate_roles(tx, {view.name} | lost, self._lifetimes)

    async def delete(self, name: str, reassign_to: str | None, origin: Origin) -> None:
        """Delete a role; its users hold ``reassign_to`` in its place from now on.

        ``Conflict`` while it is assigned and there is none. The actor must hold the role and
        the other one, by their names and all their permissions.
        """
        if name in BUILT_IN:
            raise Conflict("Rolecall itself speaks of this role: it cannot be deleted.")
        if name == reassign_to:
            raise ValidationFailed(
                errors=[{"field": "reassign_to", "message": "Must be another role."}]
            )

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                role_id = await _locked(tx.session, name)
                own = await acting(tx.session, origin, WRITE)
                before = await role_holding(tx.session, [role_id])
                ensure_may_grant(own, before)
                await _detach(tx.session, role_id)
                if reassign_to is not None:
                    await self._reassign(tx.session, role_id, reassign_to, own, before)
                elif await _is_assigned(tx.session, role_id):
                    raise Conflict("The role is assigned: pass `reassign_to`, a role in its place.")
                await tx.session.execute(
                    update(Role)
                    .where(Role.id == role_id)
                    # another role may have the name at once
                    .values(name=f"{DELETED_NAME}{role_id}", deleted_at=db_now())
                )
                await ensure_admin_left(tx.session)
                audit.record(
                    tx.session, "role.deleted", origin, target=name, reassigned_to=reassign_to
                )
                tx.session.add(CleanupTask(kind=cleanup.ROLE, subject=role_id))
                # those who held it through another role, or a client app, hold nothing in its place
                await invalidate_roles(tx, before.roles, self._lifetimes)

        try:
            await finished(work())
        except NotFound:
            # it was deleted before, and that request may have had no answer
            await self._blocklist.publish_again(kinds=OF_ROLES)
            raise

    async def _reassign(
        self, session: AsyncSession, role_id: UUID, name: str, own: Holding, before: Holding
    ) -> None:
        """Let the holders of a role that is deleted hold another one, by including it."""
        other = (await role_ids(session, [name], "reassign_to"))[name]
        ensure_may_grant(own, await role_holding(session, [other]))
        if await _reaches(session, [other], role_id):
            raise ValidationFailed(
                errors=[{"field": "reassign_to", "message": "Includes the role that is deleted."}]
            )
        await session.execute(insert(RoleInclude), [{"role_id": role_id, "included_id": other}])
        # roles that were replaced by this one, and whose users are not moved yet
        former = await session.scalars(
            update(RoleInclude)
            .where(RoleInclude.included_id == role_id, RoleInclude.role_id.in_(_deleted()))
            .values(included_id=other)
            .returning(RoleInclude.role_id)
            .execution_options(synchronize_session=False)
        )
        for replaced in (role_id, *former.all()):
            await ensure_holders_fit(session, replaced, before)


async def _detach(session: AsyncSession, role_id: UUID) -> None:
    """Take from a role what it holds, and the role from client apps and the roles that include it.

    But not from roles that were deleted: whoever has one of those is a holder of this one.
    """
    for table in (RoleInclude, RolePermission, ClientRole):
        await session.execute(delete(table).where(table.role_id == role_id))
    included = (RoleInclude.included_id == role_id) & RoleInclude.role_id.not_in(_deleted())
    await session.execute(delete(RoleInclude).where(included))


def _deleted() -> Select[UUID]:
    return select(Role.id).where(Role.deleted_at.is_not(None))


async def _is_assigned(session: AsyncSession, role_id: UUID) -> bool:
    """Return whether a user has a role, or one that was deleted and is held as this one."""
    # first the few roles, so that no plan reads all assignments
    replaced = select(RoleInclude.role_id).where(RoleInclude.included_id == role_id)
    roles = [role_id, *await session.scalars(replaced)]
    given = select(UserRole.user_id).where(UserRole.role_id.in_(roles)).limit(1)
    return await session.scalar(given) is not None


async def _fill(
    session: AsyncSession, role_id: UUID, permissions: Sequence[str], includes: Sequence[str]
) -> None:
    """Make a role hold exactly these. Raises ``ValidationFailed``."""
    found = await session.execute(
        select(Role.name, Role.id).where(Role.name.in_(includes), Role.deleted_at.is_(None))
    )
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


def _without(held: Holding, name: str) -> Holding:
    return Holding(tuple(one for one in held.roles if one != name), held.permissions)


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
    await lock_role_assignments(session)
    role_id = await session.scalar(
        select(Role.id).where(Role.name == name, Role.deleted_at.is_(None))
    )
    if role_id is None:
        raise NotFound(f"There is no role {name!r}.")
    return role_id


async def _reaches(session: AsyncSession, start: Sequence[UUID], goal: UUID) -> bool:
    """Return whether ``goal`` is among ``start`` or what they include."""
    seen = select(Role.id).where(Role.id.in_(start)).cte("seen", recursive=True)
    seen = seen.union(select(RoleInclude.included_id).join(seen, RoleInclude.role_id == seen.c.id))
    found = await session.scalar(select(seen.c.id).where(seen.c.id == goal))
    return found is not None


async def _view(session: AsyncSession, name: str) -> RoleView:
    found = await _views(session, ROLES.where(Role.name == name))
    if not found:
        raise NotFound(f"There is no role {name!r}.")
    return found[0]


async def _views(session: AsyncSession, query: Any) -> list[RoleView]:
    roles = (await session.execute(query)).all()
    ids = [role.id for role in roles]
    held = await _texts(session, RolePermission.role_id, RolePermission.permission, ids)
    included = await _texts(session, RoleInclude.role_id, Role.name, ids)
    return [
        RoleView(r.name, r.description, held.get(r.id, ()), included.get(r.id, ())) for r in roles
    ]


async def _texts(
    session: AsyncSession, role_id: Any, text: Any, ids: Sequence[UUID]
) -> dict[UUID, tuple[str, ...]]:
    """Return the permissions, or the names of what is included, of roles by their ids; sorted.

    One row a role: a page of roles may hold fifty thousand permissions.
    """
    # no permission and no name holds a comma
    query = select(role_id, func.aggregate_strings(text, ",")).where(role_id.in_(ids))
    if text is Role.name:
        query = query.join(Role, Role.id == RoleInclude.included_id)
    rows = await session.execute(query.group_by(role_id))
    return {row[0]: tuple(sorted(row[1].split(","))) for row in rows}


def _said(role: RoleView) -> dict[str, Any]:
    return {"permissions": list(role.permissions), "includes": list(role.includes)}
