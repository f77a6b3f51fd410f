"""Refusing many tokens by one row: those whose rights have changed, those whose session has ended.

Each function advances the authorization sequence: call it last, with the rows of the users or the
client apps that it concerns locked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import update

from api.blocklist import RevokingTransaction
from api.blocklist.ledger import CLIENT, CLIENT_ENDED, NARROWED, ROLE, SCOPE, USER, USER_ENDED
from api.db.models import CleanupTask, Client, Session, User
from api.services.lifetimes import Lifetimes, floor_until

USER_SESSIONS, CLIENT_SESSIONS = "user_sessions", "client_sessions"
DELETED = "deleted"


async def invalidate_user(tx: RevokingTransaction, user_id: UUID, lifetimes: Lifetimes) -> None:
    """Make the access tokens of a user stale."""
    await tx.raise_floor(USER, user_id, floor_until(lifetimes))


async def invalidate_client(tx: RevokingTransaction, client_id: UUID, lifetimes: Lifetimes) -> None:
    """Make the access tokens of a client app, and of its users, stale."""
    await tx.raise_floor(CLIENT, client_id, floor_until(lifetimes))


async def invalidate_roles(
    tx: RevokingTransaction, names: Iterable[str], lifetimes: Lifetimes
) -> None:
    """Make the access tokens stale that carry one of the roles.

    A token that a scope has narrowed carries permissions of roles without their names: all of
    those are stale.
    """
    until = floor_until(lifetimes)
    for name in sorted(names):
        await tx.raise_floor(ROLE, name, until)
    await tx.raise_floor(SCOPE, NARROWED, until)


async def end_sessions_of_user(
    tx: RevokingTransaction,
    user_id: UUID,
    reason: str,
    lifetimes: Lifetimes,
    *,
    keep: UUID | None = None,
) -> None:
    """End every session of a user that is open now, but for ``keep``."""
    seq = await tx.raise_floor(USER_ENDED, user_id, floor_until(lifetimes), exempt=keep)
    await _execute(tx, update(User).where(User.id == user_id).values(ended_below=seq))
    if keep is not None:
        await _execute(tx, update(Session).where(Session.id == keep).values(opened_seq=seq))
    _clean_up(tx, USER_SESSIONS, user_id, seq, reason)


async def end_sessions_of_client(
    tx: RevokingTransaction, client_id: UUID, reason: str, lifetimes: Lifetimes
) -> None:
    """End every session that was opened through a client app, and its own tokens."""
    seq = await tx.raise_floor(CLIENT_ENDED, client_id, floor_until(lifetimes))
    await _execute(tx, update(Client).where(Client.id == client_id).values(ended_below=seq))
    _clean_up(tx, CLIENT_SESSIONS, client_id, seq, reason)


def _clean_up(tx: RevokingTransaction, kind: str, subject: UUID, seq: int, reason: str) -> None:
    tx.session.add(CleanupTask(kind=kind, subject=subject, seq=seq, reason=reason))


async def _execute(tx: RevokingTransaction, statement: Any) -> None:
    await tx.session.execute(statement.execution_options(synchronize_session=False))
