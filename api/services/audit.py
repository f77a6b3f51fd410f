"""Audit rows: written in the transaction of what they tell of, so that neither goes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database, write_last
from api.db.models import AuditEvent, table_of

INSERT = insert(table_of(AuditEvent))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from; ``actor`` is the id of who made it, None before signing in.

    ``client_id`` is the client app that the token was issued to (``actor`` itself where it speaks
    of that), ``scope`` the permissions that it was narrowed to: both bound what ``actor`` holds.
    ``sid``, ``jti`` and ``opened_seq`` are the token's.
    """

    ip: str | None = None
    request_id: str | None = None
    user_agent: str | None = None
    actor: str | None = None
    client_id: str | None = None
    scope: tuple[str, ...] | None = None
    sid: str | None = None
    jti: str | None = None
    opened_seq: int = 0


# The command line and the bootstrap: nobody's token, and no permission is asked for.
SYSTEM = Origin(actor="console")


async def note(database: Database, action: str, origin: Origin, **detail: Any) -> None:
    """Write a row of its own, for what changed nothing."""
    written = row(action, origin, **detail)
    await database.run(lambda db: db.execute(INSERT, written))


def record(session: AsyncSession, action: str, origin: Origin, **said: Any) -> None:
    """Add a row to the caller's transaction: ``said`` is as ``row`` takes it."""
    write_last(session, INSERT, row(action, origin, **said))


def row(
    action: str,
    origin: Origin,
    *,
    target: UUID | str | None = None,
    actor: UUID | str | None = None,
    **detail: Any,
) -> dict[str, Any]:
    """Return a row, for ``INSERT``. ``detail`` never holds a secret.

    Its id is made when it is written, so that ids sort as ``at`` does after a long transaction too.
    """
    doer = actor if actor is not None else origin.actor
    if origin.client_id is not None and origin.client_id != origin.actor:
        detail["client_id"] = origin.client_id
    return {
        "action": action,
        "actor": str(doer) if doer is not None else None,
        "target": str(target) if target is not None else None,
        "ip": origin.ip,
        "request_id": origin.request_id,
        "detail": detail,
    }
