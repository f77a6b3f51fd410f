"""What every answer has, and what guards and the document promise."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flask import Flask
from flask_jwt_extended import get_jwt
from flask_jwt_extended import jwt_required as bare_jwt_required
from marshmallow import ValidationError
from openapi_spec_validator import validate

from api import openapi
from api.app import create_app
from api.asgi import AsyncFlask
from api.auth.guards import (
    guard_of,
    jwt_required,
    permissions_accepted,
    roles_accepted,
    roles_required,
)
from api.errors import Unavailable, catalogue
from api.parts import Parts
from api.routes import TABLE
from api.settings import Settings
from schemas.clients import Audience
from schemas.fields import Permission, RoleName
from tests.conftest import bearer, client_of, sign_in
from tests.http._forge import fault, genuine, signed

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


async def test_expiry_is_to_the_second(client: httpx.AsyncClient, parts: Parts) -> None:
    """A token that expired this second is token_expired; one a moment ahead works (12)."""
    _, header, claims = await genuine(client)
    now = int(time.time())
    over = signed(parts, claims | {"exp": now}, header)
    assert fault(await client.get("/protected", headers=bearer(over)), "token_expired") is None
    ahead = signed(parts, claims | {"exp": now + 2}, header)
    assert (await client.get("/protected", headers=bearer(ahead))).status_code == 200


async def test_csrf_is_bound_to_the_token_in_the_cookie(client: httpx.AsyncClient) -> None:
    """Missing, wrong, another session's, planted and unencodable are 403 (21, 24)."""
    await sign_in(client, transport="cookies")
    foreign = client.cookies["csrf_access_token"]
    client.cookies.clear()
    await sign_in(client, transport="cookies")
    right = client.cookies["csrf_access_token"]
    change = {"email": "a@example.org"}
    for value in (None, "", "x", foreign, b"\xe9"):
        headers = {} if value is None else {"X-CSRF-TOKEN": value}
        for method, path in (("PATCH", "/me"), ("POST", "/refresh")):
            response = await client.request(method, path, json=change, headers=headers)
            assert (response.status_code, response.json()["code"]) == (403, "csrf_failed")
    planted = {"X-CSRF-TOKEN": "mine", "Cookie": f"access_token={client.cookies['access_token']}; "
               "csrf_access_token=mine"}  # fmt: skip
    assert (await client.patch("/me", json=change, headers=planted)).status_code == 403
    done = await client.patch("/me", json=change, headers={"X-CSRF-TOKEN": right})
    assert (done.status_code, done.json()["email"]) == (200, "a@example.org")
    refreshed = await client.post(
        "/refresh", headers={"X-CSRF-TOKEN": client.cookies["csrf_refresh_token"]}
    )
    assert refreshed.status_code == 200
    assert "access_token" not in refreshed.json()
    out = await client.post(
        "/logout", headers={"X-CSRF-TOKEN": client.cookies["csrf_refresh_token"]}
    )
    assert out.status_code == 200
    assert not client.cookies


async def test_every_answer_has_its_headers(client: httpx.AsyncClient) -> None:
    """A request id (the client's where it is well-formed) and the security headers."""
    for path in ("/protected", "/health/live", "/nope", "/openapi.json"):
        response = await client.get(path, headers={"X-Request-ID": "abc.DEF-1_2"})
        assert response.headers["X-Request-ID"] == "abc.DEF-1_2"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "unsafe-inline" not in response.headers["Content-Security-Policy"]
    odd = await client.get("/nope", headers={"X-Request-ID": "a b"})
    assert odd.headers["X-Request-ID"] == odd.json()["request_id"] != "a b"


async def test_every_code_has_its_page(client: httpx.AsyncClient) -> None:
    """The type of a problem document leads to its documentation; of no other code."""
    for code, error in catalogue().items():
        page = await client.get(f"/problems/{code}")
        assert page.status_code == 200
        assert str(error.status) in page.text
    assert (await client.get("/problems/nonsense")).status_code == 404


async def test_an_unexpected_error_tells_nothing(
    app: AsyncFlask, client: httpx.AsyncClient
) -> None:
    """A crash is a 500 problem without the exception's words."""

    async def crash() -> None:
        raise RuntimeError("secret words of a library")

    app.add_url_rule("/crash", view_func=crash)
    response = await client.get("/crash")
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert "secret words" not in response.text


async def test_without_the_database_it_is_503(
    client: httpx.AsyncClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database down, Redis warm: the access token works, a login is 503 with Retry-After."""
    token, _, _ = await genuine(client)

    def down(*_: object, **__: object) -> Any:
        raise Unavailable

    for every in ("begun", "rows"):
        monkeypatch.setattr(type(parts.database), every, down)
    assert (await client.get("/protected", headers=bearer(token))).status_code == 200
    response = await client.post("/login", json={"username": "testuser", "password": "testpass"})
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) >= 1
    out = await client.post("/logout", headers=bearer(token))
    assert out.status_code == 503
    assert not out.headers.get_list("set-cookie")
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()["database"]) == (503, "down")


def unguarded(app: Flask) -> list[str]:
    """Return the endpoints that neither ask for a token nor say that they are public."""
    return [name for name, view in app.view_functions.items() if guard_of(view) is None]


async def test_every_endpoint_is_public_or_guarded(app: AsyncFlask) -> None:
    """A route that says nothing is found (property 50)."""
    assert len(app.view_functions) == len({route.endpoint for route in TABLE})
    assert unguarded(app) == []
    app.add_url_rule("/forgotten", "forgotten", lambda: "")
    assert unguarded(app) == ["forgotten"]


async def test_the_document_is_valid_and_tells_the_guards(client: httpx.AsyncClient) -> None:
    """OpenAPI 3.1, every route in it, with the permissions it asks for and no secret inside."""
    document = (await client.get("/openapi.json")).json()
    validate(document)
    assert document["openapi"].startswith("3.1")
    described = {(m, p) for p, item in document["paths"].items() for m in item}
    assert len(described) == len(TABLE)
    listing = document["paths"]["/admin/users"]["get"]
    assert listing["x-guard"]["permissions_required"] == ["users:read"]
    assert {"200", "401", "403", "422"} <= set(listing["responses"])
    assert document["paths"]["/login"]["post"]["security"] == []


async def test_the_document_tells_every_way_to_prove_who_one_is(
    client: httpx.AsyncClient,
) -> None:
    """Bearer, cookies (with CSRF wherever something is changed), clients by Basic and by token."""
    document = (await client.get("/openapi.json")).json()
    schemes, paths = document["components"]["securitySchemes"], document["paths"]
    assert {name: (s["type"], s.get("scheme", s.get("in"))) for name, s in schemes.items()} == {
        **{f"{kind}_headers": ("http", "bearer") for kind in ("access", "refresh")},
        **{f"{kind}_cookies": ("apiKey", "cookie") for kind in ("access", "refresh")},
        **{f"{kind}_csrf": ("apiKey", "header") for kind in ("access", "refresh")},
        "client_secret_basic": ("http", "basic"),
        "client_credentials": ("oauth2", None),
    }
    flows = schemes["client_credentials"]["flows"]
    assert flows["clientCredentials"]["tokenUrl"] == "/oauth/token"
    assert schemes["refresh_csrf"]["name"] == "X-CSRF-TOKEN"
    users = paths["/admin/users"]
    machine = {"client_credentials": ["users:read"]}
    assert users["get"]["security"] == [{"access_headers": []}, {"access_cookies": []}, machine]
    assert {"access_cookies": [], "access_csrf": []} in users["post"]["security"]
    assert paths["/refresh"]["post"]["security"] == [
        {"refresh_headers": []}, {"refresh_cookies": [], "refresh_csrf": []},
    ]  # fmt: skip
    assert paths["/oauth/introspect"]["post"]["security"] == [{"client_secret_basic": []}, {}]
    # every scope that a route asks for is one that the flow has
    asked = {
        scope
        for item in paths.values()
        for operation in item.values()
        for one in operation["security"]
        for scope in one.get("client_credentials", ())
    }
    assert asked == set(flows["clientCredentials"]["scopes"])


async def test_the_document_lists_what_is_answered(
    app: AsyncFlask, client: httpx.AsyncClient
) -> None:
    """A redirect, a file that is not there, a method that is none; and guards of a team's own."""
    found = (await client.get("/openapi.json")).json()
    paths = found["paths"]
    assert (await client.get("/")).status_code == 302
    assert "302" in paths["/"]["get"]["responses"]
    assert "200" not in paths["/"]["get"]["responses"]
    missing = await client.get("/docs/nothing.css")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    for path in ("/docs/{name}", "/metrics", "/problems/{code}"):
        assert "`not_found`" in paths[path]["get"]["responses"]["404"]["description"], path
    assert (await client.put("/me")).status_code == 405
    assert "405 method_not_allowed" in found["info"]["description"]

    @roles_required("admin")
    async def for_admins() -> None:
        """For administrators."""

    @jwt_required(fresh=True)
    async def for_the_fresh() -> None:
        """For who has just signed in."""

    views = (for_admins, for_the_fresh)
    app.view_functions.update({f"theirs.{view.__name__}": view for view in views})
    lines = [
        SimpleNamespace(method="GET", path=f"/{v.__name__}", endpoint=f"theirs.{v.__name__}")
        for v in views
    ]
    theirs = openapi.document(app, lines)["paths"]
    listed = {path: item["get"]["responses"] for path, item in theirs.items()}
    assert "`insufficient_role`" in listed["/for_admins"]["403"]["description"]
    assert "`fresh_token_required`" in listed["/for_the_fresh"]["401"]["description"]
    assert "`fresh_token_required`" not in listed["/for_admins"]["401"]["description"]


def patterns(node: Any) -> set[str]:
    """Return every ``pattern`` of a document."""
    found = set()
    if isinstance(node, dict):
        own = node.get("pattern")
        found = {own} if isinstance(own, str) else set()
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return found.union(*map(patterns, inner))


async def test_the_patterns_are_those_of_json_schema(client: httpx.AsyncClient) -> None:
    """Of the whole text and in ECMA-262's words, which has no ``\\Z``; a line break is refused."""
    found = patterns((await client.get("/openapi.json")).json())
    assert len(found) >= 3
    for pattern in found:
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        assert not re.search(r"\\[ZAzG]|\(\?[^:=!]", pattern), pattern
    for field in (RoleName(), Permission(), Audience()):
        for text in ("users:read\n", "users:read\u2028", "users:read ", "", "\nusers:read"):
            with pytest.raises(ValidationError):
                field.deserialize(text)
        assert field.deserialize("users:read") == "users:read"


async def test_the_documentation_works_offline(client: httpx.AsyncClient) -> None:
    """Swagger UI comes from this service alone, under a policy without inline anything."""
    page = await client.get("/docs")
    assert "http" not in page.text.replace("http-equiv", "")
    for path in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
        assert f"/docs/{path}" in page.text
        assert (await client.get(f"/docs/{path}")).status_code == 200
    assert (await client.get("/docs/../../api/app.py")).status_code == 404


@pytest.mark.parametrize("prefix", ["", "__Host-"])
async def test_the_documentation_sends_the_csrf_of_the_token_that_goes_along(
    settings: Settings, prefix: str
) -> None:
    """Swagger UI's start reads the cookies by their names here, and for /refresh the refresh's."""
    app = create_app(replace(settings, cookie_secure=bool(prefix)))
    async with app.running(), client_of(app) as client:
        start = (await client.get("/docs/start.js")).text
    first, _, rest = start.partition("\n")
    names = json.loads(first.removeprefix("const cookies = ").removesuffix(";"))
    assert names == {
        "access": f"{prefix}csrf_access_token",
        "refresh": f"{prefix}csrf_refresh_token",
    }
    assert 'pathname === "/refresh"' in rest
    assert "csrf_" not in rest


async def test_the_users_are_listed_page_by_page(client: httpx.AsyncClient, parts: Parts) -> None:
    """Every user once, in order, whatever the page's size; a cursor of another list is 422."""
    from api.services.audit import SYSTEM

    for number in range(5):
        await parts.users.create(f"u{number}", "kumquat vienna 77", None, ["user"], SYSTEM)
    tokens = await sign_in(client, "admin", "adminpass", transport="json")
    headers = bearer(tokens["access_token"])
    for sort in ("created_at", "-created_at", "username", "-username"):
        seen, cursor = [], None
        while True:
            query = {"limit": 2, "sort": sort} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/admin/users", params=query, headers=headers)).json()
            seen += [item["username"] for item in page["items"]]
            if (cursor := page["next_cursor"]) is None:
                break
            last = cursor
        assert len(seen) == len(set(seen)) == 7
        if "username" in sort:
            assert seen == sorted(seen, reverse=sort.startswith("-"))
    wrong = await client.get("/admin/users", params={"cursor": last, "q": "u"}, headers=headers)
    assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "cursor")
    found = await client.get("/admin/users", params={"q": "U3"}, headers=headers)
    assert [item["username"] for item in found.json()["items"]] == ["u3"]
    assert "password_hash" not in found.text
    one = await client.get(f"/admin/users/{found.json()['items'][0]['id']}", headers=headers)
    assert one.json()["username"] == "u3"
    nobody = await client.get("/admin/users/00000000-0000-7000-8000-000000000000", headers=headers)
    assert nobody.status_code == 404


async def test_guards_on_views_of_ones_own(app: AsyncFlask, client: httpx.AsyncClient) -> None:
    """Async and plain views, roles and permissions, optional, fresh, and the library's own."""

    @app.get("/g/admin")
    @roles_required("admin")
    async def admin() -> dict[str, Any]:
        return {"who": get_jwt()["username"]}

    @app.get("/g/plain")
    @roles_accepted("auditor", "user")
    def plain() -> dict[str, Any]:
        return {"who": get_jwt()["username"]}

    @app.get("/g/some")
    @permissions_accepted("users:read", "audit:read")
    async def some() -> dict[str, Any]:
        return {}

    @app.get("/g/optional")
    @jwt_required(optional=True)
    async def optional() -> dict[str, Any]:
        return {"who": get_jwt().get("username")}

    @app.get("/g/fresh")
    @jwt_required(fresh=True)
    async def fresh() -> dict[str, Any]:
        return {}

    @app.get("/g/bare")
    @bare_jwt_required()
    async def bare() -> dict[str, Any]:
        return {"who": get_jwt()["username"]}

    tokens = await sign_in(client, transport="json")
    user = bearer(tokens["access_token"])
    admin_user = bearer(
        (await sign_in(client, "admin", "adminpass", transport="json"))["access_token"]
    )
    refused = await client.get("/g/admin", headers=user)
    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_role")
    assert refused.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope"'
    assert (await client.get("/g/admin", headers=admin_user)).json() == {"who": "admin"}
    assert (await client.get("/g/plain", headers=user)).json() == {"who": "testuser"}
    assert (await client.get("/g/some", headers=user)).json()["code"] == "insufficient_permission"
    assert (await client.get("/g/some", headers=admin_user)).status_code == 200
    assert (await client.get("/g/optional")).json() == {"who": None}
    assert (await client.get("/g/optional", headers=bearer("x"))).status_code == 401
    refreshed = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
    later = bearer(refreshed.json()["access_token"])
    assert (await client.get("/g/fresh", headers=user)).status_code == 200
    assert (await client.get("/g/fresh", headers=later)).json()["code"] == "fresh_token_required"
    assert (await client.get("/g/bare", headers=user)).json() == {"who": "testuser"}
    await client.post("/logout", headers=user)
    assert (await client.get("/g/bare", headers=user)).json()["code"] == "token_revoked"
    missing = await client.get("/g/bare")
    assert (missing.status_code, missing.json()["code"]) == (401, "missing_token")


async def test_a_guard_that_would_guard_nothing_is_refused(app: AsyncFlask) -> None:
    """No roles named, a decorator without parentheses, an async loader: refused at start-up."""
    with pytest.raises(TypeError):
        roles_required()
    with pytest.raises(TypeError):
        roles_required(unguarded)  # type: ignore[arg-type]
    manager = app.extensions["flask-jwt-extended"]

    async def loader(_header: Any, _claims: Any) -> bool:
        return False

    with pytest.raises(TypeError, match="without awaiting"):
        manager.token_in_blocklist_loader(loader)
