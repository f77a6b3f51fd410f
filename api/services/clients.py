"""Client apps, as operators keep them: registered, changed, given another secret, deleted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidTag
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.client_secrets import ClientSecrets
from api.blocklist import Blocklist
from api.blocklist.ledger import CLIENT, CLIENT_ENDED
from api.db import Database, db_now
from api.db.models import Client, ClientRole, ClientSecret, Role
from api.errors import Conflict, NotFound, ValidationFailed
from api.services import audit, holding
from api.services.audit import Origin
from api.services.changes import differing
from api.services.client_terms import CLIENT_CREDENTIALS
from api.services.delegation import acting, ensure_may_grant, lock_role_assignments, role_ids
from api.services.floors import DELETED, end_sessions_of_client, invalidate_client
from api.services.holding import Holding
from api.services.paging import Page, after, page_of
from api.services.sessions import Sessions
from api.services.token_limits import ensure_client_fits
from api.shielding import finished

# How long the former secret is good after another one was made.
OVERLAP_SECONDS = 86_400
# What it takes to change client apps.
WRITE = "clients:write"
PLAIN = ("name", "audiences", "grants", "access_token_expires", "is_active")
# What a token of a client's was made by: where any of it changes, the token is stale.
BINDING = {"allowed_roles", "audiences", "grants", "access_token_expires", "is_active"}
SCOPE = "clients"


@dataclass(frozen=True, slots=True)
class ClientView:
    """A client as shown: never with a secret."""

    client_id: UUID
    name: str
    allowed_roles: tuple[str, ...]
    audiences: tuple[str, ...]
    grants: tuple[str, ...]
    public: bool
    access_token_expires: int | None
    is_active: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class NewSecret:
    """A secret, this once in the clear; the one before is good until ``previous_expires_at``."""

    client_id: UUID
    client_secret: str
    previous_expires_at: datetime | None


class Clients:
    """What operators do with client apps. Each change is one transaction, with its audit row.

    Nobody lets a client hold what they do not hold themselves, nor changes one that does.
    """

    def __init__(
        self, database: Database, blocklist: Blocklist, sessions: Sessions, secrets: ClientSecrets
    ) -> None:
        self._database = database
        self._blocklist = blocklist
        self._sessions = sessions
        self._secrets = secrets

    async def page(self, limit: int, cursor: str | None) -> Page[ClientView]:
        """Return one page of clients, the oldest first."""
        query = after(select(Client), (Client.id,), cursor, scope=SCOPE, reverse=False)
        async with self._database.read() as session:
            rows = (await session.scalars(query.limit(limit + 1))).all()
            roles = await _allowed(session, [row.id for row in rows])
        return page_of(
            rows,
            limit,
            scope=SCOPE,
            key=lambda row: (row.id,),
            present=lambda row: _shown(row, roles.get(row.id, ())),
        )

    async def get(self, client_id: UUID) -> ClientView:
        """Return one client. Raises ``NotFound``."""
        async with self._database.read() as session:
            return await _view(session, client_id)

    async def create(self, wanted: dict[str, Any], origin: Origin) -> tuple[ClientView, str | None]:
        """Register a client; return it and, unless it is public, its secret.

        ``wanted`` has ``name``, ``allowed_roles``, ``audiences``, ``grants``, ``public`` and
        ``access_token_expires``. Raises ``ValidationFailed``, ``InsufficientPermission``.
        """
        public = wanted["public"]
        _refuse_grants(public, wanted["grants"])
        secret = None
        async with self._database.write() as session:
            await lock_role_assignments(session)
            own = await acting(session, origin, WRITE)
            client = Client(
                name=wanted["name"],
                audiences=_once(wanted["audiences"]),
                grants=_once(wanted["grants"]),
                access_token_expires=wanted["access_token_expires"],
                is_public=public,
            )
            session.add(client)
            await session.flush()
            await _allow(session, client.id, wanted["allowed_roles"], own)
            if not public:
                secret, sealed = self._secrets.make()
                session.add(ClientSecret(client_id=client.id, sealed=sealed))
            audit.record(
                session, "client.created", origin, target=client.id, name=client.name,
                roles=sorted(set(wanted["allowed_roles"])), public=public,
            )  # fmt: skip
            await session.flush()
            return await _view(session, client.id), secret

    async def change(self, client_id: UUID, changes: dict[str, Any], origin: Origin) -> ClientView:
        """Change what ``create`` was given, or ``is_active``.

        The client's own tokens and those of its users become stale, unless nothing that binds them
        was changed. Sessions that were opened through it live on, with what it is allowed from now
        on; where it is disabled, they end.
        """

        async def work() -> ClientView:
            async with self._blocklist.transaction() as tx:
                own = await _lock(tx.session, client_id, origin)
                before = await _changeable(tx.session, client_id, own)
                _refuse_grants(before.public, changes.get("grants", ()))
                changed = differing(before, changes)
                if changes.get("is_active") is False:
                    # again, for all that was opened since
                    changed.add("is_active")
                if changes.keys() - changed:
                    # made before, by a request that may have had no answer
                    tx.confirm((CLIENT, str(client_id)), (CLIENT_ENDED, str(client_id)))
                if not changed:
                    return before
                values = {name: changes[name] for name in PLAIN if name in changed}
                for name in {"audiences", "grants"} & values.keys():
                    values[name] = _once(values[name])
                if BINDING & changed:
                    values["version"] = Client.version + 1
                await _update(tx.session, client_id, values)
                if "allowed_roles" in changed:
                    await _allow(tx.session, client_id, changes["allowed_roles"], own)
                await ensure_client_fits(tx.session, client_id)
                audit.record(
                    tx.session, "client.changed", origin, target=client_id, fields=sorted(changed)
                )
                lifetimes = self._sessions.lifetimes
                if changes.get("is_active") is False:
                    await end_sessions_of_client(tx, client_id, "client_disabled", lifetimes)
                elif BINDING & changed:
                    await invalidate_client(tx, client_id, lifetimes)
                return await _view(tx.session, client_id)

        return await finished(work())

    async def delete(self, client_id: UUID, origin: Origin) -> None:
        """Delete a client; its tokens and the sessions through it end."""

        async def work() -> None:
            async with self._blocklist.transaction() as tx:
                own = await _lock(tx.session, client_id, origin)
                before = await _changeable(tx.session, client_id, own)
                await tx.session.execute(delete(Client).where(Client.id == client_id))
                audit.record(
                    tx.session, "client.deleted", origin, target=client_id, name=before.name
                )
                await end_sessions_of_client(tx, client_id, DELETED, self._sessions.lifetimes)

        try:
            await finished(work())
        except NotFound:
            # it was deleted before, and that request may have had no answer
            await self._blocklist.publish_again([(CLIENT_ENDED, str(client_id))])
            raise

    async def replace_secret(
        self, client_id: UUID, origin: Origin, *, revoke_previous: bool = False
    ) -> NewSecret:
        """Make another secret; the newest before it is good for ``OVERLAP_SECONDS`` still.

        With ``revoke_previous`` (it is in wrong hands) none before is. ``Conflict`` where the
        client is public.
        """
        async with self._database.write() as session:
            own = await _lock(session, client_id, origin)
            client = await _changeable(session, client_id, own)
            if client.public:
                raise Conflict("A public client has no secret.")
            theirs = ClientSecret.client_id == client_id
            newest = await session.scalar(
                select(ClientSecret.id).where(theirs).order_by(ClientSecret.id.desc()).limit(1)
            )
            kept = None if revoke_previous else newest
            await session.execute(delete(ClientSecret).where(theirs, ClientSecret.id != kept))
            until = await session.scalar(
                update(ClientSecret)
                .where(ClientSecret.id == kept)
                .values(expires_at=db_now(OVERLAP_SECONDS))
                .returning(ClientSecret.expires_at)
                .execution_options(synchronize_session=False)
            )
            secret, sealed = self._secrets.make()
            session.add(ClientSecret(client_id=client_id, sealed=sealed))
            audit.record(
                session, "client.secret", origin, target=client_id, revoke_previous=revoke_previous
            )
        return NewSecret(client_id, secret, until)

    async def reseal(self, session: AsyncSession, former: str) -> int:
        """Take secrets that were sealed under ``former`` over; return how many."""
        count, under_former = 0, ClientSecrets(former)
        for row in await session.scalars(select(ClientSecret)):
            try:
                row.sealed = self._secrets.take_over(row.sealed, under_former)
                count += 1
            except InvalidTag:
                continue
        return count


async def _allow(
    session: AsyncSession, client_id: UUID, names: Iterable[str], own: Holding
) -> None:
    """Let a client's tokens hold exactly these roles; the actor must hold all of them."""
    ids = (await role_ids(session, names, "allowed_roles")).values()
    await session.execute(delete(ClientRole).where(ClientRole.client_id == client_id))
    session.add_all(ClientRole(client_id=client_id, role_id=role_id) for role_id in ids)
    await session.flush()
    ensure_may_grant(own, await holding.client(session, client_id))
    await ensure_client_fits(session, client_id)


async def _lock(session: AsyncSession, client_id: UUID, origin: Origin) -> Holding:
    """Lock a client, so that nobody else changes it; return what the actor holds."""
    await lock_role_assignments(session)
    await session.execute(select(Client.id).where(Client.id == client_id).with_for_update())
    return await acting(session, origin, WRITE)


async def _changeable(session: AsyncSession, client_id: UUID, own: Holding) -> ClientView:
    """Return a client that the actor may change: they hold what it holds."""
    found = await _view(session, client_id)
    ensure_may_grant(own, await holding.client(session, client_id))
    return found


async def _update(session: AsyncSession, client_id: UUID, values: dict[str, Any]) -> None:
    if values:
        await session.execute(
            update(Client)
            .where(Client.id == client_id)
            .values(**values)
            .execution_options(synchronize_session=False)
        )


async def _view(session: AsyncSession, client_id: UUID) -> ClientView:
    client = await session.get(Client, client_id, populate_existing=True)
    if client is None:
        raise NotFound("There is no such client.")
    roles = await _allowed(session, [client_id])
    return _shown(client, roles.get(client_id, ()))


async def _allowed(
    session: AsyncSession, client_ids: Sequence[UUID]
) -> dict[UUID, tuple[str, ...]]:
    rows = await session.execute(
        select(ClientRole.client_id, Role.name)
        .join(Role, Role.id == ClientRole.role_id)
        .where(ClientRole.client_id.in_(client_ids))
        .order_by(Role.name)
    )
    found: dict[UUID, tuple[str, ...]] = {}
    for client_id, name in rows:
        found[client_id] = (*found.get(client_id, ()), name)
    return found


def _shown(client: Client, roles: Sequence[str]) -> ClientView:
    return ClientView(
        client_id=client.id,
        name=client.name,
        allowed_roles=tuple(sorted(roles)),
        audiences=tuple(client.audiences),
        grants=tuple(client.grants),
        public=client.is_public,
        access_token_expires=client.access_token_expires,
        is_active=client.is_active,
        created_at=client.created_at,
        updated_at=client.updated_at,
    )


def _refuse_grants(public: bool, grants: Iterable[str]) -> None:
    # RFC 6749 section 4.4: it has no credentials that it could be granted anything for
    if public and CLIENT_CREDENTIALS in grants:
        raise ValidationFailed(
            errors=[{"field": "grants", "message": f"{CLIENT_CREDENTIALS} needs a secret."}]
        )


def _once(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
