"""What every answer has, how tokens travel, and what is forged: nothing gets in, nothing breaks."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from flask import Flask
from flask_jwt_extended import get_jwt
from flask_jwt_extended import jwt_required as bare_jwt_required
from openapi_spec_validator import validate

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
from tests.conftest import bearer, sign_in

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def b64(data: bytes) -> str:
    """Return unpadded base64url."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(parts: Parts, claims: str | dict[str, Any], header: str | dict[str, Any]) -> str:
    """Sign what is given with the service's own key, however odd it is."""
    texts = [part if isinstance(part, str) else json.dumps(part) for part in (header, claims)]
    message = ".".join(b64(text.encode()) for text in texts)
    return f"{message}.{b64(parts.keys.current.private.sign(message.encode()))}"


async def genuine(client: httpx.AsyncClient) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return a token that works, its header and its claims."""
    token = str((await sign_in(client, transport="json"))["access_token"])
    assert (await client.get("/protected", headers=bearer(token))).status_code == 200
    claims = jwt.decode(token, options={"verify_signature": False})
    return token, jwt.get_unverified_header(token), claims


async def refused(client: httpx.AsyncClient, token: str, code: str = "invalid_token") -> None:
    """Assert that a token is refused with 401 and the code."""
    response = await client.get("/protected", headers=bearer(token))
    assert (response.status_code, response.json()["code"]) == (401, code), token[:80]
    assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


CLAIM_CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    *((f"no {n}", lambda c, n=n: c.pop(n))
      for n in ("type", "exp", "iat", "nbf", "jti", "sub", "sid", "iss", "aud", "ver", "roles")),
    *((f"exp {v!r}", lambda c, v=v: c.update(exp=v))
      for v in ("9999999999", None, -1, 2**53 + 1, 1e300, True, [], float("nan"), float("inf"))),
    ("iss", lambda c: c.update(iss="rolecall ")), ("aud", lambda c: c.update(aud="other")),
    ("aud list", lambda c: c.update(aud=["rolecall"])), ("sub int", lambda c: c.update(sub=1)),
    ("iat later", lambda c: c.update(iat=int(time.time()) + 100)),
    ("nbf later", lambda c: c.update(nbf=int(time.time()) + 100)),
    ("type refresh", lambda c: c.update(type="refresh")), ("type x", lambda c: c.update(type="x")),
    ("roles text", lambda c: c.update(roles="admin")), ("sid null", lambda c: c.update(sid=None)),
]  # fmt: skip


@pytest.mark.parametrize("change", [c for _, c in CLAIM_CHANGES], ids=[n for n, _ in CLAIM_CHANGES])
async def test_well_signed_but_wrong_claims_are_refused(
    client: httpx.AsyncClient, parts: Parts, change: Callable[[dict[str, Any]], Any]
) -> None:
    """Required claims, their types, issuer, audience and times (properties 7 to 12)."""
    _, header, claims = await genuine(client)
    assert (
        await client.get("/protected", headers=bearer(signed(parts, claims, header)))
    ).is_success
    change(claims)
    await refused(client, signed(parts, claims, header))


async def test_expiry_is_to_the_second(client: httpx.AsyncClient, parts: Parts) -> None:
    """A token that expired this second is token_expired; one a moment ahead works."""
    _, header, claims = await genuine(client)
    await refused(
        client, signed(parts, claims | {"exp": int(time.time())}, header), "token_expired"
    )
    ahead = signed(parts, claims | {"exp": int(time.time()) + 2}, header)
    assert (await client.get("/protected", headers=bearer(ahead))).is_success


async def test_forged_headers_and_signatures_are_refused(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """none, confusion with the public key, foreign keys, kid, crit, typ (properties 1 to 7)."""
    token, header, claims = await genuine(client)
    head, body, signature = token.split(".")
    public = parts.keys.current.public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for algorithm in ("none", "None", "NONE", "nOnE"):
        forged = b64(json.dumps(header | {"alg": algorithm}).encode())
        for end in ("", signature):
            await refused(client, f"{forged}.{body}.{end}")
    await refused(client, f"{head}.{body}.")
    import hashlib
    import hmac

    for key in (public, b"", b"\0", json.dumps(parts.keys.jwks()).encode()):
        forged = b64(json.dumps(header | {"alg": "HS256"}).encode())
        mac = b64(hmac.digest(key, f"{forged}.{body}".encode(), hashlib.sha256))
        await refused(client, f"{forged}.{body}.{mac}")
    for odd in (
        {"kid": "../../etc/passwd"}, {"kid": "' OR 1=1 --"}, {"kid": 1}, {"kid": None},
        {"kid": ["x"]}, {"crit": ["exp"]}, {"crit": []}, {"typ": "JWT"}, {"typ": "rt+jwt"},
        {"alg": "ES256"}, {"alg": 1},
    ):  # fmt: skip
        await refused(client, signed(parts, claims, header | odd))
    ignored = {"jwk": {"kty": "OKP"}, "jku": "http://127.0.0.1:1/x", "x5u": "http://127.0.0.1:1/"}
    assert (
        await client.get("/protected", headers=bearer(signed(parts, claims, header | ignored)))
    ).is_success


async def test_a_member_given_twice_is_refused(client: httpx.AsyncClient, parts: Parts) -> None:
    """A claim or a header given twice has two readings, so it has none (property 10)."""
    _, header, claims = await genuine(client)
    twice = json.dumps(claims)[:-1] + ', "sub": "someone"}'
    await refused(client, signed(parts, twice, header))
    await refused(client, signed(parts, claims, json.dumps(header)[:-1] + ', "alg": "EdDSA"}'))


async def test_the_encoding_is_strict(client: httpx.AsyncClient) -> None:
    """Padding, the other alphabet, trailing bits, space, JSON and JWE forms, size (13, 14)."""
    token, _, _ = await genuine(client)
    head, body, signature = token.split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    sibling = last[last.index(signature[-1]) ^ 1]
    for odd in (
        f"{token}=", f"{head}=.{body}.{signature}", f"{head}.{body}==.{signature}",
        f"{head}.{body}.{signature[:-1]}{sibling}", f"{head}.{body}.{signature[:-1]}+",
        f"{head}.{body}", f"{token}.x", f"{head}.{body}.x.y.z", "a" * 9000, f"{token}/",
    ):  # fmt: skip
        await refused(client, odd)


async def test_every_byte_counts(client: httpx.AsyncClient) -> None:
    """No change of a single character of a genuine, remembered token is accepted (property 15)."""
    token, _, _ = await genuine(client)
    for index in range(0, len(token), 7):
        other = "A" if token[index] != "A" else "B"
        changed = token[:index] + other + token[index + 1 :]
        response = await client.get("/protected", headers=bearer(changed))
        assert response.status_code == 401, index
    assert (await client.get("/protected", headers=bearer(token))).is_success


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("bearer {}", 200), ("BEARER   {}", 200), (", ,", 400), ("Bearer ,,0", 400),
        ("Bearer", 400), ("Bearer a b", 400), ("Bearer \xe9", 400), ("Basic x, Bearer {}", 400),
        ("Basic eDp5", 401), ("", 401), ("{}", 401),
    ],
)  # fmt: skip
async def test_authorization_headers(client: httpx.AsyncClient, header: str, status: int) -> None:
    """The scheme in any case, one credential, nothing 5xx (properties 18 to 20)."""
    token, _, _ = await genuine(client)
    client.cookies.clear()
    value = header.format(token).encode("latin-1")
    response = await client.get("/protected", headers={"Authorization": value})
    assert response.status_code == status, response.text
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_a_header_and_a_cookie_of_two_users_are_refused(client: httpx.AsyncClient) -> None:
    """Whose request is it? Nobody's (property 19)."""
    await sign_in(client, "admin", "adminpass", transport="cookies")
    other = await sign_in(client, transport="json")
    response = await client.get("/protected", headers=bearer(other["access_token"]))
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


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

    monkeypatch.setattr(type(parts.database), "_transaction", down)
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


async def test_the_documentation_works_offline(client: httpx.AsyncClient) -> None:
    """Swagger UI comes from this service alone, under a policy without inline anything."""
    page = await client.get("/docs")
    assert "http" not in page.text.replace("http-equiv", "")
    for path in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
        assert f"/docs/{path}" in page.text
        assert (await client.get(f"/docs/{path}")).status_code == 200
    assert (await client.get("/docs/../../api/app.py")).status_code == 404


async def test_the_users_are_listed_page_by_page(client: httpx.AsyncClient, parts: Parts) -> None:
    """Every user once, in order, whatever the page's size; a cursor of another list is 422."""
    from api.services.audit import Origin

    for number in range(5):
        await parts.users.create(f"u{number}", "kumquat vienna 77", None, ["user"], Origin())
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
