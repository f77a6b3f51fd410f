"""Bodies of every kind, on every route that reads one: 4xx of the contract (51, 52, 26)."""

from __future__ import annotations

import gzip
import importlib
import json
import unicodedata
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from marshmallow import validate
from sqlalchemy import select, update

from api.asgi import AsyncFlask
from api.db.models import User
from api.parts import Parts
from api.routes import TABLE
from api.shapes import shapes_of
from schemas.fields import RoleName
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_hostile_headers import NOBODY, path_of, problem_fault

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

JSON = {"Content-Type": "application/json"}
READING = [route for route in TABLE if shapes_of(route.view).body is not None]
CHANGING = [route for route in TABLE if route.method != "GET"]
# As deep as a body may be.
DEEP = 30_000
LONG = "n" * 10_000
BODIES: dict[str, tuple[bytes, set[int]]] = {
    "nothing": (b"", {400}),
    "space": (b" \n\t ", {400}),
    "not JSON": (b"username=a", {400}),
    "unfinished": (b"{", {400}),
    "trailing comma": (b'{"a": 1,}', {400}),
    "bare": (b"{a: 1}", {400}),
    "single quotes": (b"{'a': 1}", {400}),
    "a comment": (b"{} // x", {400}),
    "two": (b"{}{}", {400}),
    "NaN": (b'{"a": NaN}', {400}),
    "Infinity": (b'{"a": Infinity}', {400}),
    "-Infinity": (b'{"a": -Infinity}', {400}),
    "NaN alone": (b"NaN", {400}),
    "1e999": (b'{"a": 1e999}', {400, 422}),
    "leading zero": (b'{"a": 01}', {400}),
    "plus": (b'{"a": +1}', {400}),
    "hex": (b'{"a": 0x1}', {400}),
    "BOM": (b"\xef\xbb\xbf{}", {400}),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), {400}),
    "UTF-16 LE": ('{"a": 1}'.encode("utf-16-le"), {400}),
    "UTF-32": ("{}".encode("utf-32"), {400}),
    "Latin-1": ('{"a": "\xe9"}'.encode("latin-1"), {400}),
    "overlong": (b'{"a": "\xc0\x80"}', {400}),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', {400}),
    "NUL": (b'{"a": 1}\0', {400}),
    "raw NUL in text": (b'{"a": "\0"}', {400}),
    "raw newline in text": (b'{"a": "\n"}', {400}),
    "lone surrogate": (b'{"a": "\\ud800"}', {422}),
    "lone low": (b'{"a": "\\udc00"}', {422}),
    "surrogate as a name": (b'{"\\ud800": 1}', {422}),
    "bad escape": (b'{"a": "\\x41"}', {400}),
    "990 deep": (b'{"a":' * 990 + b"1" + b"}" * 990, {400, 422}),
    "1,000 deep": (b"[" * 1_000 + b"]" * 1_000, {400, 422}),
    "1,024 deep": (b'{"a":' * 1_024 + b"1" + b"}" * 1_024, {400, 422}),
    "100,000 deep": (b"[" * 100_000 + b"]" * 100_000, {413}),
    "30,000 deep": (b"[" * DEEP + b"]" * DEEP, {400}),
    "deep and open": (b'{"a":' * (DEEP // 3), {400}),
    "given twice": (b'{"a": 1, "a": 1}', {400}),
    "twice by escape": (b'{"a": 1, "\\u0061": 1}', {400}),
    "twice within": (b'{"a": {"b": 1, "b": 2}}', {400}),
    "an array": (b"[]", {422}),
    "null": (b"null", {422}),
    "text": (b'"x"', {422}),
    "a number": (b"1", {422}),
    "true": (b"true", {422}),
    "400 digits": (b'{"a": ' + b"1" * 400 + b"}", {400, 422}),
    "5,000 digits": (b'{"a": ' + b"1" * 5_000 + b"}", {400, 422}),
    "60,000 digits": (b"1" * 60_000, {400, 422}),
    "2^64": (b'{"a": 18446744073709551616}', {400, 422}),
    "__proto__": (b'{"__proto__": {"roles": ["admin"]}}', {422}),
    "empty name": (b'{"": 1}', {422}),
    "__class__": (b'{"__class__": 1, "_schema": 1, "unknown": 2}', {422}),
    "5,000 names": (json.dumps({f"n{n}": 1 for n in range(5_000)}).encode(), {422}),
    "gzip": (gzip.compress(b'{"a": 1}'), {400}),
}
TYPES: dict[str, int] = {
    "application/json; charset=utf-8": 422, "APPLICATION/JSON": 422, "application/json;": 422,
    "text/plain": 415, "application/x-www-form-urlencoded": 415, "text/json": 415, "": 415,
    "multipart/form-data; boundary=x": 415, "multipart/form-data": 415, "application/jsonp": 415,
    "application/problem+json": 415, "application/vnd.api+json": 415, "application/xml": 415,
    "json": 415, "application/json, text/plain": 415, "text/plain; application/json": 415,
    "application/merge-patch+json": 415, "*/*": 415, "\xe9": 415, "x" * 4_000: 415,
}  # fmt: skip


@pytest.fixture
async def admin(app: AsyncFlask) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is signed in as admin."""
    async with client_of(app) as client:
        token = (await sign_in(client, "admin", "adminpass", transport="json"))["access_token"]
        client.headers.update(bearer(token))
        yield client


async def test_malformed_bodies_on_every_route(admin: httpx.AsyncClient) -> None:
    """Whatever a body holds, every route that reads one answers 4xx by the contract (51)."""
    for route in READING:
        for name, (body, statuses) in BODIES.items():
            answer = await admin.request(route.method, path_of(route), content=body, headers=JSON)
            assert answer.status_code in statuses, (route.path, name, answer.text[:200])
            assert problem_fault(answer) is None, (route.path, name)
            assert len(answer.content) < 2_000, (route.path, name)


async def test_large_values_are_refused_before_they_are_looked_at(
    admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many members, many items, a long name: no work in proportion to them, a short answer."""
    normalized = []
    normalize = unicodedata.normalize

    def noting(form: Any, text: str) -> str:
        normalized.append(len(text))
        return normalize(form, text)

    monkeypatch.setattr("schemas.fields.unicodedata.normalize", noting)
    looked_at = []
    look = validate.Email.__call__

    def looking(self: Any, value: str) -> str:
        looked_at.append(len(value))
        return look(self, value)

    monkeypatch.setattr(validate.Email, "__call__", looking)
    loaded = []
    load = RoleName._deserialize

    def counting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        loaded.append(1)
        return load(self, *arguments, **keywords)

    monkeypatch.setattr(RoleName, "_deserialize", counting)
    many, some = ["!"] * 10_000, ["!"] * 300
    for method, path, body in (
        ("POST", "/login", {"username": "\ufdfa" * 20_000, "password": "x"}),
        ("POST", "/login", {f"n{n}": 1 for n in range(5_000)}),
        ("POST", "/logout", {f"n{n}": 1 for n in range(5_000)}),
        ("PUT", f"/admin/users/{NOBODY}/roles", {"roles": some}),
        ("POST", "/admin/users", {"username": "x", "password": "kumquat vienna 7", "roles": some}),
        ("POST", "/admin/roles", {"name": "x", "permissions": some, "includes": some}),
        ("PATCH", "/admin/roles/user", {"permissions": some, "includes": some}),
        ("PATCH", f"/admin/clients/{NOBODY}", {"allowed_roles": some, "audiences": some}),
        ("PUT", f"/admin/users/{NOBODY}/roles", {"roles": many}),
        ("POST", "/admin/roles", {"name": "x", "permissions": many}),
        ("POST", "/admin/roles", {"name": "x", "includes": many}),
        ("PATCH", "/me", {"email": "a@" + "a." * 30_000}),
    ):
        answer = await admin.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed"), path
        assert len(answer.content) < 1_000, path
        assert "Longer" in answer.text or "Has too many" in answer.text or "Length" in answer.text
    assert max(normalized, default=0) <= 256
    assert looked_at == []
    # the name of the new role, which is read before its lists
    assert len(loaded) <= 2
    four = "\u03b1\u0313\u0300\u0345" * 64
    made = await admin.post("/admin/users", json={"username": four, "password": "kumquat vienna 7"})
    assert (made.status_code, len(made.json()["username"])) == (201, 64)


async def test_the_faults_that_are_listed_are_few(admin: httpx.AsyncClient) -> None:
    """An answer names up to 64 faults, and stays small however many there are (85)."""
    wrong = {"name": "x", "permissions": [f"{n}!" for n in range(256)], "includes": ["!"] * 64}
    for method, path, request in (
        ("POST", "/admin/roles", {"json": wrong}),
        ("POST", "/login", {"json": {f"{n}" * 30: 1 for n in range(64)}}),
        ("GET", "/me/sessions", {"params": [(f"n{n % 40}", "1") for n in range(64)]}),
    ):  # fmt: skip
        answer = await admin.request(method, path, **request)
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed"), path
        assert 1 < len(answer.json()["errors"]) <= 64, path
        assert len(answer.content) < 16_000, path


async def test_what_is_long_is_refused_before_it_is_read(
    admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of parameters, of media types, of parameters of one: none is taken apart (85)."""
    parsed: list[int] = []

    def noting(module: str, name: str) -> None:
        parse = getattr(importlib.import_module(module), name)

        def noted(value: Any, *arguments: Any, **keywords: Any) -> Any:
            parsed.append(len(value or ""))
            return parse(value, *arguments, **keywords)

        monkeypatch.setattr(f"{module}.{name}", noted)

    noting("werkzeug.sansio.request", "parse_options_header")
    noting("werkzeug.sansio.request", "parse_accept_header")
    noting("werkzeug.sansio.request", "parse_qsl")
    parameters = "&".join(f"n{n:x}" for n in range(5_000))
    for path in ("/me/sessions", "/admin/users", "/admin/audit", f"/admin/users/{NOBODY}/access"):
        answer = await admin.get(f"{path}?{parameters}")
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
        assert answer.json()["errors"] == [{"field": "", "message": "Has too many parameters."}]
    answer = await admin.get("/admin/audit", headers={"Accept": "a/b," * 4_000})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    for method, path in (("POST", "/login"), ("PATCH", "/me"), ("POST", "/logout")):
        odd = {"Content-Type": "application/json" + ";a=b" * 4_000}
        answer = await admin.request(method, path, content=b'{"a": 1}', headers=odd)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    for path in ("/oauth/token", "/oauth/introspect", "/oauth/revoke"):
        odd = {"Content-Type": "application/x-www-form-urlencoded" + ";a=b" * 4_000}
        answer = await admin.post(path, content=b"client_id=x", headers=odd)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert max(parsed, default=0) <= 1_024
    usual = "text/html,application/x-ndjson;q=0.9,application/json;q=0.1"
    answer = await admin.get("/admin/audit", headers={"Accept": usual})
    assert answer.headers["Content-Type"].startswith("application/x-ndjson")


async def test_bodies_where_none_belongs(admin: httpx.AsyncClient) -> None:
    """Routes that read no body refuse what is in one, and change nothing for it (51)."""
    routes = [route for route in CHANGING if route not in READING]
    assert len(routes) > 5
    for route in routes:
        for name, (body, statuses) in BODIES.items():
            if name == "nothing" or route.path == "/refresh":
                continue
            answer = await admin.request(route.method, path_of(route), content=body, headers=JSON)
            assert answer.status_code in statuses | {400, 422}, (
                route.path,
                name,
                answer.text[:200],
            )
            assert problem_fault(answer) is None, (route.path, name)
    assert (await admin.get("/me")).status_code == 200


async def test_only_plain_json_is_read(admin: httpx.AsyncClient) -> None:
    """By any other name 415, and so is any encoding; before the body is looked at."""
    for route in READING:
        for kind, status in TYPES.items():
            answer = await admin.request(
                route.method, path_of(route), content=b'{"?": 1}',
                headers={"Content-Type": kind.encode("latin-1")},
            )  # fmt: skip
            assert answer.status_code == status, (route.path, kind, answer.text)
            assert problem_fault(answer) is None
        for encoding in ("gzip", "br", "deflate", "identity, gzip", "x", "\xe9"):
            headers = JSON | {"Content-Encoding": encoding.encode("latin-1")}  # type: ignore[dict-item]
            answer = await admin.request(
                route.method, path_of(route), content=gzip.compress(b"{}"), headers=headers
            )
            assert answer.status_code == 415, (route.path, encoding)


async def test_bodies_over_the_cap_are_413(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """One byte over, announced or in chunks, on every route; at the cap it is read (52)."""
    cap = app.config["MAX_CONTENT_LENGTH"]

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 65_536):
            yield b" " * 65_536
        yield b" " * (size % 65_536)

    for route in CHANGING:
        path = path_of(route)
        for body in (b" " * (cap + 1), pieces(cap + 1)):
            answer = await admin.request(route.method, path, content=body, headers=JSON)
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large"), path
    for body in (b" " * cap, pieces(cap)):
        answer = await admin.post("/login", content=body, headers=JSON)
        assert answer.json()["code"] == "malformed_json"


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({LONG: 1}, {}), ({"username": {LONG: 1}}, {}), ({LONG: [1] * 600}, {}), ({}, {LONG: 1}),
        ({}, {LONG: [1, 2]}),
    ],
)  # fmt: skip
async def test_a_name_is_not_told_at_length(
    client: httpx.AsyncClient, body: dict[str, Any], query: dict[str, Any]
) -> None:
    """Whoever sends a name of ten thousand characters gets 64 of them back."""
    token = bearer((await sign_in(client, "admin", "adminpass", transport="json"))["access_token"])
    if query:
        answer = await client.get("/admin/users", params=query, headers=token)
    else:
        answer = await client.post("/admin/users", json=body, headers=token)
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert any(fault["field"] in (LONG[:64], "username") for fault in answer.json()["errors"])
    assert len(answer.content) < 1_000


async def test_chunked_bodies_read_like_others(client: httpx.AsyncClient) -> None:
    """Byte by byte, without a length: the same login (52)."""

    async def dripped() -> AsyncIterator[bytes]:
        for byte in b'{"username": "testuser", "password": "testpass"}':
            yield bytes([byte])

    answer = await client.post("/login", content=dripped(), headers=JSON)
    assert answer.status_code == 200


TEXT = st.text(max_size=80) | st.text(st.characters(codec=None), max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
MEMBERS = st.sampled_from([
    "username", "password", "transport", "email", "current_password", "new_password", "roles",
    "is_active", "name", "description", "permissions", "includes", "token", "jti", "sub", "exp",
]) | TEXT  # fmt: skip


@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(READING),
    st.dictionaries(MEMBERS, VALUE, max_size=6).map(json.dumps).map(str.encode)
    | VALUE.map(json.dumps).map(str.encode)
    | st.binary(max_size=80),
)
async def test_any_body_is_answered(admin: httpx.AsyncClient, route: Any, body: bytes) -> None:
    """JSON of all kinds, and bytes that are none: no 5xx, errors are the contract's (51)."""
    answer = await admin.request(route.method, path_of(route), content=body, headers=JSON)
    assert problem_fault(answer) is None, answer.text


# --- 26, 30: passwords ---

PASSWORDS = {
    "64 characters": "kumquat-Vienna-77 " * 3 + "lantern-93",
    "256 characters": "Zx9 qk-" * 36 + "last",
    "Unicode": "\u017e\u00e9lva pod horou \U0001f422 \u202e \u200d",
    "space": "  two spaces each side 93  ",
    "controls": "tab\tand\nline\rand\x7f bell\x07 93x",
    "combining": "cafe\u0301 lantern harbour 93",
    "quotes": "'; DROP TABLE users; --\\\"{}$`93",
    "wide": "\uff50\uff41\uff53\uff53 harbour lantern 93",
    "dotless": "\u0130stanbul lanterns \u0131 harbour 93",
}


async def test_any_password_is_kept_to_the_letter(client: httpx.AsyncClient, parts: Parts) -> None:
    """Never cut, folded, stripped or normalised; what is a letter away is wrong (26)."""
    user = await parts.users.find("testuser")

    async def logged_in(password: str) -> int:
        body = {"username": "testuser", "password": password}
        return (await client.post("/login", json=body)).status_code

    for name, password in PASSWORDS.items():
        async with parts.database.write() as session:
            hashed = await parts.passwords.hash("former password 93")
            await session.execute(
                update(User).where(User.id == user.id).values(password_hash=hashed)
            )
        token = (await sign_in(client, password="former password 93"))["access_token"]
        body = {"current_password": "former password 93", "new_password": password}
        answer = await client.post("/me/password", json=body, headers=bearer(token))
        assert answer.status_code == 204, (name, answer.text)
        assert await logged_in(password) == 200, name
        near = {password[:-1], password.strip()[:64], password.swapcase(), f"{password} "}
        near |= {unicodedata.normalize(form, password) for form in ("NFC", "NFD", "NFKC")}
        for other in sorted(near - {password}):
            if 0 < len(other) <= 256:
                assert await logged_in(other) == 401, (name, other)
        # or the attempts would be too many
        parts.accounts._throttle._memory._failed.clear()
        await parts.blocklist.redis.delete(
            *[b"none", *[key async for key in parts.blocklist.redis.scan_iter("*failed:*")]]
        )


@pytest.mark.parametrize("path", ["/login", "/me/password", "/register", "/admin/users"])
async def test_what_no_password_can_hold_is_422(admin: httpx.AsyncClient, path: str) -> None:
    """NUL, lone surrogates, nothing, too long, no text: 422 before anything is hashed (26)."""
    for odd in (
        b'"a\\u0000bcdefghij"', b'"\\ud800abcdefghij"', b'"abcdefghij\\udfff"', b'""',
        b"1234567890",
        b"null", b"[]", b'["abcdefghij"]', b"true", b'"' + b"x" * 257 + b'"', b"{}",
    ):  # fmt: skip
        fields = {"username": b'"testuser"', "password": odd}
        if path == "/me/password":
            fields = {"current_password": b'"adminpass"', "new_password": odd}
        body = b", ".join(b'"%s": %s' % (name.encode(), raw) for name, raw in fields.items())
        answer = await admin.post(path, content=b"{" + body + b"}", headers=JSON)
        assert answer.status_code == 422, (odd, answer.text)
        assert answer.json()["code"] == "validation_failed", odd


async def test_usernames_meet_in_one_form(admin: httpx.AsyncClient) -> None:
    """Case, width and composition make no second account; what cannot be stored is 422."""
    body = {"username": "Ren\u00e9e", "password": "kumquat vienna 77"}
    assert (await admin.post("/admin/users", json=body)).status_code == 201
    for name in ("REN\u00c9E", "\uff32en\u00e9e", "Rene\u0301e"):
        answer = await admin.post("/admin/users", json=body | {"username": name})
        assert (answer.status_code, answer.json()["code"]) == (409, "username_taken"), name
    for name in ("", " ", " a", "a ", "a\0", "a\n", "\u200b", "a\u202eb", "x" * 65, "\ufeffa",
                 "\ufb03" * 30, "a\u00ad", "\u3000", 1, None, ["a"]):  # fmt: skip
        answer = await admin.post("/admin/users", json=body | {"username": name})
        assert answer.status_code == 422, (name, answer.text)
    # a password is kept to the letter, whatever of it can be seen
    body |= {"username": "Zoe", "password": "kumquat \u2764\ufe0f vienna \u034f77"}
    assert (await admin.post("/admin/users", json=body)).status_code == 201


async def test_a_username_is_as_long_as_the_document_says(admin: httpx.AsyncClient) -> None:
    """64 characters after NFKC; what the document's maxLength rules out is always refused."""
    document = (await admin.get("/openapi.json")).json()
    said = document["components"]["schemas"]["UserCreate"]["properties"]["username"]
    assert (said["minLength"], said["maxLength"]) == (1, 256)
    assert said["description"] == "1 to 64 characters after NFKC."
    for name, status in (
        ("x" * 64, 201), ("x" * 65, 422), ("e\u0301" * 64, 201), ("e\u0301" * 65, 422),
        ("\u03b1\u0313\u0301\u0345" * 64, 201), ("\u03b1\u0313\u0301\u0345" * 64 + "x", 422),
    ):  # fmt: skip
        body = {"username": name, "password": "kumquat vienna 77"}
        answer = await admin.post("/admin/users", json=body)
        assert answer.status_code == status, (name, answer.text)
        assert status == 422 or len(answer.json()["username"]) == 64


async def test_a_hash_of_other_parameters_is_made_anew(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """At the next sign-in, once, and no one notices (30)."""
    from argon2 import PasswordHasher

    async def stored() -> str:
        async with parts.database.read() as session:
            found = await session.scalar(
                select(User.password_hash).where(User.username == "testuser")
            )
        return str(found)

    old = PasswordHasher(time_cost=2, memory_cost=128, parallelism=1).hash("testpass")
    async with parts.database.write() as session:
        await session.execute(
            update(User).where(User.username == "testuser").values(password_hash=old)
        )
    await client.post("/login", json={"username": "testuser", "password": "wrong"})
    assert await stored() == old
    await sign_in(client)
    made = await stored()
    assert made != old
    assert "m=64,t=1,p=1" in made
    await sign_in(client)
    assert await stored() == made
