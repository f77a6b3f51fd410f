"""Whoever is disabled, demoted or logged out while a request of theirs waits, does nothing.

Another connection to the database holds the lock that changes of rights take, and takes the rights
from the actor in the same transaction: the request, which passed its guard before that, waits for
the commit and must then be refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any
from uuid import UUID

import httpx
import jwt
import pytest
from sqlalchemy import NullPool, delete, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from api.asgi import AsyncFlask
from api.db.models import Base, Role, Session, User, UserRole
from tests.conftest import bearer, client_of, sign_in

PASSWORD = "correct-Harbour-93"
NEW_PASSWORD = "another-Harbour-94"
NUMBERS = count(1)
# Long enough for a request to reach the lock; one that takes longer is refused all the same.
WAIT_SECONDS = 0.15
# What a mutation may change. The ledger of revocations is looked at through a token.
TABLES = (
    "users", "user_roles", "roles", "role_permissions", "role_includes",
    "clients", "client_roles", "client_secrets", "sessions",
)  # fmt: skip


@dataclass
class Actor:
    """An administrator of this test's own, signed in."""

    id: UUID
    name: str
    sid: UUID
    client: httpx.AsyncClient


@dataclass
class Target:
    """What a mutation is aimed at, made anew for each."""

    user: str
    session: str
    token: str
    role: str
    client: str
    own_session: UUID
    name: str = field(default_factory=lambda: f"new{next(NUMBERS)}")


@dataclass(frozen=True)
class Mutation:
    """A route that changes something, and the request for a target."""

    method: str
    route: str
    path: Callable[[Target], str]
    body: Callable[[Target], dict[str, Any] | None] = lambda _: None
    what: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.method, self.route, self.what)))


def _user(method: str, below: str = "", what: str = "", **body: Any) -> Mutation:
    """Return a mutation of one user."""
    return Mutation(
        method, f"/admin/users/{{user_id}}{below}", lambda t: f"/admin/users/{t.user}{below}",
        lambda _: body or None, what,
    )  # fmt: skip


OF_OTHERS = (
    Mutation(
        "POST", "/admin/users", lambda _: "/admin/users",
        lambda t: {"username": t.name, "password": PASSWORD, "roles": ["admin"]},
    ),
    _user("PATCH", what="email", email="somebody@example.test"),
    _user("PATCH", what="is_active", is_active=False),
    _user("PATCH", what="password", password=NEW_PASSWORD),
    _user("DELETE"),
    _user("PUT", "/roles", roles=["user", "admin"]),
    _user("POST", "/logout"),
    Mutation(
        "DELETE", "/admin/sessions/{session_id}", lambda t: f"/admin/sessions/{t.session}"
    ),
    Mutation(
        "POST", "/admin/tokens/revoke", lambda _: "/admin/tokens/revoke",
        lambda t: {"token": t.token},
    ),
    Mutation(
        "POST", "/admin/roles", lambda _: "/admin/roles",
        lambda t: {"name": t.name, "permissions": ["users:read"]},
    ),
    Mutation(
        "PATCH", "/admin/roles/{name}", lambda t: f"/admin/roles/{t.role}",
        lambda _: {"permissions": ["users:read"]},
    ),
    Mutation("DELETE", "/admin/roles/{name}", lambda t: f"/admin/roles/{t.role}"),
    Mutation(
        "POST", "/admin/clients", lambda _: "/admin/clients",
        lambda t: {"name": t.name, "allowed_roles": ["admin"], "audiences": [], "grants": []},
    ),
    Mutation(
        "PATCH", "/admin/clients/{client_id}", lambda t: f"/admin/clients/{t.client}",
        lambda _: {"is_active": False},
    ),
    Mutation("DELETE", "/admin/clients/{client_id}", lambda t: f"/admin/clients/{t.client}"),
    Mutation(
        "POST", "/admin/clients/{client_id}/secret", lambda t: f"/admin/clients/{t.client}/secret"
    ),
)  # fmt: skip
OF_ONESELF = (
    Mutation("PATCH", "/me", lambda _: "/me", lambda _: {"email": "me@example.test"}),
    Mutation(
        "POST", "/me/password", lambda _: "/me/password",
        lambda _: {"current_password": PASSWORD, "new_password": NEW_PASSWORD},
    ),
    Mutation(
        "DELETE", "/me/sessions/{session_id}", lambda t: f"/me/sessions/{t.own_session}"
    ),
)  # fmt: skip


async def _disable(held: AsyncConnection, actor: Actor) -> None:
    await held.execute(update(User).where(User.id == actor.id).values(is_active=False))


async def _demote(held: AsyncConnection, actor: Actor) -> None:
    await held.execute(delete(UserRole).where(UserRole.user_id == actor.id))


async def _log_out(held: AsyncConnection, actor: Actor) -> None:
    ended = {"revoked_at": datetime.now(UTC), "revoked_reason": "logout"}
    await held.execute(update(Session).where(Session.id == actor.sid).values(ended))


@asynccontextmanager
async def lock_held(database_url: str) -> AsyncIterator[AsyncConnection]:
    """A transaction on another connection that keeps every change of rights waiting."""
    sqlite = database_url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"isolation_level": None}} if sqlite else {}
    engine = create_async_engine(database_url, poolclass=NullPool, **options)
    async with engine.connect() as held:
        if sqlite:
            await held.execute(text("BEGIN IMMEDIATE"))
        else:
            await held.execute(select(Role.id).where(Role.name == "admin").with_for_update())
        yield held
        await held.commit()
    await engine.dispose()


async def contents(held: AsyncConnection) -> dict[str, set[str]]:
    """Return every row of the tables that a mutation may change."""
    return {
        name: {repr(tuple(row)) for row in await held.execute(select(Base.metadata.tables[name]))}
        for name in TABLES
    }


@pytest.fixture
async def admin(app: AsyncFlask) -> AsyncIterator[httpx.AsyncClient]:
    """The demo administrator, whom nothing happens to."""
    async with client_of(app) as client:
        tokens = await sign_in(client, "admin", "adminpass", transport="json")
        client.headers.update(bearer(tokens["access_token"]))
        yield client


async def _made(admin: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await admin.post(path, json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def _sid(token: object) -> UUID:
    return UUID(jwt.decode(str(token), options={"verify_signature": False})["sid"])


async def _tokens(app: AsyncFlask, name: str) -> dict[str, Any]:
    async with client_of(app) as visitor:
        return dict(await sign_in(visitor, name, PASSWORD, transport="json"))


async def actor_of(app: AsyncFlask, admin: httpx.AsyncClient) -> Actor:
    """Return an administrator made for one request."""
    name = f"actor{next(NUMBERS)}"
    made = await _made(
        admin, "/admin/users", username=name, password=PASSWORD, roles=["user", "admin"]
    )
    token = (await _tokens(app, name))["access_token"]
    client = client_of(app)
    client.headers.update(bearer(token))
    return Actor(UUID(made["id"]), name, _sid(token), client)


async def target_for(app: AsyncFlask, admin: httpx.AsyncClient, actor: Actor) -> Target:
    """Return what one request is aimed at."""
    number = next(NUMBERS)
    user = await _made(
        admin, "/admin/users", username=f"target{number}", password=PASSWORD, roles=["user"]
    )
    token = (await _tokens(app, f"target{number}"))["access_token"]
    role = await _made(admin, "/admin/roles", name=f"role{number}", permissions=["audit:read"])
    client = await _made(
        admin, "/admin/clients", name="app", allowed_roles=["user"], audiences=[], grants=[]
    )
    own = _sid((await _tokens(app, actor.name))["access_token"])
    return Target(user["id"], str(_sid(token)), token, role["name"], client["client_id"], own)


async def send(actor: Actor, mutation: Mutation, target: Target) -> httpx.Response:
    """Send the request for a target."""
    return await actor.client.request(
        mutation.method, mutation.path(target), json=mutation.body(target)
    )


WAYS = {"disabled": _disable, "demoted": _demote, "logged out": _log_out}
CASES = [
    pytest.param(mutation, way, id=f"{way}-{mutation}")
    for ways, mutations in ((WAYS, OF_OTHERS), (("disabled", "logged out"), OF_ONESELF))
    for mutation in mutations
    for way in ways
]


@pytest.mark.parametrize(("mutation", "way"), CASES)
async def test_who_lost_their_rights_while_a_request_waited_does_nothing(
    app: AsyncFlask, admin: httpx.AsyncClient, database_url: str, mutation: Mutation, way: str
) -> None:
    """The mutation is refused (401 or 403) and nothing is changed (79).

    One that needs no lock may be made before the rights are lost; then the next one is refused,
    although the token passes the guard: here nobody told the blocklist.
    """
    actor = await actor_of(app, admin)
    async with actor.client:
        target = await target_for(app, admin, actor)
        spare = await target_for(app, admin, actor)
        async with lock_held(database_url) as held:
            await WAYS[way](held, actor)
            waiting = asyncio.create_task(send(actor, mutation, target))
            await asyncio.wait([waiting], timeout=WAIT_SECONDS)
            before = await contents(held)
            was_made = waiting.done() and waiting.result().is_success
        answer = await waiting
        if was_made:
            async with lock_held(database_url) as held:
                before = await contents(held)
            target = spare
            answer = await send(actor, mutation, target)
    assert answer.status_code in {401, 403}, f"{answer.status_code} {answer.text}"
    async with lock_held(database_url) as held:
        assert await contents(held) == before
    async with client_of(app) as victim:
        shown = await victim.get("/protected", headers=bearer(target.token))
    assert shown.status_code == 200, "the token of somebody else was revoked"


async def test_every_mutation_is_tried(client: httpx.AsyncClient) -> None:
    """Each route of the admin API and of one's own account that changes something is above."""
    document = (await client.get("/openapi.json")).json()
    there = {
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method in methods
        if path.startswith(("/admin/", "/me")) and method in {"post", "put", "patch", "delete"}
    }
    assert there == {(one.method, one.route) for one in (*OF_OTHERS, *OF_ONESELF)}
