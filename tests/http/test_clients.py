"""Client apps: registered, given secrets, bounded; users who sign in through them."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
from sqlalchemy import select, update

from api.asgi import AsyncFlask
from api.auth.client_secrets import ClientSecrets
from api.db import db_now
from api.db.models import ClientSecret
from api.parts import EXTENSION, Parts
from tests.conftest import SECRET, bearer, client_of, sign_in
from tests.http.test_admin import ON_SQLITE, PASSWORD, code, made, role, signed_in_as
from tests.http.test_admin import admin as admin

CLIENTS = "/admin/clients"


async def registered(admin: httpx.AsyncClient, *roles: str, **more: Any) -> dict[str, Any]:
    """Register a client app for some roles."""
    body = {"name": "reports", "allowed_roles": list(roles), "audiences": [], "grants": [], **more}
    answer = await admin.post(CLIENTS, json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def said(token: str) -> dict[str, Any]:
    """Return the claims of a token, unverified."""
    return jwt.decode(token, options={"verify_signature": False})


def through(app: dict[str, Any]) -> dict[str, Any]:
    """Return the members of a login by which a client app says who it is."""
    return {name: app[name] for name in ("client_id", "client_secret") if name in app}


async def refreshed(
    client: httpx.AsyncClient, app: dict[str, Any], refresh_token: object
) -> httpx.Response:
    """Refresh as a confidential client app, by HTTP Basic."""
    form = {"grant_type": "refresh_token", "refresh_token": str(refresh_token)}
    return await client.post(
        "/oauth/token", data=form, auth=(app["client_id"], app["client_secret"])
    )


async def granted(client: httpx.AsyncClient, app: dict[str, Any], **more: str) -> httpx.Response:
    """Ask for a token for the client app itself, by HTTP Basic."""
    form = {"grant_type": "client_credentials", **more}
    return await client.post(
        "/oauth/token", data=form, auth=(app["client_id"], app["client_secret"])
    )


async def test_a_clients_life(admin: httpx.AsyncClient, parts: Parts) -> None:
    """Registered, its secret shown once and kept nowhere; shown, changed, deleted."""
    answer = await admin.post(
        CLIENTS,
        json={
            "name": "Reports", "allowed_roles": ["user"], "audiences": ["reports", "reports"],
            "grants": ["client_credentials"], "access_token_expires": 60,
        },
    )  # fmt: skip
    client = answer.json()
    path = f"{CLIENTS}/{client['client_id']}"
    assert (answer.status_code, answer.headers["Location"]) == (201, path)
    assert answer.headers["Cache-Control"] == "no-store"
    secret = client.pop("client_secret")
    assert len(secret) > 40
    assert client["audiences"] == ["reports"]
    assert (client["public"], client["is_active"]) == (False, True)
    shown = await admin.get(path)
    assert (shown.status_code, shown.json()) == (200, client)
    assert (await admin.get(CLIENTS)).json() == {"items": [client], "next_cursor": None}
    async with parts.database.read() as session:
        (kept,) = await session.scalars(select(ClientSecret.sealed))
    assert secret.encode() not in kept
    assert ClientSecrets(SECRET).matches(kept, secret)
    assert not ClientSecrets(SECRET).matches(kept, secret[:-1])
    assert not ClientSecrets("x" * 40).matches(kept, secret)
    changed = await admin.patch(path, json={"name": "R", "access_token_expires": None})
    assert (changed.status_code, changed.json()["name"]) == (200, "R")
    assert "client_secret" not in changed.text
    assert (await granted(admin, {**client, "client_secret": secret})).status_code == 200
    assert (await admin.delete(path)).status_code == 204
    assert code(await admin.get(path)) == (404, "not_found")
    assert code(await admin.delete(path)) == (404, "not_found")
    assert code(await admin.patch(path, json={"name": "x"})) == (404, "not_found")
    assert code(await admin.post(f"{path}/secret")) == (404, "not_found")
    refused = await granted(admin, {**client, "client_secret": secret})
    assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")
    log = (await admin.get("/admin/audit", params={"target": client["client_id"]})).json()["items"]
    assert [row["action"] for row in log] == [
        "client.deleted", "token.issued", "client.changed", "client.created",
    ]  # fmt: skip
    assert secret not in str(log)


@ON_SQLITE
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\u0000b"}, "name"),
        ({"allowed_roles": ["nobody"]}, "allowed_roles"),
        ({"allowed_roles": "user"}, "allowed_roles"),
        ({"audiences": ["a b"]}, "audiences.0"),
        ({"audiences": ["a" * 200, "b" * 200]}, "audiences"),
        ({"audiences": ["rolecall", "😀" * 140, "😁" * 140]}, "audiences"),
        ({"audiences": ["rolecall", '"' * 160]}, "audiences"),
        ({"grants": ["password"]}, "grants.0"),
        ({"grants": ["client_credentials"], "public": True}, "grants"),
        ({"public": "yes"}, "public"),
        ({"access_token_expires": 9}, "access_token_expires"),
        ({"access_token_expires": 86_401}, "access_token_expires"),
        ({"client_secret": "mine"}, "client_secret"),
    ],
)
async def test_a_bad_client_is_422(
    admin: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    """Each fault by its field, and nothing is registered."""
    good = {"name": "x", "allowed_roles": [], "audiences": [], "grants": []}
    answer = await admin.post(CLIENTS, json=good | body)
    assert code(answer) == (422, "validation_failed")
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert (await admin.get(CLIENTS)).json()["items"] == []


@ON_SQLITE
async def test_nobody_gives_a_client_what_they_do_not_hold(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Neither roles beyond one's own, nor the secret of a client that holds more."""
    await role(admin, "registrar", "clients:*")
    await made(admin, "rita", "user", "registrar")
    mighty = await registered(admin, "admin", grants=["client_credentials"])
    path = f"{CLIENTS}/{mighty['client_id']}"
    async with await signed_in_as(app, "rita") as rita:
        body = {"name": "x", "allowed_roles": ["admin"], "audiences": [], "grants": []}
        assert code(await rita.post(CLIENTS, json=body)) == (403, "insufficient_permission")
        for answer in (
            await rita.post(f"{path}/secret"),
            await rita.patch(path, json={"name": "mine"}),
            await rita.delete(path),
        ):
            assert code(answer) == (403, "insufficient_permission")
        own = await registered(rita, "registrar", grants=["client_credentials"])
        answer = await rita.patch(
            f"{CLIENTS}/{own['client_id']}", json={"allowed_roles": ["registrar", "admin"]}
        )
        assert code(answer) == (403, "insufficient_permission")
    async with await signed_in_as(app, "rita") as rita:
        assert (await rita.get("/admin/users")).status_code == 403
    # and neither does a client, nor a token of it that was narrowed
    for scope in ({}, {"scope": "clients:write"}):
        token = (await granted(admin, own, **scope)).json()["access_token"]
        async with client_of(app) as machine:
            machine.headers.update(bearer(token))
            assert code(await machine.post(CLIENTS, json=body)) == (403, "insufficient_permission")
            small = {**body, "allowed_roles": ["registrar"]}
            expected = 403 if scope else 201
            assert (await machine.post(CLIENTS, json=small)).status_code == expected
    assert len((await admin.get(CLIENTS)).json()["items"]) == 3


async def test_two_secrets_are_good_while_one_is_replaced(
    admin: httpx.AsyncClient, parts: Parts
) -> None:
    """The newest, and the one before for a day; with revoke_previous it alone; public has none."""
    app = await registered(admin, "user", grants=["client_credentials"])
    path = f"{CLIENTS}/{app['client_id']}/secret"
    first = app
    answer = await admin.post(path)
    assert answer.status_code == 201
    assert answer.json()["previous_expires_at"] is not None
    second = {**app, **answer.json()}
    assert [(await granted(admin, s)).status_code for s in (first, second)] == [200, 200]
    third = {**app, **(await admin.post(path)).json()}
    states = [(await granted(admin, s)).status_code for s in (first, second, third)]
    assert states == [401, 200, 200]
    answer = await admin.post(path, params={"revoke_previous": "true"})
    assert answer.json()["previous_expires_at"] is None
    fourth = {**app, **answer.json()}
    states = [(await granted(admin, s)).status_code for s in (second, third, fourth)]
    assert states == [401, 401, 200]
    fifth = {**app, **(await admin.post(path)).json()}
    async with parts.database.write() as session:
        await session.execute(
            update(ClientSecret).where(ClientSecret.expires_at > db_now(86_390)).values(
                expires_at=db_now(-1)
            )
        )  # fmt: skip
    states = [(await granted(admin, s)).status_code for s in (fourth, fifth)]
    assert states == [401, 200], "its day is over"
    query = {"target": app["client_id"], "action": "client.secret"}
    log = (await admin.get("/admin/audit", params=query)).json()["items"]
    assert [row["detail"]["revoke_previous"] for row in log] == [False, True, False, False]
    public = await registered(admin, "user", public=True)
    assert "client_secret" not in public
    answer = await admin.post(f"{CLIENTS}/{public['client_id']}/secret")
    assert code(answer) == (409, "conflict")


async def test_a_user_who_comes_through_a_client_holds_no_more_than_it_may(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """The intersection, in the login, every refresh, /me and what the database allows them."""
    await role(admin, "reader", "users:read")
    await role(admin, "editor", "users:write", includes=["reader"])
    await made(admin, "ed", "admin", "user", "reader")
    limited = await registered(
        admin, "user", "editor", audiences=["rolecall", "wiki"], public=True
    )  # fmt: skip
    async with client_of(app) as client:
        tokens = await sign_in(client, "ed", PASSWORD, **through(limited))
        assert tokens["user"]["roles"] == ["reader", "user"]
        for _ in range(3):
            claims = said(tokens["access_token"])
            assert (claims["roles"], claims["permissions"]) == (["reader", "user"], ["users:read"])
            assert claims["client_id"] == limited["client_id"]
            assert claims["aud"] == ["rolecall", "wiki"]
            refresh = said(tokens["refresh_token"])
            assert (refresh["aud"], refresh["client_id"]) == ("rolecall", limited["client_id"])
            client.cookies.clear()
            headers = bearer(tokens["access_token"])
            me = (await client.get("/me", headers=headers)).json()
            assert (me["roles"], me["permissions"]) == (["reader", "user"], ["users:read"])
            assert (await client.get("/admin/users", headers=headers)).status_code == 200
            assert (await client.get("/admin/roles", headers=headers)).status_code == 403
            answer = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
            assert answer.status_code == 200, answer.text
            tokens = answer.json()
        # without the client the same user holds everything
        whole = await sign_in(client, "ed", PASSWORD, transport="json")
        assert "admin" in said(whole["access_token"])["roles"]
        assert "client_id" not in said(whole["access_token"])


async def test_a_client_limited_to_user_never_sees_admin(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Whichever way it asks: for itself, for an administrator, by refresh, scope and question.

    A public client of the same roles neither, at /refresh.
    """
    limited = await registered(admin, "user", grants=["client_credentials", "refresh_token"])
    secret = (limited["client_id"], limited["client_secret"])
    seen: list[httpx.Response] = []
    async with client_of(app) as client:

        async def ask(path: str, **more: Any) -> dict[str, Any]:
            seen.append(await client.post(path, **more))
            assert seen[-1].is_success, seen[-1].text
            return seen[-1].json()

        user = {"username": "admin", "password": "adminpass"}
        public = user | through(await registered(admin, "user", public=True))
        own = (await granted(client, limited)).json()
        by_json = await ask("/login", json=public | {"transport": "json"})
        await ask("/login", json=public | {"transport": "cookies"})
        csrf = {"X-CSRF-TOKEN": client.cookies["csrf_refresh_token"]}
        await ask("/refresh", headers=csrf)
        client.cookies.clear()
        by_header = await ask("/refresh", headers=bearer(by_json["refresh_token"]))
        again = await ask("/refresh", headers=bearer(by_json["refresh_token"]))
        signed_in = await ask("/login", json=user | through(limited) | {"transport": "json"})
        form = {"grant_type": "refresh_token", "refresh_token": signed_in["refresh_token"]}
        by_form = await ask("/oauth/token", data=form, auth=secret)
        for found in (own, by_json, by_header, again, signed_in, by_form):
            assert said(found["access_token"])["roles"] == ["user"]
            seen.append(await client.get("/protected", headers=bearer(found["access_token"])))
            await ask("/oauth/introspect", data={"token": found["access_token"]}, auth=secret)
        seen.append(await client.get("/me", headers=bearer(by_form["access_token"])))
        form |= {"refresh_token": by_form["refresh_token"]}
        for scope in ("admin", "*", "users:read"):
            for asked in (form, {"grant_type": "client_credentials"}):
                data = asked | {"scope": scope}
                answer = await client.post("/oauth/token", data=data, auth=secret)
                assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
    for answer in seen:
        cookies = [answer.cookies[n] for n in answer.cookies if not n.startswith("csrf")]
        for token in cookies + [v for k, v in answer.json().items() if k.endswith("_token")]:
            assert said(token).get("roles", ["user"]) == ["user"]
            assert not said(token).get("permissions")
        assert answer.json().get("roles", ["user"]) == ["user"]
        assert not answer.json().get("permissions")


@ON_SQLITE
async def test_an_admin_who_comes_through_a_client_gives_no_more_than_it_may(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Though the database says that they hold everything: the client does not."""
    await role(admin, "assigner", "roles:*", "users:*")
    await made(admin, "ann", "admin", "assigner")
    victim = await made(admin, "vic", "user")
    limited = await registered(admin, "assigner")
    async with client_of(app) as client:
        tokens = await sign_in(client, "ann", PASSWORD, **through(limited), transport="json")
        client.headers.update(bearer(tokens["access_token"]))
        path = f"/admin/users/{victim['id']}/roles"
        answer = await client.put(path, json={"roles": ["user", "admin"]})
        assert code(answer) == (403, "insufficient_permission")
        answer = await client.put(path, json={"roles": ["user", "assigner"]})
        assert answer.status_code == 200
    log = (await admin.get("/admin/audit", params={"action": "user.roles"})).json()["items"]
    assert log[0]["detail"]["client_id"] == limited["client_id"]


@ON_SQLITE
async def test_who_comes_through_a_client_does_no_more_than_it_may_to_themselves(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """One's own account is a stranger's for a token that a client or a scope binds.

    It is left as it was; a token that nothing binds may.
    """
    await role(admin, "writer", "users:read", "users:write")
    await made(admin, "ann", "admin", "user", "writer")
    grants = ["refresh_token"]
    limited = await registered(admin, "user", "writer", public=True, grants=grants)
    mighty = await registered(admin, "admin", "user", "writer", public=True, grants=grants)
    async with client_of(app) as client:
        tokens = await sign_in(client, "ann", PASSWORD, **through(limited), transport="json")
        by_client = bearer(tokens["access_token"])
        tokens = await sign_in(client, "ann", PASSWORD, **through(mighty), transport="json")
        form = {
            "grant_type": "refresh_token", "refresh_token": tokens["refresh_token"],
            "client_id": mighty["client_id"], "scope": "users:read users:write",
        }  # fmt: skip
        by_scope = bearer((await client.post("/oauth/token", data=form)).json()["access_token"])
        ann = (await admin.get("/admin/users", params={"q": "ann"})).json()["items"][0]
        path = f"/admin/users/{ann['id']}"
        for headers in (by_client, by_scope):
            for answer in (
                await client.patch(path, json={"is_active": False}, headers=headers),
                await client.patch(path, json={"email": "a@b.cd"}, headers=headers),
                await client.delete(path, headers=headers),
            ):
                assert code(answer) == (403, "insufficient_permission")
        assert (await admin.get(path)).json() == ann
        whole = bearer((await sign_in(client, "ann", PASSWORD, transport="json"))["access_token"])
        answer = await client.patch(path, json={"email": "a@b.cd"}, headers=whole)
        assert answer.status_code == 200
        answer = await client.patch(path, json={"is_active": False}, headers=whole)
        assert (answer.status_code, answer.json()["is_active"]) == (200, False)


@ON_SQLITE
async def test_an_audience_is_exact(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """A token that is meant for others is no token here; its refresh token is, always."""
    elsewhere = await registered(admin, "user", audiences=["wiki"], public=True)
    async with client_of(app) as client:
        tokens = await sign_in(client, **through(elsewhere), transport="json")
        assert said(tokens["access_token"])["aud"] == "wiki"
        answer = await client.get("/protected", headers=bearer(tokens["access_token"]))
        assert code(answer) == (401, "invalid_token")
        answer = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
        assert answer.status_code == 200
        taken = answer.json()["access_token"]
        answer = await admin.post("/admin/tokens/revoke", json={"token": taken})
        assert answer.status_code == 200


@ON_SQLITE
async def test_a_browser_signs_in_for_another_audience(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Cookies too carry tokens that are meant for others: to a login, and through every refresh."""
    elsewhere = await registered(admin, "user", audiences=["wiki"], public=True)
    async with client_of(app) as client:
        for more in ({}, {"transport": "cookies"}):
            tokens = await sign_in(client, **through(elsewhere), **more)
            assert ("access_token" in tokens) == (not more)
            assert said(client.cookies["access_token"])["aud"] == "wiki"
        await admin.patch(f"{CLIENTS}/{elsewhere['client_id']}", json={"audiences": ["blog"]})
        for _ in range(2):
            csrf = client.cookies["csrf_refresh_token"]
            answer = await client.post("/refresh", headers={"X-CSRF-TOKEN": csrf})
            assert answer.status_code == 200, answer.text
            assert said(client.cookies["access_token"])["aud"] == "blog"
            assert client.cookies["csrf_refresh_token"] != csrf
        csrf = client.cookies["csrf_refresh_token"]
        answer = await client.post("/logout", headers={"X-CSRF-TOKEN": csrf})
        assert answer.status_code == 200, answer.text


async def test_what_a_client_loses_bites_on_the_next_request(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Fewer roles: its users' tokens and its own are stale; a refresh brings what is left."""
    await role(admin, "reader", "users:read")
    await made(admin, "ed", "user", "reader")
    grants = ["client_credentials", "refresh_token"]
    limited = await registered(admin, "user", "reader", grants=grants)
    path = f"{CLIENTS}/{limited['client_id']}"
    own = bearer((await granted(admin, limited)).json()["access_token"])
    async with client_of(app) as client:
        tokens = await sign_in(client, "ed", PASSWORD, **through(limited), transport="json")
        theirs = bearer(tokens["access_token"])
        for headers in (own, theirs):
            assert (await client.get("/admin/users", headers=headers)).status_code == 200
        assert (await admin.patch(path, json={"allowed_roles": ["user"]})).status_code == 200
        for headers in (own, theirs):
            assert code(await client.get("/protected", headers=headers)) == (401, "token_stale")
        tokens = (await refreshed(client, limited, tokens["refresh_token"])).json()
        assert said(tokens["access_token"])["roles"] == ["user"]
        # a permission that one of its roles loses
        await admin.patch(path, json={"allowed_roles": ["reader"]})
        own = bearer((await granted(admin, limited)).json()["access_token"])
        assert (await client.get("/admin/users", headers=own)).status_code == 200
        assert (await admin.patch("/admin/roles/reader", json={"permissions": []})).is_success
        assert code(await client.get("/admin/users", headers=own)) == (401, "token_stale")


async def test_a_change_that_binds_no_token_makes_none_stale(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Another name, or all as it was: what was issued goes on. What binds tokens ends its own."""
    limited = await registered(admin, "user", grants=["client_credentials", "refresh_token"])
    path = f"{CLIENTS}/{limited['client_id']}"
    shown = (await admin.get(path)).json()
    same = {
        name: shown[name]
        for name in ("name", "allowed_roles", "audiences", "access_token_expires", "is_active")
    }
    own = bearer((await granted(admin, limited)).json()["access_token"])
    async with client_of(app) as client:
        tokens = await sign_in(client, **through(limited), transport="json")
        theirs = bearer(tokens["access_token"])
        for body in ({"grants": shown["grants"][::-1] * 2, **same}, same, {"name": "Another"}):
            answer = await admin.patch(path, json=body)
            assert answer.status_code == 200
            for headers in (own, theirs):
                assert (await client.get("/protected", headers=headers)).status_code == 200, body
        assert answer.json()["name"] == "Another"
        for body in (
            {"access_token_expires": 60}, {"grants": ["client_credentials"]},
            {"audiences": ["rolecall", "wiki"]}, {"allowed_roles": []},
        ):  # fmt: skip
            own = bearer((await granted(admin, limited)).json()["access_token"])
            assert (await client.get("/protected", headers=own)).status_code == 200
            assert (await admin.patch(path, json=body)).status_code == 200
            answer = await client.get("/protected", headers=own)
            assert code(answer) == (401, "token_stale"), body
            # a client's own token has no user, and nothing that refreshes it
            assert "user's" not in answer.json()["detail"]
    log = (await admin.get("/admin/audit", params={"action": "client.changed"})).json()["items"]
    assert [row["detail"]["fields"] for row in log] == [
        ["allowed_roles"], ["audiences"], ["grants"], ["access_token_expires"], ["name"],
    ]  # fmt: skip


async def test_a_disabled_client_is_nobody(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Its tokens, the sessions through it, its sign-ins and its secret are refused at once."""
    limited = await registered(admin, "user", grants=["client_credentials", "refresh_token"])
    path = f"{CLIENTS}/{limited['client_id']}"
    own = bearer((await granted(admin, limited)).json()["access_token"])
    async with client_of(app) as client:
        tokens = await sign_in(client, **through(limited), transport="json")
        direct = await sign_in(client, transport="json")
        assert (await admin.patch(path, json={"is_active": False})).json()["is_active"] is False
        assert code(await client.get("/protected", headers=own)) == (401, "token_revoked")
        theirs = bearer(tokens["access_token"])
        assert code(await client.get("/protected", headers=theirs)) == (401, "token_revoked")
        answer = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
        assert code(answer) == (401, "token_revoked")
        assert (await granted(client, limited)).json()["error"] == "invalid_client"
        asked = {"token": tokens["access_token"]}
        secret = (limited["client_id"], limited["client_secret"])
        answer = await client.post("/oauth/introspect", data=asked, auth=secret)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        body = {"username": "testuser", "password": "testpass", **through(limited)}
        refused = await client.post("/login", json=body)
        assert code(refused) == (422, "validation_failed")
        unknown = await client.post("/login", json=body | {"client_id": str(uuid4())})
        assert unknown.json()["errors"] == refused.json()["errors"]
        assert refused.json()["errors"][0]["field"] == "client_id"
        assert (await client.post("/login", json=body | {"client_id": "x"})).status_code == 422
        other = bearer(direct["access_token"])
        assert (await client.get("/protected", headers=other)).status_code == 200
        await admin.patch(path, json={"is_active": True})
        assert (await granted(client, limited)).status_code == 200
        assert code(await client.get("/protected", headers=own)) == (401, "token_revoked")


async def test_sign_ins_race_a_client_that_is_disabled(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Whoever got in while it was being disabled is out again when it is."""
    limited = await registered(admin, "user")
    body = {
        "username": "testuser", "password": "testpass", "transport": "json", **through(limited),
    }  # fmt: skip
    async with client_of(app) as client:
        answers, _ = await asyncio.gather(
            asyncio.gather(*(client.post("/login", json=body) for _ in range(12))),
            admin.patch(f"{CLIENTS}/{limited['client_id']}", json={"is_active": False}),
        )
        for answer in answers:
            assert answer.status_code in {200, 422}, answer.text
            if answer.status_code == 200:
                headers = bearer(answer.json()["access_token"])
                refused = await client.get("/protected", headers=headers)
                assert code(refused) == (401, "token_revoked")


@ON_SQLITE
async def test_a_client_is_no_user(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Its token opens what its roles open, and nothing that is somebody's own; logout ends it."""
    machine = await registered(admin, "user", grants=["client_credentials"])
    token = (await granted(admin, machine)).json()["access_token"]
    async with client_of(app) as client:
        client.headers.update(bearer(token))
        shown = (await client.get("/protected")).json()
        assert shown == {"logged_in_as": machine["client_id"], "roles": ["user"]}
        for method, path in (
            ("GET", "/me"), ("PATCH", "/me"), ("POST", "/me/password"), ("GET", "/me/sessions"),
            ("DELETE", f"/me/sessions/{uuid4()}"), ("POST", "/logout/all"),
        ):  # fmt: skip
            answer = await client.request(method, path)
            assert code(answer) == (403, "insufficient_permission"), path
        assert code(await client.post("/refresh")) == (401, "wrong_token_type")
        assert (await client.post("/logout")).json() == {"logout": True}
        assert code(await client.get("/protected")) == (401, "token_revoked")
    for _ in range(2):
        assert (await granted(admin, {**machine, "client_secret": "x"})).status_code == 401
    stats = (await admin.get("/admin/stats")).json()
    assert stats["clients"] == {"total": 1, "active": 1}
    assert sum(bucket["client_tokens"] for bucket in stats["activity"]) == 1
    assert sum(bucket["client_failures"] for bucket in stats["activity"]) == 2
    assert sum(bucket["failures"] for bucket in stats["activity"]) == 0


@pytest.mark.parametrize("grant", ["client_credentials", "refresh_token"])
async def test_a_grant_that_is_taken_away_gives_nothing_any_more(
    app: AsyncFlask, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, grant: str
) -> None:
    """Not to a request either that was let in before, and waited; nothing is spent (80)."""
    limited = await registered(admin, "user", grants=[grant])
    path = f"{CLIENTS}/{limited['client_id']}"
    parts: Parts = app.extensions[EXTENSION]
    authenticate = parts.client_access.authenticate

    async def then_loses_it(*args: Any) -> Any:
        client = await authenticate(*args)
        monkeypatch.undo()
        assert (await admin.patch(path, json={"grants": []})).status_code == 200
        return client

    async with client_of(app) as client:
        tokens = await sign_in(client, **through(limited), transport="json")
        monkeypatch.setattr(
            type(parts.client_access), "authenticate", lambda _, *a: then_loses_it(*a)
        )
        if grant == "refresh_token":
            answer = await refreshed(client, limited, tokens["refresh_token"])
        else:
            answer = await granted(client, limited)
        assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")
        assert (await admin.patch(path, json={"grants": [grant]})).status_code == 200
        if grant == "refresh_token":
            answer = await refreshed(client, limited, tokens["refresh_token"])
            assert answer.status_code == 200
