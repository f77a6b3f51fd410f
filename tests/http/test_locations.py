"""Tokens by query string and JSON where that is switched on, and cookies under TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from api.app import create_app
from api.settings import Settings
from tests.conftest import bearer, client_of, sign_in

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def everywhere(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that takes tokens from all four places."""
    locations = ("headers", "cookies", "query_string", "json")
    app = create_app(replace(settings, token_location=locations))
    async with app.running(), client_of(app) as client:
        yield client


async def test_by_query_string(everywhere: httpx.AsyncClient) -> None:
    """?jwt= signs in a request, and is no unknown parameter of a list."""
    tokens = await sign_in(everywhere, "admin", "adminpass", transport="json")
    query = {"jwt": tokens["access_token"]}
    assert (await everywhere.get("/protected", params=query)).status_code == 200
    listed = await everywhere.get("/admin/users", params=query | {"limit": 1})
    assert listed.status_code == 200, listed.text
    out = await everywhere.post("/logout", params={"jwt": tokens["refresh_token"]})
    assert out.json() == {"logout": True}
    assert (await everywhere.get("/protected", params=query)).json()["code"] == "token_revoked"


async def test_by_json(everywhere: httpx.AsyncClient) -> None:
    """A member of the body signs in a request, and is no unknown field of it."""
    tokens = await sign_in(everywhere, transport="json")
    body = {"access_token": tokens["access_token"], "email": "a@example.org"}
    changed = await everywhere.patch("/me", json=body)
    assert (changed.status_code, changed.json()["email"]) == (200, "a@example.org")
    again = await everywhere.post("/refresh", json={"refresh_token": tokens["refresh_token"]})
    assert again.status_code == 200, again.text
    assert {"access_token", "refresh_token"} <= set(again.json())
    assert not again.headers.get_list("set-cookie")
    bad = await everywhere.post(
        "/refresh", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert bad.status_code in {400, 401}


async def test_not_where_it_is_off(client: httpx.AsyncClient) -> None:
    """By default neither place is looked at."""
    tokens = await sign_in(client, transport="json")
    query = await client.get("/protected", params={"jwt": str(tokens["access_token"])})
    assert query.json()["code"] == "missing_token"
    refresh = await client.post("/refresh", json={"refresh_token": tokens["refresh_token"]})
    assert refresh.json()["code"] == "missing_token"


async def test_cookies_under_tls_are_host_bound(settings: Settings) -> None:
    """Secure, __Host-, HttpOnly for tokens and not for CSRF, SameSite, small (property 25)."""
    app = create_app(replace(settings, cookie_secure=True))
    async with app.running(), client_of(app) as client:
        body = {"username": "testuser", "password": "testpass", "transport": "cookies"}
        response = await client.post("/login", json=body)
        cookies = response.headers.get_list("set-cookie")
    names = [cookie.partition("=")[0] for cookie in cookies]
    assert sorted(names) == [
        "__Host-access_token", "__Host-csrf_access_token", "__Host-csrf_refresh_token",
        "__Host-refresh_token",
    ]  # fmt: skip
    for name, cookie in zip(names, cookies, strict=True):
        assert "Secure" in cookie
        assert "SameSite=Lax" in cookie
        assert "Path=/" in cookie
        assert "Domain" not in cookie
        assert ("HttpOnly" in cookie) == ("csrf" not in name)
        assert len(cookie) < 4096


async def test_where_cookies_are_off_none_is_set(settings: Settings) -> None:
    """Headers alone: a login sets no cookie, and asking for cookies is 422."""
    app = create_app(replace(settings, token_location=("headers",)))
    async with app.running(), client_of(app) as client:
        tokens = await sign_in(client)
        assert not client.cookies
        assert (await client.get("/me", headers=bearer(tokens["access_token"]))).status_code == 200
        body = {"username": "testuser", "password": "testpass", "transport": "cookies"}
        refused = await client.post("/login", json=body)
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "transport")
        out = await client.post("/logout", headers=bearer(tokens["access_token"]))
        assert not out.headers.get_list("set-cookie")
