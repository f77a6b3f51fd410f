"""Headers, methods and paths of every kind, on every route: refused by the contract, never 5xx."""

from __future__ import annotations

import re
import string
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from sqlalchemy import select

from api.asgi import AsyncFlask
from api.auth.guards import Guard, guard_of
from api.db.models import Base
from api.errors import catalogue
from api.parts import Parts
from api.routes import TABLE, Route
from tests.conftest import bearer, client_of, sign_in
from tests.http._forge import fault

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

NOBODY = "00000000-0000-7000-8000-000000000000"
VALUES = {"<uuid:session_id>": NOBODY, "<uuid:user_id>": NOBODY, "<uuid:client_id>": NOBODY,
          "<name>": "user",
          "<path:name>": "swagger-ui.css", "<code>": "not_found"}  # fmt: skip


def path_of(route: Route) -> str:
    """Return a path that a route answers to."""
    path = route.path
    for parameter, value in VALUES.items():
        path = path.replace(parameter, value)
    return path


def guard(app: AsyncFlask, route: Route) -> Guard:
    """Return the guard of a route."""
    found = guard_of(app.view_functions[route.endpoint])
    assert found is not None
    return found


# How Python, its libraries and databases talk of what they met.
THEIR_WORDS = re.compile(
    r"line \d|column \d|char(acter)? \d|position \d|expecting|unexpected|extra data|traceback"
    r"|error:|[a-z]Error\b|codec|sqlite|asyncpg|psycopg|constraint|orjson|marshmallow|werkzeug"
    r"|flask|pyjwt| object at 0x|<class|file \"",
    re.IGNORECASE,
)


def problem_fault(answer: httpx.Response) -> str | None:
    """Return what is wrong with an answer: 5xx, or an error that is not the contract's."""
    if answer.status_code < 400:
        return None
    if answer.request.url.path.startswith("/oauth/") and "error" in answer.json():
        # RFC 6749 section 5.2
        as_it_must = answer.json().keys() == {"error", "error_description"}
        return None if as_it_must and answer.status_code in {400, 401} else answer.text
    if answer.headers.get("Content-Type") != "application/problem+json":
        return f"{answer.status_code} {answer.headers.get('Content-Type')}"
    problem = answer.json()
    known = catalogue().get(problem["code"])
    if known is None or not known.status == problem["status"] == answer.status_code < 500:
        return f"{answer.status_code} {answer.text}"
    if problem["title"] != known.title or problem["type"] != f"/problems/{known.code}":
        return answer.text
    if problem["request_id"] != answer.headers["X-Request-ID"]:
        return "another request's id"
    if THEIR_WORDS.search(problem["detail"]):
        return problem["detail"]
    if (answer.status_code == 401) != ("WWW-Authenticate" in answer.headers) and (
        answer.status_code != 403
    ):
        return "WWW-Authenticate"
    return None


# --- 16, 17, 50: every route, by the table ---


async def test_without_a_token_every_guard_says_so_and_no_more(
    app: AsyncFlask, client: httpx.AsyncClient
) -> None:
    """401 missing_token, a challenge without an error code; public routes ask for none (16, 50)."""
    for route in TABLE:
        answer = await client.request(route.method, path_of(route))
        if guard(app, route).client:
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client"), route
            assert answer.headers["WWW-Authenticate"].startswith("Basic "), route
            assert answer.headers["Cache-Control"] == "no-store", route
            continue
        if guard(app, route).public:
            assert answer.headers.get("WWW-Authenticate") is None, route
            assert answer.status_code < 500, route
            continue
        assert (answer.status_code, answer.json()["code"]) == (401, "missing_token"), route
        assert answer.headers["WWW-Authenticate"] == "Bearer", route
        assert answer.headers["Cache-Control"] == "no-store", route


async def test_a_bad_token_is_401_and_a_missing_right_403(
    app: AsyncFlask, client: httpx.AsyncClient
) -> None:
    """On every guarded route, whatever else is wrong with the request (17, 50)."""
    user = bearer((await sign_in(client, transport="json"))["access_token"])
    asked = 0
    for route in TABLE:
        found = guard(app, route)
        if found.public or found.client:
            continue
        answer = await client.request(
            route.method, path_of(route), headers=bearer("a.b.c"), content=b"{"
        )
        assert fault(answer) is None, (route, answer.text)
        if found.all_permissions:
            asked += 1
            answer = await client.request(route.method, path_of(route), headers=user, content=b"{")
            problem = (answer.status_code, answer.json()["code"])
            assert problem == (403, "insufficient_permission"), route
            assert answer.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope"'
    assert asked == sum(route.path.startswith("/admin") for route in TABLE)


# --- 18 to 20: Authorization ---


CREDENTIAL_HEADERS = [
    ("Bearer {}", 200), ("bEaReR {}", 200), ("  Bearer {}  ", 200), ("Bearer  {}", 200),
    (",", 400), (", ,", 400), (",,,,", 400), ("Bearer ,,0", 400), ("Bearer,", 400),
    ("Bearer", 400), ("Bearer ", 400), ("Bearer  ", 400), ("bearer", 400),
    ("Bearer a b", 400), ("Bearer {} x", 400), ("Bearer {} {}", 400), ("Bearer {},{}", 400),
    ("Bearer {}, Bearer {}", 400), ("Bearer {}, Basic eDp5", 400), ("Basic eDp5, Bearer {}", 400),
    ("Basic x, Bearer y", 400), ("Bearer \xe9", 400), ("\xe9 {}", 400), ("Bearer {}\xa0", 400),
    ("Bearer\xa0{}", 400), ('Bearer "{}"', 401), ("Bearer token={}", 401), ("Bearer '{}'", 401),
    ("Bearer <{}>", 401), ("Bearer Bearer{}", 401), ("Bearer null", 401), ("Bearer {}=", 401),
    ("Bearer undefined", 401), ("Bearer %42", 401), ("Bearer {}%00", 401), ("Bearer {", 401),
    ("Basic eDp5", 401), ("Basic {}", 401), ("Token {}", 401), ("JWT {}", 401), ("{}", 401),
    ("BearerX {}", 401), ("Bearer\t{}", 401), ("Bearer:{}", 401), ("Negotiate YII=", 401),
    ("", 401), (" ", 401),
]  # fmt: skip


async def test_one_credential_or_a_plain_refusal(client: httpx.AsyncClient) -> None:
    """Any case of the scheme, exactly one credential; what is no Bearer is no token (18 to 20)."""
    token = (await sign_in(client, transport="json"))["access_token"]
    for header, status in CREDENTIAL_HEADERS:
        value = header.replace("{}", str(token)).encode("latin-1")
        answer = await client.get("/protected", headers={"Authorization": value})
        assert answer.status_code == status, (header, answer.text)
        assert problem_fault(answer) is None, header
        if status == 401:
            bad = answer.json()["code"] == "invalid_token"
            challenge = answer.headers["WWW-Authenticate"]
            assert challenge == ('Bearer error="invalid_token"' if bad else "Bearer"), header


async def test_one_place_decides(client: httpx.AsyncClient) -> None:
    """Two Authorization headers, a bad one beside a good cookie, a cookie beside another's (19)."""
    mine = (await sign_in(client, transport="cookies"))["user"]
    token = str((await sign_in(client, transport="json"))["access_token"])
    others = str((await sign_in(client, "admin", "adminpass", transport="json"))["access_token"])
    twice = [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {token}")]
    assert (await client.get("/protected", headers=twice)).status_code == 400
    assert fault(await client.get("/protected", headers=bearer("a.b.c"))) is None
    assert (await client.get("/protected", headers=bearer(others))).status_code == 400
    both = await client.get("/protected", headers=bearer(token))
    assert both.json()["logged_in_as"] == mine["username"]  # type: ignore[index]
    refresh = {"Cookie": f"refresh_token={client.cookies['refresh_token']}"}
    client.cookies.clear()
    # of the cookies, the refresh token alone tells of another user
    beside = await client.get("/protected", headers=bearer(others) | refresh)
    assert (beside.status_code, beside.json()["code"]) == (400, "bad_request")
    await sign_in(client, transport="cookies")
    # what is no Bearer is no token: the cookie stands
    basic = await client.get("/protected", headers={"Authorization": "Basic eDp5"})
    assert basic.status_code == 200


# --- 22, 54: whatever else a header may hold ---

VISIBLE = st.binary(max_size=60).map(lambda raw: raw.translate(None, b"\r\n\0"))
KNOWN = ("Authorization", "Cookie", "X-CSRF-TOKEN", "X-Request-ID", "X-Forwarded-For", "Host",
         "Content-Type", "Content-Encoding", "Accept", "Accept-Encoding", "If-Match", "Origin",
         "If-None-Match", "Range", "User-Agent", "Referer", "Forwarded", "X-Forwarded-Host",
         "X-Forwarded-Proto", "X-Original-URL", "X-HTTP-Method-Override", "Expect", "Date",
         "If-Modified-Since", "Access-Control-Request-Method", "Transfer-Encoding")  # fmt: skip
NAMES = st.sampled_from(KNOWN) | st.text(string.ascii_letters + string.digits + "-_!~", min_size=1)
SOME = [r for r in TABLE if r.path in {
    "/login", "/protected", "/refresh", "/logout", "/me", "/me/sessions", "/admin/users",
    "/.well-known/jwks.json", "/docs/<path:name>", "/openapi.json", "/admin/users/<uuid:user_id>",
}]  # fmt: skip


@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_any_header_is_answered(app: AsyncFlask, data: Any) -> None:
    """Whatever bytes are in whatever headers: no 5xx, and errors are the contract's (20 to 22)."""
    route = data.draw(st.sampled_from(SOME))
    headers = data.draw(st.lists(st.tuples(NAMES, VISIBLE), max_size=5))
    sent = [(name.encode(), value) for name, value in headers]
    async with client_of(app) as client:
        answer = await client.request(route.method, path_of(route), headers=sent)
    assert problem_fault(answer) is None, sent


CREDENTIALS = st.one_of(
    VISIBLE,
    st.text("Bbear Basic,;=\"' \t.", max_size=30).map(str.encode),
    st.lists(VISIBLE, max_size=4).map(b", ".join).map(lambda raw: b"Bearer " + raw),
)
COOKIE_NAMES = ("access_token", "refresh_token", "csrf_access_token", "session", "", "__Host-x")
COOKIES = st.lists(
    st.tuples(st.sampled_from(COOKIE_NAMES), VISIBLE).map(
        lambda pair: pair[0].encode() + b"=" + pair[1]
    )
    | VISIBLE,
    max_size=6,
).map(b"; ".join)


@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CREDENTIALS, COOKIES, VISIBLE)
async def test_any_credential_is_refused(
    app: AsyncFlask, credential: bytes, cookies: bytes, csrf: bytes
) -> None:
    """Made up ones in header, cookies and X-CSRF-TOKEN, all at once: 400, 401 or 403 (20, 21)."""
    headers = {"Authorization": credential, "Cookie": cookies, "X-CSRF-TOKEN": csrf}
    async with client_of(app) as client:
        for method, path in (("GET", "/protected"), ("POST", "/refresh"), ("POST", "/logout")):
            answer = await client.request(method, path, headers=headers)
            assert answer.status_code in {400, 401, 403}, answer.text
            assert problem_fault(answer) is None


async def test_no_name_with_an_underscore_passes_for_another(client: httpx.AsyncClient) -> None:
    """X_CSRF_TOKEN, CONTENT_LENGTH and their kin are dropped before the application (54)."""
    await sign_in(client, transport="cookies")
    csrf = client.cookies["csrf_access_token"]
    token = client.cookies["access_token"]
    change = {"email": None}
    for name in ("X_CSRF_TOKEN", "X_CSRF-TOKEN", "x-csrf_token"):
        answer = await client.patch("/me", json=change, headers={name: csrf})
        assert (answer.status_code, answer.json()["code"]) == (403, "csrf_failed"), name
    client.cookies.clear()
    for headers in ({"HTTP_AUTHORIZATION": f"Bearer {token}"}, {"REMOTE_USER": "admin"},
                    {"HTTP_COOKIE": f"access_token={token}"}, {"X_Forwarded_User": "admin"},
                    {"Http-Authorization": f"Bearer {token}"}):  # fmt: skip
        answer = await client.get("/protected", headers=headers)
        assert answer.json()["code"] == "missing_token", headers


async def test_the_request_id_is_a_plain_word(client: httpx.AsyncClient) -> None:
    """1 to 128 of its alphabet are taken, anything else is replaced, and never echoed."""
    for given_id, taken in (
        ("a", True), ("A.b_c-1", True), ("x" * 128, True), ("x" * 129, False), ("", False),
        ("a b", False), ("a\tb", False), ("<script>", False), ("a;b", False), ("\xe9", False),
        ("a,b", False), ("..", True), ('"', False),
    ):  # fmt: skip
        headers = {"X-Request-ID": given_id.encode("latin-1")}
        answer = await client.get("/nowhere", headers=headers)
        assert (answer.headers["X-Request-ID"] == given_id) == taken, given_id
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


async def test_conditions_are_told_by_the_contract(client: httpx.AsyncClient) -> None:
    """If-Match of another version is a 412 problem, not the body; ranges are nothing here."""
    for path in ("/.well-known/jwks.json", "/docs/swagger-ui.css"):
        whole = await client.get(path)
        etag = whole.headers["ETag"]
        for headers, status in (
            ({"If-Match": '"x"'}, 412), ({"If-Match": "\x01"}, 412), ({"If-Match": "*"}, 200),
            ({"If-Match": etag}, 200), ({"If-None-Match": etag}, 304), ({"Range": "x"}, 200),
            ({"Range": "bytes=9999999-"}, 200), ({"If-None-Match": '"x"'}, 200),
        ):  # fmt: skip
            answer = await client.get(path, headers=headers)
            assert answer.status_code == status, (path, headers)
            assert problem_fault(answer) is None, (path, headers)
            assert answer.content == {200: whole.content, 304: b""}.get(status, answer.content)


async def test_no_header_names_another_host_or_scheme(client: httpx.AsyncClient) -> None:
    """Host, X-Forwarded-Host and their kin show up in no answer."""
    tokens = await sign_in(client, "admin", "adminpass", transport="json")
    for headers in ({"Host": "evil.example"}, {"X-Forwarded-Host": "evil.example"},
                    {"Forwarded": "host=evil.example;proto=http"}, {"X-Original-URL": "/evil"},
                    {"X-Rewrite-URL": "/evil"}, {"X-Forwarded-Prefix": "/evil"},
                    {"Host": "evil.example:80@x"}, {"Host": "evil.example/x?"}):  # fmt: skip
        sent = bearer(tokens["access_token"]) | headers
        for path in ("/", "/docs", "/openapi.json", "/me", "/nowhere", "//evil.example/"):
            answer = await client.get(f"http://test{path}", headers=sent)
            assert answer.status_code < 500, (path, headers)
            assert "evil" not in answer.text + repr(answer.headers), (path, headers)
        home = await client.get("/", headers=sent)
        assert home.status_code >= 400 or home.headers["Location"] == "/docs"


# --- 23: methods ---


async def rows(parts: Parts) -> dict[str, list[Any]]:
    """Return all that the database holds, but for what a clock writes: seals, workers' rows."""
    async with parts.database.read() as session:
        return {
            name: sorted(map(repr, await session.execute(select(table))))
            for name, table in Base.metadata.tables.items()
            if name not in {"audit_seals", "index_workers"}
        }


async def test_reading_methods_change_nothing(client: httpx.AsyncClient, parts: Parts) -> None:
    """GET, HEAD and OPTIONS on every route, as admin, by header and by cookie (23)."""
    await sign_in(client, "admin", "adminpass", transport="cookies")
    tokens = await sign_in(client, "admin", "adminpass", transport="json")
    users = (await client.get("/admin/users")).json()["items"]
    before = await rows(parts)
    for route in TABLE:
        path = path_of(route).replace(NOBODY, users[0]["id"])
        for method in ("GET", "HEAD", "OPTIONS"):
            for headers in ({}, bearer(tokens["access_token"])):
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code < 500, (method, path)
                assert "Set-Cookie" not in answer.headers, (method, path)
    assert await rows(parts) == before


async def test_methods_that_nobody_knows_are_405(client: httpx.AsyncClient) -> None:
    """Or 404 where there is nothing; the answer echoes nothing of the request."""
    for method in ("TRACE", "CONNECT", "PROPFIND", "PATCHY", "\xe9", "M" * 300, "!", "__class__"):
        for path in ("/protected", "/login", "/nowhere", "/docs/x"):
            request = client.build_request("GET", path, headers={"X-Secret": "not-in-hex"})
            request.method = method
            answer = await client.send(request)
            assert answer.status_code in {404, 405}, (method, path, answer.text)
            assert problem_fault(answer) is None
            assert "not-in-hex" not in answer.text
            assert answer.status_code == 404 or answer.headers["Allow"]


async def test_no_spelling_of_a_method_dodges_csrf(client: httpx.AsyncClient) -> None:
    """Nor does a header that names another method (23, 24)."""
    await sign_in(client, transport="cookies")
    for method, override in (("patch", ""), ("Patch", ""), ("PATCH", "GET"), ("GET", "PATCH")):
        headers = {"X-HTTP-Method-Override": override, "X-Method-Override": override}
        request = client.build_request("GET", "/me?_method=PATCH", json={"email": "a@b.cd"})
        request.headers.update(headers)
        request.method = method
        answer = await client.send(request)
        assert answer.status_code == (200 if method == "GET" else 403), (method, override)
        assert (await client.get("/me")).json()["email"] is None


# --- paths ---


PATHS = [
    "/docs/../app.py", "/docs/%2e%2e/%2e%2e/etc/passwd", "/docs/..%2f..%2fapi/app.py",
    "/docs/..%5c..%5capp.py", "/docs//etc/passwd", "/docs/%2fetc%2fpasswd",
    "/docs/%00.css", "/docs/.", "/docs/..", "/docs/", "/problems/..%2f", "/problems/%00",
    "/problems/" + "x" * 5_000, "/problems/%3Cscript%3E", "/%ff", "/%c0%ae%c0%ae/", "/%e2%28%a1",
    "/me/sessions/" + "0" * 36, "/me/sessions/%00", "/admin/users/1%27%20OR%201=1",
    "/admin/roles/%00", "/admin/roles/%ff", "/admin/roles/..%2f", "/admin/roles/" + "r" * 9_000,
    "/admin/roles/%F0%9F%98%80", "/PROTECTED", "/protected/", "//protected", "/protected;x=1",
    "/protected%20", "/protected?%00=%ff", "/;/protected", "/.env", "/.git/config", "/\\evil",
    "/admin/users?limit=%00", "/admin/users?q=%00", "/admin/users?q=%ff", "/admin/users?q=" +
    "%F0%9F%98%80" * 300, "/admin/users?limit=1&limit=2", "/admin/users?role=%27--",
    "/admin/audit?since=0001-01-01", "/admin/audit?until=9999-12-31T23:59:59Z",
    "/admin/audit?actor=%00", "/admin/stats?days=99999999999999999999", "/admin/stats?days=-1",
    "/admin/users?cursor=%00", "/admin/users?" + "a=1&" * 3_000, "/admin/users?" + "&" * 9_000,
    "/admin/users?q=%ED%A0%80", "/admin/users?sort=__class__", "/admin/sessions?ip=%00",
    "/admin/sessions?user_id=%00", "/admin/users?active=1", "/?" + "x" * 60_000,
]  # fmt: skip


async def test_paths_lead_nowhere_else(client: httpx.AsyncClient) -> None:
    """Traversal, NUL, bad UTF-8, SQL, sizes: 2xx, /docs or a problem of the contract (22)."""
    admin = bearer((await sign_in(client, "admin", "adminpass", transport="json"))["access_token"])
    client.cookies.clear()
    for path in PATHS:
        for headers in ({}, admin):
            request = client.build_request("GET", "/", headers=headers)
            request.url = httpx.URL("http://test").copy_with(raw_path=path.encode())
            answer = await client.send(request)
            assert problem_fault(answer) is None, (path, answer.text)
            assert answer.headers.get("Location", "/docs") == "/docs", path
            for secret in ("root:", "import ", "SELECT", "Traceback"):
                assert secret not in answer.text or path.startswith("/docs"), path
