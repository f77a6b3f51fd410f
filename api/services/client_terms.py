"""What a client app's tokens are bound by, for whoever makes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from api.db import Executor
from api.db.models import Client
from api.errors import ValidationFailed


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """``audiences``: the service's own where empty. ``access_token_expires`` is seconds."""

    client_id: UUID
    audiences: tuple[str, ...]
    access_token_expires: int | None


def terms(db: Executor, client_id: UUID, *, unchanged: bool = False) -> ClientTerms | None:
    """Return the terms of an active client, else None, in the caller's transaction.

    ``unchanged``: nobody changes the client until this transaction ends.
    """
    query = select(Client.audiences, Client.access_token_expires)
    query = query.where(Client.id == client_id, Client.is_active)
    if unchanged:
        query = query.with_for_update(read=True)
    row = db.execute(query).one_or_none()
    return row and ClientTerms(client_id, tuple(row.audiences), row.access_token_expires)


def no_such_client() -> ValidationFailed:
    """Return what a sign-in through a client that is unknown or disabled is answered."""
    return ValidationFailed(errors=[{"field": "client_id", "message": "There is no such client."}])
