"""Signing keys as clients meet them: the JWKS, and tokens across a rotation."""

from __future__ import annotations

import asyncio

import httpx
import jwt
import pytest
from sqlalchemy import event

from api.app import create_app
from api.parts import EXTENSION, Parts
from api.services.audit import SYSTEM
from api.settings import Settings
from tests._keys import expire, ripen
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_admin import code

JWKS = "/.well-known/jwks.json"


def kid_of(token: object) -> str:
    """Return the kid in a token's header."""
    return str(jwt.get_unverified_header(str(token))["kid"])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_jwks_may_be_kept_and_asked_for_again(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """max-age and an ETag; 304 without a body until the keys change; nothing private in it."""
    first = await client.get(JWKS)
    assert first.headers["Cache-Control"] == "public, max-age=300"
    assert first.headers["Content-Type"] == "application/jwk-set+json"
    keys = first.json()["keys"]
    assert [key["kid"] for key in keys][:1] == [parts.keys.current.kid]
    assert len(keys) == 2
    assert all(set(key) == {"kty", "crv", "x", "kid", "use", "alg"} for key in keys)
    asking = {"If-None-Match": first.headers["ETag"]}
    again = await client.get(JWKS, headers=asking)
    assert (again.status_code, again.content) == (304, b"")
    assert "Content-Type" not in again.headers
    assert again.headers["ETag"] == first.headers["ETag"]
    assert again.headers["Cache-Control"] == "public, max-age=300"
    await ripen(parts.database)
    await parts.signing_keys.rotate(SYSTEM)
    await parts.keys.load()
    changed = await client.get(JWKS, headers=asking)
    assert changed.status_code == 200
    assert [key["kid"] for key in changed.json()["keys"]][1:] != [key["kid"] for key in keys]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("path", [JWKS, "/docs/swagger-ui.css"])
async def test_who_asks_for_another_version_is_told_so(
    client: httpx.AsyncClient, path: str
) -> None:
    """If-Match (RFC 9110 section 13.1.1): 412, a problem and nothing else; 200 where it matches."""
    there = await client.get(path)
    etag = there.headers["ETag"]
    for asked in (etag, "*", f'"other", {etag}'):
        answer = await client.get(path, headers={"If-Match": asked})
        assert (answer.status_code, answer.content) == (200, there.content)
    for asked in ('"other"', f"W/{etag}"):
        answer = await client.get(path, headers={"If-Match": asked})
        assert code(answer) == (412, "precondition_failed")
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "ETag" not in answer.headers
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"][path.replace("swagger-ui.css", "{name}")]["get"]
    assert {"200", "304", "412"} <= operation["responses"].keys()
    assert "content" not in operation["responses"]["304"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_flood_of_readers_asks_nobody(client: httpx.AsyncClient, parts: Parts) -> None:
    """The JWKS comes from memory: hundreds of requests are no more statements than none."""
    said: list[str] = []
    event.listen(
        parts.database.engine.sync_engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, *_: said.append(statement),
    )
    answers = await asyncio.gather(*(client.get(JWKS) for _ in range(300)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(said) < 100, "but for what is done every few seconds anyway"


async def test_a_key_of_another_worker_is_learnt_at_its_first_token(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    """Without waiting for the next look: the token that names it is good at once."""
    other = create_app(settings)
    async with other.running(), client_of(other) as there:
        theirs: Parts = other.extensions[EXTENSION]
        fresh = await theirs.signing_keys.replace(SYSTEM)
        await theirs.keys.load()
        token = (await sign_in(there, transport="json"))["access_token"]
        assert kid_of(token) == fresh.kid
        answer = await client.get("/protected", headers=bearer(token))
        assert answer.status_code == 200, answer.text


async def test_tokens_live_through_rotations_until_their_key_is_retired(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Access and refresh tokens of the key before work; once it is retired they are refused."""
    before = await sign_in(client, transport="json")
    client.cookies.clear()
    for _ in range(2):
        await ripen(parts.database)
        fresh = await parts.signing_keys.rotate(SYSTEM)
        await parts.keys.load()
        access = await client.get("/protected", headers=bearer(before["access_token"]))
        assert access.status_code == 200, access.text
    # the grace: the same refresh token is spent twice, and both answers are by the new key
    for _ in range(2):
        refreshed = await client.post("/refresh", headers=bearer(before["refresh_token"]))
        assert refreshed.status_code == 200, refreshed.text
        assert kid_of(refreshed.json()["access_token"]) == fresh.kid
    await expire(parts.database)
    await parts.keys.load()
    access = await client.get("/protected", headers=bearer(before["access_token"]))
    assert (access.status_code, access.json()["code"]) == (401, "invalid_token")
    after = await client.get("/protected", headers=bearer(refreshed.json()["access_token"]))
    assert after.status_code == 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_compromise_ends_what_was_signed_and_remembered(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """A token that was verified, and so remembered, is refused once its key is retired."""
    before = await sign_in(client, transport="json")
    headers = bearer(before["access_token"])
    assert (await client.get("/protected", headers=headers)).status_code == 200
    await parts.signing_keys.replace(SYSTEM)
    await parts.keys.load()
    for path, token in (("/protected", "access_token"), ("/refresh", "refresh_token")):
        method = "POST" if path == "/refresh" else "GET"
        answer = await client.request(method, path, headers=bearer(before[token]))
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token")
    assert kid_of((await sign_in(client, transport="json"))["access_token"]) == (
        parts.keys.current.kid
    )
