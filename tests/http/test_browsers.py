"""Cookies, CSRF, sign-in forged by another site, CORS and CSP: what a browser makes of answers."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.asgi import AsyncFlask
from api.errors import Unavailable
from api.parts import Parts
from api.routes import TABLE
from api.settings import Settings
from tests.conftest import bearer, client_of, sign_in
from tests.http._forge import opened, signed
from tests.http.test_hostile_headers import NOBODY, guard, path_of, rows

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

RIGHT = {"username": "testuser", "password": "testpass"}
ALLOWED, OTHERS = "https://app.example.org", "https://evil.example"
NAMES = {"access_token", "refresh_token", "csrf_access_token", "csrf_refresh_token"}


def cookies_of(answer: httpx.Response) -> dict[str, dict[str, str]]:
    """Return what an answer sets: attributes in lower case, ``value`` among them, by name."""
    found = {}
    for line in answer.headers.get_list("Set-Cookie"):
        pair, *attributes = line.split("; ")
        name, _, value = pair.partition("=")
        split = (attribute.partition("=") for attribute in attributes)
        found[name] = {key.lower(): text for key, _, text in split} | {"value": value}
    return found


# --- 25: cookies ---


@pytest.mark.parametrize("secure", [True, False])
async def test_cookies_are_cleared_as_they_were_set(settings: Settings, secure: bool) -> None:
    """Set by login and refresh, cleared by logout: the same names and attributes (25)."""
    app = create_app(replace(settings, cookie_secure=secure))
    prefix = "__Host-" if secure else ""
    async with app.running(), client_of(app) as client:
        client.base_url = httpx.URL("https://test" if secure else "http://test")
        login = await client.post("/login", json=RIGHT | {"transport": "cookies"})
        csrf = {"X-CSRF-TOKEN": client.cookies[f"{prefix}csrf_refresh_token"]}
        refresh = await client.post("/refresh", headers=csrf)
        assert refresh.status_code == 200
        csrf = {"X-CSRF-TOKEN": client.cookies[f"{prefix}csrf_access_token"]}
        jar = dict(client.cookies)
        everywhere = await client.post("/logout/all", headers=csrf)
        assert everywhere.status_code == 200
        client.cookies.update(jar)
        refused = await client.post("/logout", headers=csrf)
        assert (refused.status_code, refused.json()["code"]) == (401, "token_revoked")
    for answer in (login, refresh, everywhere, refused):
        found = cookies_of(answer)
        assert set(found) == {prefix + name for name in NAMES}
        for name, cookie in found.items():
            cleared = answer in (everywhere, refused)
            expected = {"path", "samesite", "value", "expires"}
            expected |= {"secure"} if secure else set()
            expected |= set() if "csrf" in name else {"httponly"}
            # werkzeug clears by a date alone
            expected |= set() if cleared else {"max-age"}
            assert set(cookie) | {"expires"} == expected, name
            assert (cookie["path"], cookie["samesite"]) == ("/", "Lax")
            assert (cookie["value"] == "") == cleared
            assert not cleared or cookie["expires"].startswith("Thu, 01 Jan 1970")
            assert cleared or 0 < int(cookie["max-age"]) <= 604_800
            assert len(name) + len(cookie["value"]) < 3_900


@pytest.mark.parametrize("path", ["/logout", "/logout/all"])
async def test_a_refused_logout_leaves_the_cookies(
    app: AsyncFlask, client: httpx.AsyncClient, parts: Parts, path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A session that lives keeps its cookies: on every answer but 200 and its own 401 (25)."""
    await sign_in(client, transport="cookies")
    csrf = {"X-CSRF-TOKEN": client.cookies["csrf_access_token"]}
    jar = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": OTHERS}
    access = f"access_token={client.cookies['access_token']}"
    body = {"content": b'{"a": 1}', "headers": csrf | {"Content-Type": "application/json"}}

    async def ask(**request: Any) -> httpx.Response:
        headers = {"Cookie": jar} | request.pop("headers", {})
        async with client_of(app) as browser:
            return await browser.post(path, headers=headers, **request)

    for expected, request in (
        # a form of another site: SameSite leaves the cookies out
        (401, {"headers": {"Cookie": "", **form}, "content": b"a=1"}),
        (401, {"headers": {"Cookie": ""}}),
        (401, {"headers": {"Cookie": "theme=dark; access_token="}}),
        (403, {}),
        (403, {"headers": form, "content": b"a=1"}),
        (403, {"headers": {"X-CSRF-TOKEN": "x"}}),
        # the header's token decides, and says nothing of the session in the cookies
        (401, {"headers": bearer("a.b.c") | csrf}),
        (400, {"headers": {"Authorization": "Bearer a, Bearer b"} | csrf}),
        (400, {"headers": {"Cookie": f"{access}; access_token=x"} | csrf}),
        (422, body),
        (415, {"content": b"a=1", "headers": csrf | {"Content-Type": "text/plain"}}),
        (413, {"content": b" " * (app.config["MAX_CONTENT_LENGTH"] + 1), "headers": csrf}),
    ):  # fmt: skip
        answer = await ask(**request)
        assert answer.status_code == expected, (request, answer.text)
        assert cookies_of(answer) == {}, request
    for failure, status in ((Unavailable(), 503), (LookupError(), 500)):
        with monkeypatch.context() as patched:

            async def fail(*_: Any, failure: Exception = failure, **__: Any) -> Any:
                raise failure

            patched.setattr(parts.sessions, "end", fail)
            patched.setattr(parts.sessions, "end_all", fail)
            answer = await ask(headers=csrf)
        assert (answer.status_code, cookies_of(answer)) == (status, {})
    assert (await client.get("/protected")).status_code == 200
    done = await ask(headers=csrf)
    assert (done.status_code, set(cookies_of(done))) == (200, NAMES)
    again = await ask(headers=csrf)
    assert (again.status_code, set(cookies_of(again))) == (401, NAMES)


async def test_a_forged_logout_beside_an_expired_access_token(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """The refresh token is good and CSRF is missing: 403, and the cookies stay (24, 25)."""
    await sign_in(client, transport="cookies")
    token = client.cookies["access_token"]
    header, claims = opened(token)
    refresh = client.cookies["refresh_token"]
    expired = signed(parts, claims | {"exp": claims["iat"] - 10}, header)
    for cookie, status, code in (
        (f"access_token={expired}; refresh_token={refresh}", 403, "csrf_failed"),
        (f"access_token={expired}; refresh_token=x", 401, "token_expired"),
        (f"access_token={token}; refresh_token=x", 403, "csrf_failed"),
    ):
        client.cookies.clear()
        answer = await client.post("/logout", headers={"Cookie": cookie})
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert set(cookies_of(answer)) == (NAMES if status == 401 else set())


async def test_a_stale_token_logs_out_too(app: AsyncFlask, client: httpx.AsyncClient) -> None:
    """Whoever's roles have changed may end their session all the same; the cookies go."""
    user = (await sign_in(client, transport="cookies", password="testpass"))["user"]
    jar = dict(client.cookies)
    async with client_of(app) as admin:
        token = (await sign_in(admin, "admin", "adminpass", transport="json"))["access_token"]
        admin.cookies.clear()
        url = f"/admin/users/{user['id']}/roles"  # type: ignore[index]
        answer = await admin.put(url, json={"roles": []}, headers=bearer(token))
        assert answer.status_code == 200
    answer = await client.post("/logout", headers={"X-CSRF-TOKEN": jar["csrf_access_token"]})
    assert (answer.status_code, set(cookies_of(answer))) == (200, NAMES)
    answer = await client.get("/protected", headers=bearer(jar["access_token"]))
    assert (answer.status_code, answer.json()["code"]) == (401, "token_revoked")


async def test_errors_clear_no_cookies_but_logouts(client: httpx.AsyncClient) -> None:
    """A 401, 403 or 503 elsewhere keeps the browser as it is."""
    await sign_in(client, transport="cookies")
    for method, path in (("POST", "/refresh"), ("PATCH", "/me"), ("GET", "/admin/users")):
        answer = await client.request(method, path, json={"email": None})
        assert answer.status_code == 403
        assert not cookies_of(answer)
    assert not cookies_of(await client.get("/protected", headers=bearer("a.b.c")))


async def test_odd_cookies_sign_nobody_in(client: httpx.AsyncClient) -> None:
    """Quoted, doubled, prefixed, under a look-alike's name: none, or 400 (19, 24)."""
    token = str((await sign_in(client, transport="json"))["access_token"])
    client.cookies.clear()
    for cookie, statuses in {
        f"access_token={token}": {200}, f"a=b; access_token={token}; c=d": {200},
        f"Access_Token={token}": {401}, f"__Host-access_token={token}": {401},
        f"access_token =x; access_token={token}": {200, 400},
        f"access_token={token}; access_token=x": {400}, f"access_token=; access_token={token}":
        {200, 400}, "access_token=": {401}, "access_token": {401}, "=x; ;;; =": {401},
        f"access_token={token}, access_token=x": {401}, f"refresh_token={token}": {401},
        f"$Version=1; access_token={token}": {200}, "access_token=" + "x" * 20_000: {401},
    }.items():  # fmt: skip
        answer = await client.get("/protected", headers={"Cookie": cookie})
        assert answer.status_code in statuses, (cookie[:40], answer.text)


# --- 24: CSRF ---


async def test_every_change_by_cookie_asks_for_csrf(
    app: AsyncFlask, client: httpx.AsyncClient
) -> None:
    """On every guarded route that is no GET: missing, wrong, another's, the other token's (24)."""
    await sign_in(client, "admin", "adminpass", transport="cookies")
    foreign = client.cookies["csrf_access_token"]
    client.cookies.clear()
    await sign_in(client, "admin", "adminpass", transport="cookies")
    jar = dict(client.cookies)
    csrf = {"access": jar["csrf_access_token"], "refresh": jar["csrf_refresh_token"]}
    client.cookies.clear()
    asked = 0
    for route in TABLE:
        kinds = guard(app, route).kinds
        if guard(app, route).public or guard(app, route).client or route.method == "GET":
            continue
        asked += 1
        for kind in kinds:
            other = csrf["refresh" if kind == "access" else "access"]
            mine = {"Cookie": f"{kind}_token={jar[f'{kind}_token']}"}
            tossed = mine["Cookie"] + "; csrf_access_token=x; csrf_refresh_token=x"
            for headers in (
                mine, mine | {"X-CSRF-TOKEN": ""}, mine | {"X-CSRF-TOKEN": "x"},
                mine | {"X-CSRF-TOKEN": foreign}, mine | {"X-CSRF-TOKEN": other},
                mine | {"X-CSRF-TOKEN": csrf[kind].upper() + " "},
                mine | {"X-CSRF-TOKEN": f"{csrf[kind]},{csrf[kind]}"},
                mine | {"X-CSRF-TOKEN": b"\xe9"}, mine | {"X-CSRF-TOKEN": b"\xed\xa0\x80"},
                {"Cookie": tossed, "X-CSRF-TOKEN": "x"},
            ):  # fmt: skip
                answer = await client.request(route.method, path_of(route), headers=headers)
                code = answer.json()["code"]
                assert (answer.status_code, code) == (403, "csrf_failed"), (route, headers)
    assert asked > 15
    assert (await client.get("/me", headers={"Cookie": mine["Cookie"]})).status_code in {200, 401}


async def test_csrf_is_looked_at_before_anything_is_done(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """A forged /refresh spends nothing, a forged /logout ends nothing (24)."""
    await sign_in(client, transport="cookies")
    jar = dict(client.cookies)
    before = await rows(parts)
    for path in ("/refresh", "/logout", "/logout/all"):
        forged = await client.post(path)
        assert (forged.status_code, forged.json()["code"]) == (403, "csrf_failed")
        client.cookies.update(jar)
    assert await rows(parts) == before
    headers = {"X-CSRF-TOKEN": jar["csrf_refresh_token"]}
    assert (await client.post("/refresh", headers=headers)).status_code == 200


async def test_no_other_site_signs_a_browser_in(app: AsyncFlask, client: httpx.AsyncClient) -> None:
    """What a form or a simple request can send is 415, and sets no cookie: no login CSRF."""
    body = '{"username": "testuser", "password": "testpass"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded",
                 "multipart/form-data; boundary=x", ""):  # fmt: skip
        for path in ("/login", "/register"):
            headers = {"Content-Type": kind, "Origin": OTHERS}
            answer = await client.post(path, content=body, headers=headers)
            assert (answer.status_code, cookies_of(answer)) == (415, {}), kind
    # and what it cannot send, a preflight must allow
    headers = {"Origin": OTHERS, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "content-type"}  # fmt: skip
    preflight = await client.options("/login", headers=headers)
    assert not [name for name in preflight.headers if name.startswith("access-control")]


# --- CORS ---


@pytest.fixture
async def shared(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that one other origin may use."""
    app = create_app(replace(settings, cors_origins=(ALLOWED, "http://localhost:3000")))
    async with app.running(), client_of(app) as client:
        yield client


async def test_only_named_origins_may_read(shared: httpx.AsyncClient) -> None:
    """To the letter; everybody else is told nothing, on success, on errors and preflights."""
    for origin in (ALLOWED, "http://localhost:3000"):
        for path in ("/health/live", "/protected", "/nowhere"):
            answer = await shared.get(path, headers={"Origin": origin})
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"
            assert "Origin" in answer.headers["Vary"]
            exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
            assert {"X-Request-ID", "Retry-After", "WWW-Authenticate"} == set(exposed)
    for origin in (
        "null", "*", "", "https://app.example.org.evil.example", "https://evilapp.example.org",
        "https://app.example.org:8443", "http://app.example.org", "https://app.example.org/",
        "https://app.example.org@evil.example", "https://appXexample.org", "HTTPS://APP.EXAMPLE.ORG",
        "https://app.example.org, https://evil.example", "https://app.example.org https://x.y",
        "file://", "https://app.example.org\xe9", "http://localhost:3001", "http://localhost",
    ):  # fmt: skip
        headers = {"Origin": origin.encode("latin-1"), "Access-Control-Request-Method": "POST"}
        for answer in (
            await shared.get("/protected", headers=headers),
            await shared.options("/login", headers=headers),
            await shared.post("/login", json=RIGHT, headers=headers),
        ):
            told = [name for name in answer.headers if name.startswith("access-control")]
            assert told == [], origin


async def test_what_is_kept_is_kept_by_origin(shared: httpx.AsyncClient) -> None:
    """Vary: Origin on every answer, once: a cache must not give one origin what another got."""
    for headers in ({}, {"Origin": ALLOWED}, {"Origin": OTHERS}):
        for path in ("/.well-known/jwks.json", "/docs", "/docs/swagger-ui.css", "/openapi.json",
                     "/problems/not_found", "/health/live", "/nowhere", "/protected"):  # fmt: skip
            answer = await shared.get(path, headers=headers)
            assert answer.headers.get_list("Vary") == ["Origin"], (path, headers)
            etag = answer.headers.get("ETag", "-")
            answer = await shared.get(path, headers=headers | {"If-None-Match": etag})
            assert answer.headers.get_list("Vary") == ["Origin"], (path, headers)


async def test_without_other_origins_nothing_varies(client: httpx.AsyncClient) -> None:
    """Where no origin is named, an answer is the same for all."""
    answer = await client.get("/.well-known/jwks.json", headers={"Origin": ALLOWED})
    assert answer.status_code == 200
    assert "Vary" not in answer.headers


async def test_a_preflight_allows_what_the_contract_needs(shared: httpx.AsyncClient) -> None:
    """The methods of the path, the headers of ours and no other; remembered for ten minutes."""
    for path, method in (("/login", "POST"), ("/me", "PATCH"), (f"/admin/users/{NOBODY}", "PUT")):
        answer = await shared.options(path, headers={
            "Origin": ALLOWED, "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization, x-csrf-token, x-evil",
        })  # fmt: skip
        assert answer.status_code < 300
        assert answer.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        allowed = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert set(allowed) == {"authorization", "x-csrf-token"}
        assert answer.headers["Access-Control-Max-Age"] == "600"
        assert "*" not in str(answer.headers)
        assert not cookies_of(answer)


async def test_a_browser_app_of_a_named_origin_works(shared: httpx.AsyncClient) -> None:
    """Login, a change with CSRF, logout: with credentials, every answer readable."""
    origin = {"Origin": ALLOWED}
    await shared.post("/login", json=RIGHT | {"transport": "cookies"}, headers=origin)
    csrf = {"X-CSRF-TOKEN": shared.cookies["csrf_access_token"]}
    changed = await shared.patch("/me", json={"email": "a@b.cd"}, headers=origin | csrf)
    assert changed.status_code == 200
    out = await shared.post("/logout", headers=origin | csrf)
    assert out.status_code == 200
    assert out.headers["Access-Control-Allow-Origin"] == ALLOWED


# --- CSP ---


async def test_every_answer_has_a_policy_and_no_page_runs_inline_code(
    client: httpx.AsyncClient,
) -> None:
    """On every route and every error; ``unsafe-inline``, ``unsafe-eval`` and * nowhere."""
    admin = bearer((await sign_in(client, "admin", "adminpass", transport="json"))["access_token"])
    client.cookies.clear()
    answers = [await client.get("/nowhere"), await client.request("PUT", "/login")]
    for route in TABLE:
        for headers in ({}, admin):
            if route.method == "GET":
                answers.append(await client.get(path_of(route), headers=headers))
            answers.append(await client.options(path_of(route), headers=headers))
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy, answer.url
        assert "frame-ancestors 'none'" in policy
        for loose in ("unsafe", "*", "http:", "https:", "blob:"):
            assert loose not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        kind = answer.headers.get("Content-Type", "")
        if kind.startswith("text/html"):
            assert kind == "text/html; charset=utf-8"
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|javascript:",
                                 answer.text, re.IGNORECASE), answer.url  # fmt: skip


async def test_what_carries_a_token_is_not_stored(client: httpx.AsyncClient) -> None:
    """Login, refresh and whatever is private: Cache-Control no-store."""
    tokens = await sign_in(client, transport="json")
    for answer in (
        await client.post("/login", json=RIGHT),
        await client.post("/refresh", headers=bearer(tokens["refresh_token"])),
        await client.get("/me", headers=bearer(tokens["access_token"])),
        await client.get("/me/sessions", headers=bearer(tokens["access_token"])),
        await client.get("/protected"),
    ):
        assert answer.headers["Cache-Control"] == "no-store", answer.url
