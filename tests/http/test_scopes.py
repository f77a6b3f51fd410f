"""Tokens that a scope narrows: they do what the scope names, and nothing besides."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest

from api.asgi import AsyncFlask
from api.auth.guards import guard_of
from api.routes import TABLE
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_admin import PASSWORD, code, made, role
from tests.http.test_admin import admin as admin
from tests.http.test_clients import granted, registered, said

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

TOKEN = "/oauth/token"
OWN_ACCOUNT = [
    route for route in TABLE
    if route.path in {"/me", "/logout/all"} or route.path.startswith("/me/")
]  # fmt: skip
PASSWORDS = {"current_password": PASSWORD, "new_password": "another-Lantern-88"}
BODIES: dict[str, Any] = {"/me": {"email": "a@example.org"}, "/me/password": PASSWORDS}


class Narrowed:
    """A session of ``ed`` through a public client, refreshed for one scope after the other."""

    def __init__(self, client: httpx.AsyncClient, client_id: str, refresh_token: object) -> None:
        self.client, self.client_id, self.refresh_token = client, client_id, refresh_token

    async def ask(self, scope: str | None) -> httpx.Response:
        form = {
            "grant_type": "refresh_token", "client_id": self.client_id,
            "refresh_token": str(self.refresh_token),
        }  # fmt: skip
        answer = await self.client.post(TOKEN, data=form | ({"scope": scope} if scope else {}))
        if answer.is_success:
            self.refresh_token = answer.json()["refresh_token"]
        return answer

    async def token(self, scope: str | None) -> str:
        answer = await self.ask(scope)
        assert answer.status_code == 200, answer.text
        return answer.json()["access_token"]


@pytest.fixture
async def session(client: httpx.AsyncClient, admin: httpx.AsyncClient) -> Narrowed:
    """A session of a user who may read users."""
    await role(admin, "reader", "users:read")
    await made(admin, "ed", "user", "reader")
    app = await registered(
        admin, "user", "reader", "admin", public=True, grants=["refresh_token"]
    )  # fmt: skip
    tokens = await sign_in(client, "ed", PASSWORD, client_id=app["client_id"], transport="json")
    return Narrowed(client, app["client_id"], tokens["refresh_token"])


async def call(client: httpx.AsyncClient, method: str, path: str, token: str) -> httpx.Response:
    """Call a route with a token and the body that it takes."""
    where = path.replace("<uuid:session_id>", str(uuid4()))
    return await client.request(method, where, json=BODIES.get(path), headers=bearer(token))


async def test_every_route_of_ones_own_account_asks_a_scope_for_it(app: AsyncFlask) -> None:
    """GET asks for me:read, whatever changes something for me:write; no other route does."""
    for route in TABLE:
        guard = guard_of(app.view_functions[route.endpoint])
        assert guard is not None
        if route not in OWN_ACCOUNT:
            assert guard.scope == (), route.path
            continue
        assert guard.users_only
        assert guard.scope == (("me:read",) if route.method == "GET" else ("me:write",)), route.path
    assert len(OWN_ACCOUNT) >= 6


async def test_a_scope_opens_of_ones_own_account_what_it_names(session: Narrowed) -> None:
    """Without me:read or me:write every such route is 403 insufficient_scope, and does nothing."""
    client = session.client
    for scope, opened in (
        ("users:read", set()), ("me:read", {"me:read"}), ("me:write", {"me:write"}),
        ("users:read me:read", {"me:read"}),
    ):  # fmt: skip
        token = await session.token(scope)
        for route in OWN_ACCOUNT:
            needed = "me:read" if route.method == "GET" else "me:write"
            if needed in opened:
                continue
            answer = await call(client, route.method, route.path, token)
            assert code(answer) == (403, "insufficient_permission"), route.path
            assert answer.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope"'
            assert needed in answer.json()["detail"]
    # the session, the address and the password are as they were
    token = await session.token("me:read")
    shown = await client.get("/me", headers=bearer(token))
    assert (shown.status_code, shown.json()["email"]) == (200, None)
    assert len((await client.get("/me/sessions", headers=bearer(token))).json()["items"]) == 1
    token = await session.token("me:write")
    changed = await call(client, "PATCH", "/me", token)
    assert (changed.status_code, changed.json()["email"]) == (200, "a@example.org")
    assert (await call(client, "POST", "/me/password", token)).status_code == 204
    ended = await client.post("/logout/all", headers=bearer(token))
    assert (ended.status_code, ended.json()) == (200, {"logout": True, "sessions": 1})


async def test_a_token_that_no_scope_narrows_is_as_before(session: Narrowed) -> None:
    """It uses /me without being told that it may, and says nothing of me:read."""
    token = await session.token(None)
    assert "scope" not in said(token)
    assert said(token)["permissions"] == ["users:read"]
    shown = await session.client.get("/me", headers=bearer(token))
    assert (shown.status_code, shown.json()["permissions"]) == (200, ["users:read"])
    assert (await call(session.client, "PATCH", "/me", token)).status_code == 200
    ended = await session.client.post("/logout/all", headers=bearer(token))
    assert ended.status_code == 200


async def test_a_narrowed_token_ends_its_own_session(session: Narrowed) -> None:
    """/logout asks for no scope: it ends no more than the token's own session."""
    token = await session.token("users:read")
    answer = await session.client.post("/logout", headers=bearer(token))
    assert (answer.status_code, answer.json()) == (200, {"logout": True})
    assert (await session.ask(None)).json()["error"] == "invalid_grant"


async def test_every_user_may_ask_for_their_own_account(
    session: Narrowed, admin: httpx.AsyncClient
) -> None:
    """me:read, me:write and me:* are everybody's; no other verb is, and no roles come along."""
    for scope in ("me:read", "me:write", "me:*", "me:read me:write", "me:read users:read"):
        answer = await session.ask(scope)
        assert (answer.status_code, answer.json()["scope"]) == (200, scope)
        claims = said(answer.json()["access_token"])
        assert (claims["scope"], claims["permissions"]) == (scope, scope.split())
        assert claims["roles"] == []
    for scope in ("me:delete", "me:", "me", "*", "me:read users:write", "ME:READ"):
        answer = await session.ask(scope)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope"), scope
    token = await session.token("me:*")
    assert (await session.client.get("/me", headers=bearer(token))).status_code == 200
    assert (await call(session.client, "PATCH", "/me", token)).status_code == 200
    # everything is everything: the roles stay, which stand for no more than the scope names
    claims = said(await session.token("users:read me:read me:write"))
    assert claims["roles"] == ["reader", "user"]
    assert said(await session.token("users:read"))["roles"] == []
    # as it is for who holds everything
    ed = (await admin.get("/admin/users", params={"q": "ed"})).json()["items"][0]
    path = f"/admin/users/{ed['id']}/roles"
    assert (await admin.put(path, json={"roles": ["admin"]})).status_code == 200
    token = await session.token("*")
    assert (await session.client.get("/me", headers=bearer(token))).status_code == 200
    token = await session.token("users:*")
    answer = await session.client.get("/me", headers=bearer(token))
    assert code(answer) == (403, "insufficient_permission")


async def test_a_client_app_has_no_account_of_its_own(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """me:read is no scope of client_credentials, not for who holds everything either."""
    await role(admin, "odd", "me:read", "users:read")
    for roles in (["user"], ["odd"], ["admin"]):
        machine = await registered(admin, *roles, grants=["client_credentials"])
        for scope in ("me:read", "me:write", "me:*", "users:read me:read"):
            answer = await granted(admin, machine, scope=scope)
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope"), scope
    token = (await granted(admin, machine, scope="*")).json()["access_token"]
    async with client_of(app) as client:
        answer = await client.get("/me", headers=bearer(token))
        assert code(answer) == (403, "insufficient_permission")
    query = {"target": machine["client_id"], "action": "token.issued"}
    log = (await admin.get("/admin/audit", params=query)).json()["items"]
    assert [row["detail"]["scope"] for row in log] == ["*"]


async def test_a_scope_gives_away_no_role_that_it_left_out(
    session: Narrowed, admin: httpx.AsyncClient
) -> None:
    """What a narrowed token lets an administrator give is decided by the same rule."""
    ed = (await admin.get("/admin/users", params={"q": "ed"})).json()["items"][0]
    assert (
        await admin.put(f"/admin/users/{ed['id']}/roles", json={"roles": ["admin", "reader"]})
    ).is_success
    await made(admin, "vic", "user")
    vic = (await admin.get("/admin/users", params={"q": "vic"})).json()["items"][0]
    path = f"/admin/users/{vic['id']}/roles"
    token = await session.token("roles:assign users:read me:read")
    for roles in (["user", "reader"], ["user", "admin"]):
        answer = await session.client.put(path, json={"roles": roles}, headers=bearer(token))
        assert code(answer) == (403, "insufficient_permission")


async def test_the_document_tells_of_the_scope(client: httpx.AsyncClient) -> None:
    """Each route of one's own account names the permission; the flow for client apps does not."""
    document = (await client.get("/openapi.json")).json()
    assert document["paths"]["/me"]["get"]["x-guard"]["scope_required"] == ["me:read"]
    assert document["paths"]["/me"]["patch"]["x-guard"]["scope_required"] == ["me:write"]
    assert document["paths"]["/logout/all"]["post"]["x-guard"]["scope_required"] == ["me:write"]
    assert (
        "`insufficient_permission`"
        in (document["paths"]["/me"]["get"]["responses"]["403"]["description"])
    )
    assert "scope_required" not in document["paths"]["/logout"]["post"]["x-guard"]
    flow = document["components"]["securitySchemes"]["client_credentials"]["flows"]
    assert not {"me:read", "me:write"} & flow["clientCredentials"]["scopes"].keys()
