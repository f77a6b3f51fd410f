"""What client apps do: prove who they are, and be granted tokens of their own (RFC 6749)."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from api.auth.claims import is_id
from api.auth.client_secrets import ClientSecrets
from api.auth.throttle import LoginThrottle
from api.db import Database, db_now, sequence
from api.db.models import Client, ClientSecret
from api.errors import BadCredentials, InvalidClient, InvalidToken
from api.services import audit, holding
from api.services.audit import Origin
from api.services.audit_rate import RepeatedEvents
from api.services.client_terms import CLIENT_CREDENTIALS, ClientTerms, no_such_client
from api.services.holding import Holding


@dataclass(frozen=True, slots=True)
class AuthenticatedClient:
    """A client that is active and proved who it is; a public one only said so."""

    id: UUID
    is_public: bool
    terms: ClientTerms


@dataclass(frozen=True, slots=True)
class ClientGrant:
    """What a client's own access token is made from."""

    terms: ClientTerms
    version: int
    seq: int
    holding: Holding


class ClientAccess:
    """Wrong secrets are throttled; a right one always gets in, being too long to be guessed."""

    def __init__(
        self,
        database: Database,
        secrets: ClientSecrets,
        throttle: LoginThrottle,
        repeated_events: RepeatedEvents,
    ) -> None:
        self._database = database
        self._secrets = secrets
        self._throttle = throttle
        self._repeated_events = repeated_events

    async def authenticate(
        self, client_id: str, secret: str | None, origin: Origin
    ) -> AuthenticatedClient:
        """Return the client. Raises ``InvalidClient``, or ``TooManyRequests`` after many."""
        client, sealed = await self._known(client_id)
        if client is not None and client.is_active and self._is_right(client, sealed, secret):
            return AuthenticatedClient(client.id, client.is_public, _terms(client))
        await self._note_failure(client_id, client, origin)
        raise InvalidClient

    async def authenticate_at_login(
        self, client_id: str, secret: str | None, origin: Origin
    ) -> UUID:
        """Return the id of the client that a user signs in through.

        Raises ``ValidationFailed`` where there is no such active client, ``BadCredentials`` where
        it does not authenticate, ``TooManyRequests`` after many such attempts.
        """
        client, sealed = await self._known(client_id)
        if client is None or not client.is_active:
            raise no_such_client()
        if not self._is_right(client, sealed, secret):
            await self._note_failure(client_id, client, origin)
            raise BadCredentials("The client's secret is missing or wrong. A public one has none.")
        return client.id

    async def refuse_refresh(self, client_id: UUID) -> None:
        """Raise ``InvalidToken`` where sessions of a client are refreshed by the client itself.

        A confidential client authenticates for that (RFC 6749 section 6).
        """
        confidential = select(Client.id).where(Client.id == client_id, ~Client.is_public)
        async with self._database.read() as session:
            if await session.scalar(confidential) is not None:
                raise InvalidToken(
                    "Refresh this session at /oauth/token, with the client's credentials."
                )

    async def grant(
        self, client: AuthenticatedClient, scope: tuple[str, ...] | None, origin: Origin
    ) -> ClientGrant:
        """Grant ``client_credentials``, by what the client may just now.

        Raises ``InvalidScope``, ``InvalidClient``, ``UnauthorizedClient``. ``origin`` has the
        client as its actor.
        """
        async with self._database.read() as session:
            # before anything that the token will say: what changes later makes it stale
            seq = await session.run_sync(sequence.current)
            now = await session.get(Client, client.id)
            if now is None or not now.is_active:
                raise InvalidClient
            bound, version = _terms(now), now.version
            bound.ensure_grant(CLIENT_CREDENTIALS)
            allowed = await holding.client(session, client.id)
            held = holding.narrowed(allowed, scope, is_user=False)
            if scope is not None:
                holding.refuse_long_scope("", held, scope, bound.audiences)
        await self._repeated_events.note(
            "token.issued", origin, target=client.id, scope=" ".join(held.permissions)
        )
        return ClientGrant(bound, version, seq, held)

    def _is_right(self, client: Client, sealed: list[bytes], secret: str | None) -> bool:
        if client.is_public:
            return secret is None
        return any(self._secrets.matches(one, secret or "") for one in sealed)

    async def _note_failure(self, client_id: str, client: Client | None, origin: Origin) -> None:
        # only what was wrong takes a place, and keeps it
        async with self._throttle.attempt(client_id, origin.ip):
            pass
        await audit.note(
            self._database, "client.refused", origin, target=client.id if client else None
        )

    async def _known(self, client_id: str) -> tuple[Client | None, list[bytes]]:
        # in another spelling it is nobody's: each would have a count of wrong secrets of its own
        if not is_id(client_id):
            return None, []
        good = ClientSecret.expires_at.is_(None) | (ClientSecret.expires_at > db_now())
        async with self._database.read() as session:
            rows = await session.execute(
                select(Client, ClientSecret.sealed)
                .outerjoin(ClientSecret, (ClientSecret.client_id == Client.id) & good)
                .where(Client.id == UUID(client_id))
            )
            found = rows.all()
        client = found[0][0] if found else None
        return client, [sealed for _, sealed in found if sealed is not None]


def _terms(client: Client) -> ClientTerms:
    return ClientTerms(
        client.id, tuple(client.audiences), client.access_token_expires, tuple(client.grants)
    )
