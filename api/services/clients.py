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
from api.db import Database, db_now
from api.db.models import Client, ClientRole, ClientSecret, Role, User
from api.errors import Conflict, NotFound, ValidationFailed
from api.services import audit, holding
from api.services.audit import Origin
from api.services.floors import raise_floors, users_through
from api.services.lifetimes import floor_until
from api.services.paging import Page, after, page_of
from api.services.sessions import Sessions
from api.shielding import finished

CLIENT_CREDENTIALS = "client_credentials"
# How long the former secret is good after another one was made.
OVERLAP_SECONDS = 86_400
LONG_SECONDS = 60.0
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
            await holding.one_change_at_a_time(session)
            client = Client(
                name=wanted["name"],
                audiences=_once(wanted["audiences"]),
                grants=_once(wanted["grants"]),
                access_token_expires=wanted["access_token_expires"],
                is_public=public,
            )
            session.add(client)
            await session.flush()
            await _allow(session, client.id, wanted["allowed_roles"], origin)
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
        """Change what ``create`` was given, or ``is_active``; it bites on the next request.

        The client's own tokens become stale, unless nothing that binds them was changed. Sessions
        that were opened through it live on, with what it is allowed from now on; where it is
        disabled, they end.
        """

        async def work() -> ClientView:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                before = await _locked(tx.session, client_id, origin)
                _refuse_grants(before.public, changes.get("grants", ()))
                changed = _differing(before, changes)
                if not changed:
                    return before
                values = {name: changes[name] for name in PLAIN if name in changed}
                for name in {"audiences", "grants"} & values.keys():
                    values[name] = _once(values[name])
                if "allowed_roles" in changed:
                    await _allow(tx.session, client_id, changes["allowed_roles"], origin)
                lifetimes = self._sessions.lifetimes
                if BINDING & changed:
                    version = await _raise_version(tx.session, client_id, **values)
                    await tx.raise_floor(client_id, version, floor_until(lifetimes))
                else:
                    await _update(tx.session, client_id, values)
                if changes.get("is_active") is False:
                    await self._sessions.end_through(tx, client_id, "client_disabled")
                elif {"allowed_roles", "audiences"} & changed:
                    users = await users_through(tx.session, [client_id])
                    await raise_floors(tx, User, users, lifetimes)
                audit.record(
                    tx.session, "client.changed", origin, target=client_id, fields=sorted(changed)
                )
                return await _view(tx.session, client_id)

        return await finished(work())

    async def delete(self, client_id: UUID, origin: Origin) -> None:
        """Delete a client; its tokens and the sessions through it end."""

        async def work() -> None:
            async with self._blocklist.transaction(LONG_SECONDS) as tx:
                before = await _locked(tx.session, client_id, origin)
                version = await _raise_version(tx.session, client_id)
                await tx.raise_floor(client_id, version, floor_until(self._sessions.lifetimes))
                ended = await self._sessions.end_through(tx, client_id, "client_deleted")
                await tx.session.execute(delete(Client).where(Client.id == client_id))
                audit.record(
                    tx.session, "client.deleted", origin, target=client_id, name=before.name,
                    sessions=len(ended),
                )  # fmt: skip

        await finished(work())

    async def replace_secret(
        self, client_id: UUID, origin: Origin, *, revoke_previous: bool = False
    ) -> NewSecret:
        """Make another secret; the newest before it is good for ``OVERLAP_SECONDS`` still.

        With ``revoke_previous`` (it is in wrong hands) none before is. ``Conflict`` where the
        client is public.
        """
        async with self._database.write() as session:
            client = await _locked(session, client_id, origin)
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
    session: AsyncSession, client_id: UUID, names: Iterable[str], origin: Origin
) -> None:
    """Let a client's tokens hold exactly these roles; whoever asks must hold what is added."""
    ids = await holding.role_ids(session, names, "allowed_roles")
    own, before = await holding.held_by(session, origin), await holding.client(session, client_id)
    await session.execute(delete(ClientRole).where(ClientRole.client_id == client_id))
    session.add_all(ClientRole(client_id=client_id, role_id=role_id) for role_id in ids)
    await session.flush()
    holding.refuse_beyond(own, holding.beyond(await holding.client(session, client_id), before))


async def _locked(session: AsyncSession, client_id: UUID, origin: Origin) -> ClientView:
    """Return a client that nobody else changes, and that whoever asks may change."""
    await holding.one_change_at_a_time(session)
    await session.execute(select(Client.id).where(Client.id == client_id).with_for_update())
    found = await _view(session, client_id)
    own = await holding.held_by(session, origin)
    holding.refuse_beyond(own, await holding.client(session, client_id))
    return found


def _differing(before: ClientView, changes: dict[str, Any]) -> set[str]:
    """Return the names of what is to be another; order and repetition make no list another.

    Whoever disables a client again ends all of it again: a worker may have died at it.
    """

    def is_other(name: str, wanted: Any) -> bool:
        had = getattr(before, name)
        return set(wanted) != set(had) if isinstance(wanted, list) else bool(wanted != had)

    names = {name for name, wanted in changes.items() if is_other(name, wanted)}
    return names | {"is_active"} if changes.get("is_active") is False else names


async def _raise_version(session: AsyncSession, client_id: UUID, **values: Any) -> int:
    return await _update(session, client_id, values | {"version": Client.version + 1})


async def _update(session: AsyncSession, client_id: UUID, values: dict[str, Any]) -> int:
    """Return the version that the client has then."""
    return (
        await session.execute(
            update(Client)
            .where(Client.id == client_id)
            .values(**values)
            .returning(Client.version)
            .execution_options(synchronize_session=False)
        )
    ).scalar_one()


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
