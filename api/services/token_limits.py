"""No access token may be too long for a cookie: refuse what would make one so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, Select, String, cast, exists, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from api.auth.claims import LARGEST_COOKIE, cookie_bytes
from api.db.models import Client, ClientRole, Role, RoleInclude, User, UserRole
from api.errors import ValidationFailed
from api.services import holding
from api.services.holding import Holding

# In UTF-8, as a token has it: 64 characters of four bytes.
LONGEST_USERNAME = "x" * 256


async def ensure_user_fits(session: AsyncSession, user_id: UUID) -> None:
    """Raise ``ValidationFailed`` if the user's access token would be too long."""
    held = await holding.holding(session, user_id)
    username = await session.scalar(select(User.username).where(User.id == user_id)) or ""
    if not _fits(held, username):
        raise _refusal("roles", "Together they do not fit in a token.")


async def ensure_client_fits(session: AsyncSession, client_id: UUID) -> None:
    """Raise ``ValidationFailed`` if the client app's own access token would be too long."""
    held = await holding.client(session, client_id)
    audiences = await session.scalar(select(Client.audiences).where(Client.id == client_id)) or ()
    if not _fits(held, "", audiences):
        raise _refusal("allowed_roles", "Together they do not fit in a token.")


async def ensure_holders_fit(session: AsyncSession, role_id: UUID, before: Holding) -> None:
    """Raise ``ValidationFailed`` if the role has grown too long for anybody who holds it.

    ``before`` is what it came to: one that has lost what it lost and gained nothing fits.
    """
    after = await holding.role_holding(session, [role_id])
    grew = set(after.roles) - set(before.roles) or set(after.permissions) - set(before.permissions)
    if not grew or _fits(await holding.role_holding(session, None), LONGEST_USERNAME):
        # not even all roles together are too long
        return
    reaching = list(await session.scalars(_reaching(role_id)))
    await _ensure_clients_fit(session, reaching)
    beside = await session.scalars(_held_beside(reaching))
    if _fits(await holding.role_holding(session, [*reaching, *beside]), LONGEST_USERNAME):
        return
    given = (await session.scalars(_sets_of_holders(reaching))).all()
    _ensure_all_fit(await _comes_to(session, given))


async def _ensure_clients_fit(session: AsyncSession, reaching: Sequence[UUID]) -> None:
    """Measure the own tokens of client apps that are allowed one of the roles."""
    theirs = select(ClientRole.client_id).where(ClientRole.role_id.in_(reaching))
    query = select(_ids(ClientRole.role_id)).where(ClientRole.client_id.in_(theirs))
    given = await session.scalars(query.group_by(ClientRole.client_id).distinct())
    _ensure_all_fit(await _comes_to(session, given.all()))


async def _comes_to(session: AsyncSession, given: Iterable[str | None]) -> Iterable[Holding]:
    def work(db: Session) -> Iterable[Holding]:
        return holding.holdings(db, given).values()

    return await session.run_sync(work)


def _ensure_all_fit(held: Iterable[Holding]) -> None:
    if not all(_fits(one, LONGEST_USERNAME) for one in held):
        raise _refusal("permissions", "The token of somebody who holds this role would not fit.")


def _fits(held: Holding, username: str, audiences: Sequence[str] = ()) -> bool:
    size = cookie_bytes(username, held.roles, held.permissions, audiences=audiences)
    return size <= LARGEST_COOKIE


def _reaching(role_id: UUID) -> Select[UUID]:
    """Select the roles that hold a role: itself, and those that include it."""
    up = select(Role.id).where(Role.id == role_id).cte("up", recursive=True)
    up = up.union(select(RoleInclude.role_id).join(up, RoleInclude.included_id == up.c.id))
    return select(up.c.id)


def _held_beside(roles: Sequence[UUID]) -> Select[UUID]:
    """Select the roles that somebody was given beside one of ``roles``."""
    mine, other = aliased(UserRole), aliased(UserRole)
    return select(Role.id).where(
        exists()
        .where(other.role_id == Role.id)
        .where(mine.user_id == other.user_id, mine.role_id.in_(roles))
    )


def _sets_of_holders(roles: Sequence[UUID]) -> Select[str]:
    """Select each set of roles that holders of one of ``roles`` were given, as ids in one text."""
    holders = select(UserRole.user_id).where(UserRole.role_id.in_(roles))
    query = select(_ids(UserRole.role_id)).where(UserRole.user_id.in_(holders))
    return query.group_by(UserRole.user_id).distinct()


def _ids(column: InstrumentedAttribute[UUID]) -> ColumnElement[str]:
    return func.aggregate_strings(cast(column, String), ",")


def _refusal(field: str, message: str) -> ValidationFailed:
    return ValidationFailed(errors=[{"field": field, "message": message}])
