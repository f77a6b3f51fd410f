"""Floors: from which version on the access tokens of a user, or of a client app, are good."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.blocklist import RevokingTransaction
from api.db import db_now
from api.db.models import Client, Session, User
from api.services.lifetimes import Lifetimes, floor_until

# Rows in one statement.
AT_ONCE = 500


async def raise_floors(
    tx: RevokingTransaction,
    whose: type[User] | type[Client],
    ids: Sequence[UUID],
    lifetimes: Lifetimes,
) -> None:
    """Call the access tokens of many users, or of many clients themselves, stale."""
    until = floor_until(lifetimes)
    for start in range(0, len(ids), AT_ONCE):
        rows = await tx.session.execute(
            update(whose)
            .where(whose.id.in_(ids[start : start + AT_ONCE]))
            .values(version=whose.version + 1)
            .returning(whose.id, whose.version)
            .execution_options(synchronize_session=False)
        )
        await tx.raise_floors({row.id: row.version for row in rows}, until)


async def users_through(session: AsyncSession, client_ids: Sequence[UUID]) -> list[UUID]:
    """Return the users who have a live session through any of the clients."""
    live = (Session.revoked_at.is_(None), Session.idle_expires_at > db_now())
    query = select(Session.user_id).where(Session.client_id.in_(client_ids), *live)
    return list(await session.scalars(query.distinct()))
