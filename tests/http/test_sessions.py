"""Signing in, carrying on and signing out, over HTTP on both databases."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import httpx
import jwt
import pytest
from sqlalchemy import select, update

from api.asgi import AsyncFlask
from api.db.models import AuditEvent, Session, User
from api.parts import Parts
from api.services.audit import SYSTEM
from tests.conftest import bearer, client_of, sign_in


def claims_of(token: object) -> dict[str, object]:
    """Return what a token says, unverified."""
    return jwt.decode(str(token), options={"verify_signature": False})


async def code_of(response: httpx.Response) -> tuple[int, str]:
    """Return the status and the problem's code."""
    return response.status_code, response.json()["code"]


async def rewind(parts: Parts, **columns: timedelta) -> None:
    """Move times of every session into the past, in the database."""
    async with parts.database.write() as session:
        for row in (await session.scalars(select(Session))).all():
            for name, by in columns.items():
                setattr(row, name, getattr(row, name) - by)


async def test_login_answers_as_the_contract_says(client: httpx.AsyncClient) -> None:
    """A login gives both tokens, both cookies and the user, and may not be stored."""
    body = {"username": "TestUser", "password": "testpass"}
    response = await client.post("/login", json=body)
    answer = response.json()
    assert response.status_code == 200
    assert set(answer) == {
        "login", "token_type", "expires_in", "access_token", "refresh_token", "user",
    }  # fmt: skip
    assert answer["login"] is True
    assert (answer["token_type"], answer["expires_in"]) == ("Bearer", 300)
    assert answer["user"]["username"] == "testuser"
    assert answer["user"]["roles"] == ["user"]
    assert response.headers["Cache-Control"] == "no-store"
    assert set(client.cookies) == {
        "access_token", "refresh_token", "csrf_access_token", "csrf_refresh_token",
    }  # fmt: skip


async def test_tokens_carry_the_claims_of_the_contract(client: httpx.AsyncClient) -> None:
    """RFC 9068 headers, every claim, sorted roles; csrf only where the token goes by cookie."""
    answer = await sign_in(client, "admin", "adminpass", transport="json")
    access = claims_of(answer["access_token"])
    header = jwt.get_unverified_header(str(answer["access_token"]))
    assert (header["typ"], header["alg"]) == ("at+jwt", "EdDSA")
    assert header["kid"]
    assert set(access) == {
        "iss", "aud", "sub", "username", "roles", "permissions", "sid", "ver", "seq", "opened_seq",
        "type", "fresh", "jti", "iat", "nbf", "exp",
    }  # fmt: skip
    assert (access["roles"], access["permissions"]) == (["admin", "user"], ["*"])
    assert access["fresh"] is True
    refresh = claims_of(answer["refresh_token"])
    assert jwt.get_unverified_header(str(answer["refresh_token"]))["typ"] == "rt+jwt"
    assert refresh["sid"] == access["sid"]
    assert "roles" not in refresh
    both = await sign_in(client)
    assert claims_of(both["access_token"])["csrf"] == client.cookies["csrf_access_token"]


async def test_cookies_alone_leave_no_token_in_the_body(client: httpx.AsyncClient) -> None:
    """With transport cookies the body holds no token, and the cookies work."""
    answer = await sign_in(client, transport="cookies")
    assert "access_token" not in answer
    assert "refresh_token" not in answer
    assert (await client.get("/protected")).json() == {
        "logged_in_as": "testuser",
        "roles": ["user"],
    }


async def test_unknown_wrong_and_disabled_are_one(
    client: httpx.AsyncClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who fails to sign in learns nothing: same body, same number of verifications."""
    user = await parts.users.find("testuser")
    verified = []
    verify = parts.passwords.verify

    async def counting(password: str, hashed: str | None) -> bool:
        verified.append(password)
        return await verify(password, hashed)

    monkeypatch.setattr(type(parts.passwords), "verify", staticmethod(counting))
    unknown = await client.post("/login", json={"username": "nobody", "password": "testpass"})
    wrong = await client.post("/login", json={"username": "testuser", "password": "wrong"})
    async with parts.database.write() as session:
        await session.execute(update(User).where(User.id == user.id).values(is_active=False))
    disabled = await client.post("/login", json={"username": "testuser", "password": "testpass"})
    bodies = [r.json() | {"request_id": ""} for r in (unknown, wrong, disabled)]
    assert [r.status_code for r in (unknown, wrong, disabled)] == [401] * 3
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0]["code"] == "bad_credentials"
    assert len(verified) == 3
    assert unknown.headers["WWW-Authenticate"] == "Bearer"


async def test_parallel_failures_count_one_by_one(app: AsyncFlask, parts: Parts) -> None:
    """Of 30 wrong attempts at once exactly the limit is tried; the owner elsewhere gets in."""
    wrong = {"username": "testuser", "password": "wrong"}
    right = {"username": "testuser", "password": "testpass"}
    async with client_of(app) as here, client_of(app, "10.9.8.7") as elsewhere:
        answers = await asyncio.gather(*(here.post("/login", json=wrong) for _ in range(30)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [401] * 10 + [429] * 20
        refused = await here.post("/login", json=right)
        assert await code_of(refused) == (429, "too_many_requests")
        assert 1 <= int(refused.headers["Retry-After"]) <= 301
        assert (await elsewhere.post("/login", json=right)).status_code == 200


async def test_only_failures_count(client: httpx.AsyncClient) -> None:
    """Thirty right sign-ins leave room for a wrong one to be told so."""
    for _ in range(30):
        await sign_in(client, transport="json")
    wrong = await client.post("/login", json={"username": "testuser", "password": "wrong"})
    assert await code_of(wrong) == (401, "bad_credentials")


BAD_BODIES = [
    (b"{", 400), (b"", 400), (b"NaN", 400), (b'{"username": NaN}', 400), (b"\xff", 400),
    (b'\xef\xbb\xbf{"username": "a", "password": "b"}', 400), ("{}".encode("utf-16"), 400),
    (b'{"username": "a", "username": "b", "password": "c"}', 400), (b"[" * 60_000, 400),
    (b"[" * 100_000, 413),
    (b"[" * 1000 + b"]" * 1000, 400), (b'{"a":' * 990 + b"1" + b"}" * 990, 400),
    (b"[]", 422), (b"null", 422), (b'"x"', 422), (b"1" * 400, 400),
    (b'{"username": "a", "password": "\\ud800"}', 422),
    (b'{"username": "a\\u0000", "password": "b"}', 422),
    (b'{"username": "a", "password": "b\\u0000"}', 422),
    (b'{"username": 1, "password": true}', 422), (b'{"username": " a", "password": "b"}', 422),
    (b'{"username": "a", "password": "b", "transport": "pigeon"}', 422),
]  # fmt: skip


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("body", "status"), BAD_BODIES)
async def test_malformed_bodies_are_4xx(
    client: httpx.AsyncClient, body: bytes, status: int
) -> None:
    """Whatever a body holds, the answer is a 4xx problem of the contract."""
    headers = {"Content-Type": "application/json"}
    response = await client.post("/login", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["status"] == status
    assert response.headers["Content-Type"] == "application/problem+json"


async def test_all_faults_are_told_at_once(client: httpx.AsyncClient) -> None:
    """Missing, unknown and wrong fields are all named; without JSON it is 415."""
    response = await client.post("/login", json={"password": 1, "remember": True})
    assert await code_of(response) == (422, "validation_failed")
    fields = {error["field"] for error in response.json()["errors"]}
    assert fields == {"username", "password", "remember"}
    plain = await client.post("/login", content=b"username=a")
    assert await code_of(plain) == (415, "unsupported_media_type")


async def test_refresh_rotates_and_a_retry_gets_the_same_generation(
    client: httpx.AsyncClient,
) -> None:
    """Within the grace a spent token gives its successor again, never another one."""
    first = await sign_in(client, transport="json")
    client.cookies.clear()
    headers = bearer(first["refresh_token"])
    one = (await client.post("/refresh", headers=headers)).json()
    two = (await client.post("/refresh", headers=headers)).json()
    assert one["refresh"] is True
    assert "user" not in one
    assert "login" not in one
    jtis = [claims_of(t["refresh_token"])["jti"] for t in (first, one, two)]
    assert jtis[0] != jtis[1] == jtis[2]
    assert claims_of(one["access_token"])["fresh"] is False
    child = await client.post("/refresh", headers=bearer(one["refresh_token"]))
    assert child.status_code == 200


async def test_fifty_parallel_refreshes_are_one_generation(
    client: httpx.AsyncClient,
) -> None:
    """Every 200 of the race belongs to one generation, and its child works."""
    first = await sign_in(client, transport="json")
    headers = bearer(first["refresh_token"])
    answers = await asyncio.gather(*(client.post("/refresh", headers=headers) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    children = {claims_of(answer.json()["refresh_token"])["jti"] for answer in answers}
    assert len(children) == 1
    after = await client.post("/refresh", headers=bearer(answers[7].json()["refresh_token"]))
    assert after.status_code == 200


async def test_reuse_outside_the_grace_ends_the_session(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """The spent token, its successor and the access token are refused, though it was a 401."""
    first = await sign_in(client, transport="json")
    child = (await client.post("/refresh", headers=bearer(first["refresh_token"]))).json()
    await rewind(parts, rotated_at=timedelta(seconds=11))
    reused = await client.post("/refresh", headers=bearer(first["refresh_token"]))
    assert await code_of(reused) == (401, "refresh_reused")
    assert reused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    gone = await client.post("/refresh", headers=bearer(child["refresh_token"]))
    assert await code_of(gone) == (401, "token_revoked")
    access = await client.get("/protected", headers=bearer(child["access_token"]))
    assert await code_of(access) == (401, "token_revoked")
    async with parts.database.read() as session:
        actions = set(await session.scalars(select(AuditEvent.action)))
    assert "session.refresh_reused" in actions


async def test_only_the_immediate_predecessor_has_grace(client: httpx.AsyncClient) -> None:
    """A grandparent is reuse at once, however young."""
    first = await sign_in(client, transport="json")
    child = (await client.post("/refresh", headers=bearer(first["refresh_token"]))).json()
    await client.post("/refresh", headers=bearer(child["refresh_token"]))
    reused = await client.post("/refresh", headers=bearer(first["refresh_token"]))
    assert await code_of(reused) == (401, "refresh_reused")


async def test_the_grace_is_not_armed_again(client: httpx.AsyncClient, parts: Parts) -> None:
    """Retries within the grace do not make it longer."""
    first = await sign_in(client, transport="json")
    headers = bearer(first["refresh_token"])
    await client.post("/refresh", headers=headers)
    await rewind(parts, rotated_at=timedelta(seconds=8))
    assert (await client.post("/refresh", headers=headers)).status_code == 200
    await rewind(parts, rotated_at=timedelta(seconds=4))
    assert await code_of(await client.post("/refresh", headers=headers)) == (401, "refresh_reused")


@pytest.mark.parametrize("column", ["idle_expires_at"])
async def test_a_session_that_is_over_cannot_be_refreshed(
    client: httpx.AsyncClient, parts: Parts, column: str
) -> None:
    """Past its lifetime by the database's clock the answer is token_expired."""
    first = await sign_in(client, transport="json")
    await rewind(parts, **{column: timedelta(days=60)})
    over = await client.post("/refresh", headers=bearer(first["refresh_token"]))
    assert await code_of(over) == (401, "token_expired")


async def test_a_refresh_never_outlives_the_absolute_lifetime(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Near its end a session's refresh token expires with it, not a week later."""
    first = await sign_in(client, transport="json")
    await rewind(parts, expires_at=timedelta(seconds=2_592_000 - 100))
    again = (await client.post("/refresh", headers=bearer(first["refresh_token"]))).json()
    claims = claims_of(again["refresh_token"])
    assert 0 < int(str(claims["exp"])) - int(str(claims["iat"])) <= 101
    assert again["expires_in"] <= 101


async def test_changed_roles_bite_at_once_and_a_refresh_repairs(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """A role taken away: the next request is stale, the refreshed token lacks the role."""
    tokens = await sign_in(client, "admin", "adminpass", transport="json")
    await parts.users.create("second", "kumquat vienna 77", None, ["admin"], SYSTEM)
    admin = await parts.users.find("admin")
    assert (await client.get("/admin/users", headers=bearer(tokens["access_token"]))).is_success
    await parts.users.set_roles(admin.id, ["user"], SYSTEM)
    stale = await client.get("/protected", headers=bearer(tokens["access_token"]))
    assert await code_of(stale) == (401, "token_stale")
    fresh = (await client.post("/refresh", headers=bearer(tokens["refresh_token"]))).json()
    refused = await client.get("/admin/users", headers=bearer(fresh["access_token"]))
    assert await code_of(refused) == (403, "insufficient_permission")
    assert (await client.get("/protected", headers=bearer(fresh["access_token"]))).is_success


async def test_a_disabled_user_can_do_nothing(client: httpx.AsyncClient, parts: Parts) -> None:
    """Access token, refresh token and password are refused from the next request on."""
    tokens = await sign_in(client, transport="json")
    user = await parts.users.find("testuser")
    await parts.users.deactivate(user.id, SYSTEM)
    access = await client.get("/protected", headers=bearer(tokens["access_token"]))
    refresh = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
    assert access.status_code == refresh.status_code == 401
    again = await client.post("/login", json={"username": "testuser", "password": "testpass"})
    assert await code_of(again) == (401, "bad_credentials")


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
async def test_logout_with_either_token_ends_both(client: httpx.AsyncClient, kind: str) -> None:
    """Whichever token signs out, both are refused from that answer on; a second time is 401."""
    tokens = await sign_in(client, transport="json")
    out = await client.post("/logout", headers=bearer(tokens[kind]))
    assert (out.status_code, out.json()) == (200, {"logout": True})
    access = await client.get("/protected", headers=bearer(tokens["access_token"]))
    refresh = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
    again = await client.post("/logout", headers=bearer(tokens[kind]))
    for refused in (access, refresh, again):
        assert await code_of(refused) == (401, "token_revoked")


async def test_logout_clears_the_cookies_also_on_401(client: httpx.AsyncClient) -> None:
    """A cookie that is no good (any more) is cleared with the three others; none, nothing."""
    response = await client.post("/logout")
    assert await code_of(response) == (401, "missing_token")
    assert "set-cookie" not in response.headers
    response = await client.post("/logout", headers={"Cookie": "access_token=a.b.c"})
    assert await code_of(response) == (401, "invalid_token")
    cleared = response.headers.get_list("set-cookie")
    assert len(cleared) == 4
    assert all("Path=/" in cookie and "SameSite=Lax" in cookie for cookie in cleared)


async def test_logout_all_ends_every_session(client: httpx.AsyncClient) -> None:
    """Three logins, one logout/all: three sessions, none works."""
    tokens = [await sign_in(client, transport="json") for _ in range(3)]
    out = await client.post("/logout/all", headers=bearer(tokens[0]["access_token"]))
    assert out.json() == {"logout": True, "sessions": 3}
    for one in tokens:
        refused = await client.get("/protected", headers=bearer(one["access_token"]))
        assert await code_of(refused) == (401, "token_revoked")


async def test_a_password_change_keeps_this_session_alone(client: httpx.AsyncClient) -> None:
    """The new password works, the old does not, other sessions are over."""
    other, here = [await sign_in(client, transport="json") for _ in range(2)]
    body = {"current_password": "testpass", "new_password": "kumquat vienna 77"}
    changed = await client.post("/me/password", json=body, headers=bearer(here["access_token"]))
    assert changed.status_code == 204
    assert (await client.get("/protected", headers=bearer(here["access_token"]))).is_success
    over = await client.get("/protected", headers=bearer(other["access_token"]))
    assert await code_of(over) == (401, "token_revoked")
    old = await client.post("/login", json={"username": "testuser", "password": "testpass"})
    assert old.status_code == 401
    await sign_in(client, "testuser", "kumquat vienna 77")


async def test_ones_own_sessions_are_listed_and_ended(client: httpx.AsyncClient) -> None:
    """Both are listed, the asking one is current, the other can be ended; nobody else's can."""
    other, here = [await sign_in(client, transport="json") for _ in range(2)]
    stranger = await sign_in(client, "admin", "adminpass", transport="json")
    headers = bearer(here["access_token"])
    items = (await client.get("/me/sessions", headers=headers)).json()["items"]
    assert [item["current"] for item in items] == [True, False]
    ended = await client.delete(f"/me/sessions/{items[1]['id']}", headers=headers)
    assert ended.status_code == 204
    over = await client.get("/protected", headers=bearer(other["access_token"]))
    assert await code_of(over) == (401, "token_revoked")
    theirs = claims_of(stranger["access_token"])["sid"]
    missing = await client.delete(f"/me/sessions/{theirs}", headers=headers)
    assert await code_of(missing) == (404, "not_found")


async def test_registration_is_closed_unless_opened(client: httpx.AsyncClient) -> None:
    """By default nobody makes an account for themselves."""
    body = {"username": "bob", "password": "kumquat vienna 77"}
    assert await code_of(await client.post("/register", json=body)) == (403, "registration_closed")
