"""What a client app's tokens are bound by, for whoever makes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from api.db import Executor
from api.db.models import Client
from api.errors import UnauthorizedClient, ValidationFailed

CLIENT_CREDENTIALS, REFRESH_TOKEN = "client_credentials", "refresh_token"


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """``audiences``: the service's own where empty. ``access_token_expires`` is seconds.

    ``grants`` are what it may ask for at /oauth/token.
    """

    client_id: UUID
    audiences: tuple[str, ...]
    access_token_expires: int | None
    grants: tuple[str, ...]

    def ensure_grant(self, grant_type: str) -> None:
        """Raise ``UnauthorizedClient`` where the client may not use a grant."""
        if grant_type not in self.grants:
            raise UnauthorizedClient


def terms(db: Executor, client_id: UUID, *, unchanged: bool = False) -> ClientTerms | None:
    """Return the terms of an active client, else None, in the caller's transaction.

    ``unchanged``: nobody changes the client until this transaction ends.
    """
    query = select(Client.audiences, Client.access_token_expires, Client.grants)
    query = query.where(Client.id == client_id, Client.is_active)
    if unchanged:
        query = query.with_for_update(read=True)
    row = db.execute(query).one_or_none()
    return row and ClientTerms(
        client_id, tuple(row.audiences), row.access_token_expires, tuple(row.grants)
    )


def no_such_client() -> ValidationFailed:
    """Return what a sign-in through a client that is unknown or disabled is answered."""
    return ValidationFailed(errors=[{"field": "client_id", "message": "There is no such client."}])
