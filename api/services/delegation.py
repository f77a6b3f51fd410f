"""Who may change what others hold, decided in the transaction that changes it.

A request may wait: for a hash, a lock, a slow database. Meanwhile whoever made it may have been
disabled, demoted or logged out. So every change asks ``acting`` again, behind the lock that such
changes take.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import Select, delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.claims import permitted
from api.blocklist.ledger import JTI
from api.db.models import Client, Revocation, Role, RoleInclude, Session, User, UserRole
from api.errors import InsufficientPermission, LastAdmin, TokenRevoked, ValidationFailed
from api.services import holding
from api.services.audit import SYSTEM, Origin
from api.services.holding import ADMIN, EVERYTHING, USER, Holding
from api.services.liveness import live

ALL = Holding((), (EVERYTHING,))
NONE = Holding((), ())


async def lock_role_assignments(session: AsyncSession) -> None:
    """Lock the row of the role ``admin``: first of all in whatever changes what others may do.

    What such a change looks at (who acts, holders, circles, the last admin) cannot change under
    it, and no two of them wait for each other's rows.
    """
    await session.execute(select(Role.id).where(Role.name == ADMIN).with_for_update(key_share=True))


async def lock_user(session: AsyncSession, user_id: UUID) -> bool:
    """Lock the row of a user, so that nobody else changes it; return whether there is one."""
    query = select(User.id).where(User.id == user_id).with_for_update()
    return await session.scalar(query) is not None


async def acting(session: AsyncSession, origin: Origin, *needed: str) -> Holding:
    """Return what the actor holds, by the database and not by their token; the system all.

    What their token was bound to (a client app, a scope) binds them here too. Ask behind
    ``lock_role_assignments``, and before anything is changed: it may be their own roles that are.
    Raises ``TokenRevoked`` where they may not act any more, ``InsufficientPermission`` where they
    lack one of ``needed``.
    """
    if origin.actor == SYSTEM.actor:
        return ALL
    held = await _held_by(session, origin) if origin.actor is not None else NONE
    lacking = [one for one in needed if not permitted(held.permissions, one)]
    if lacking:
        raise InsufficientPermission(f"You do not hold {', '.join(lacking)}.")
    return held


async def ensure_active(session: AsyncSession, origin: Origin) -> None:
    """Raise ``TokenRevoked`` where the actor is disabled, logged out or no more.

    Their rows are locked, so that this stays so until the caller's transaction ends.
    """
    if origin.actor == SYSTEM.actor:
        return
    actor = UUID(origin.actor) if origin.actor else None
    token = (Revocation.kind == JTI) & (Revocation.subject == origin.jti)
    looks: list[Select[Any]] = [select(User.id).where(User.id == actor)]
    if actor is not None and origin.client_id == origin.actor:
        lives = Client.is_active & (Client.ended_below <= origin.opened_seq)
        looks = [select(Client.id).where(Client.id == actor, lives)]
    elif origin.sid is not None:
        # a live session asks for an active user, and an active client app
        sid = UUID(origin.sid)
        if origin.client_id is not None:
            looks.append(select(Client.id).where(Client.id == UUID(origin.client_id)))
        looks.append(select(Session.id).where(Session.id == sid, Session.user_id == actor, *live()))
    else:
        raise TokenRevoked
    for look in looks:
        if await session.scalar(look.with_for_update(read=True)) is None:
            raise TokenRevoked
    if await session.scalar(select(Revocation.kind).where(token)) is not None:
        raise TokenRevoked


async def _held_by(session: AsyncSession, origin: Origin) -> Holding:
    await ensure_active(session, origin)
    actor = UUID(origin.actor or "")
    is_user = origin.client_id != origin.actor
    if is_user:
        within = UUID(origin.client_id) if origin.client_id else None
        held = await holding.holding(session, actor, within=within)
    else:
        held = await holding.client(session, actor)
    return held if origin.scope is None else holding.cut(held, origin.scope, is_user=is_user)


def ensure_may_grant(own: Holding, wanted: Holding) -> None:
    """Raise ``InsufficientPermission`` unless ``own`` has all of ``wanted``.

    The name of the role ``user``, which everybody may hold, is not asked for.
    """
    if EVERYTHING in own.permissions:
        return
    lacking = set(wanted.roles) - set(own.roles) - {USER}
    lacking |= {p for p in wanted.permissions if not permitted(own.permissions, p)}
    if lacking:
        listed = ", ".join(sorted(lacking))
        raise InsufficientPermission(f"You may not give or take what you do not hold: {listed}.")


async def role_ids(session: AsyncSession, names: Iterable[str], field: str) -> dict[str, UUID]:
    """Return the ids of roles by their names. Raises ``ValidationFailed`` on ``field``."""
    wanted = set(names)
    found = await session.execute(
        select(Role.name, Role.id).where(Role.name.in_(wanted), Role.deleted_at.is_(None))
    )
    known = {row.name: row.id for row in found}
    unknown = sorted(wanted - known.keys())
    if unknown:
        raise ValidationFailed(
            errors=[{"field": field, "message": f"There is no role {name!r}."} for name in unknown]
        )
    return known


async def assign(session: AsyncSession, user_id: UUID, names: Iterable[str], own: Holding) -> bool:
    """Give a user exactly the roles named; return whether that changed anything.

    The actor must hold the name and all permissions of each role that is given or taken, but
    for ``user``. Raises ``ValidationFailed`` for unknown ones, ``InsufficientPermission``.
    """
    known = await role_ids(session, names, "roles")
    wanted = set(known.values())
    query = select(UserRole.role_id, Role.name).join(Role, Role.id == UserRole.role_id)
    rows = (await session.execute(query.where(UserRole.user_id == user_id))).all()
    had = {row.role_id for row in rows}
    exempt = {row.role_id for row in rows if row.name == USER} | {known.get(USER)}
    changed = wanted ^ had
    ensure_may_grant(own, await holding.role_holding(session, list(changed - exempt)))
    if not changed:
        return False
    taken = UserRole.role_id.in_(had - wanted)
    await session.execute(delete(UserRole).where(UserRole.user_id == user_id, taken))
    session.add_all(UserRole(user_id=user_id, role_id=role_id) for role_id in wanted - had)
    await session.flush()
    return True


async def ensure_admin_left(session: AsyncSession) -> None:
    """Raise ``LastAdmin`` if this transaction would leave no active administrator."""
    if not await has_active_admin(session):
        raise LastAdmin


async def has_active_admin(session: AsyncSession) -> bool:
    """Return whether an active user holds ``admin``, itself or through another role."""
    admin = select(Role.id).where(Role.name == ADMIN)
    holding_it = admin.cte("holding_admin", recursive=True)
    holding_it = holding_it.union(
        select(RoleInclude.role_id).join(holding_it, RoleInclude.included_id == holding_it.c.id)
    )
    # first the few roles, so that no plan reads all assignments
    roles = (await session.scalars(select(holding_it.c.id))).all()
    holder = select(User.id).join(UserRole, UserRole.user_id == User.id)
    holder = holder.where(UserRole.role_id.in_(roles), User.is_active)
    return await session.scalar(holder.limit(1)) is not None
