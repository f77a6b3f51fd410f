"""Users who sign in through a confidential client app: it authenticates as well."""

from __future__ import annotations

import base64
from typing import Any
from uuid import uuid4

import httpx
import pytest

from api.asgi import AsyncFlask
from api.parts import Parts
from tests.conftest import bearer, client_of
from tests.http.test_admin import ON_SQLITE, code
from tests.http.test_admin import admin as admin
from tests.http.test_clients import CLIENTS, granted, refreshed, registered, said, through

USER = {"username": "testuser", "password": "testpass", "transport": "json"}
UNKNOWN = [{"field": "client_id", "message": "There is no such client."}]
WRONG_PASSWORD = USER | {"password": "wrong-Lantern-5501"}


def basic(client_id: object, secret: object) -> dict[str, str]:
    """Return the header of HTTP Basic."""
    pair = base64.b64encode(f"{client_id}:{secret}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}


@pytest.fixture
async def confidential(admin: httpx.AsyncClient) -> dict[str, Any]:
    """A client app with a secret, which may refresh."""
    return await registered(admin, "user", grants=["client_credentials", "refresh_token"])


@pytest.fixture
async def public(admin: httpx.AsyncClient) -> dict[str, Any]:
    """A client app without a secret."""
    return await registered(admin, "user", public=True, grants=["refresh_token"])


async def test_a_confidential_client_authenticates_at_a_sign_in(
    client: httpx.AsyncClient, confidential: dict[str, Any]
) -> None:
    """By client_secret, or by HTTP Basic with the client_id in the body or without."""
    one, secret = confidential["client_id"], confidential["client_secret"]
    lower = {"Authorization": basic(one, secret)["Authorization"].replace("Basic", "basic")}
    quoted = basic(one.replace("-", "%2D"), secret)
    for body, headers in (
        (through(confidential), {}),
        ({"client_id": one.upper(), "client_secret": secret}, {}),
        ({"client_id": one}, basic(one, secret)),
        ({}, basic(one, secret)), ({}, lower), ({}, quoted),
    ):  # fmt: skip
        answer = await client.post("/login", json=USER | body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert secret not in answer.text
        for name in ("access_token", "refresh_token"):
            assert said(answer.json()[name])["client_id"] == one


@ON_SQLITE
async def test_a_client_that_does_not_prove_who_it_is_signs_nobody_in(
    client: httpx.AsyncClient, confidential: dict[str, Any], public: dict[str, Any],
    admin: httpx.AsyncClient,
) -> None:  # fmt: skip
    """401, the same for a right and a wrong password, and counted and noted as the client's."""
    one, secret = confidential["client_id"], confidential["client_secret"]
    other = public["client_id"]
    answers = []
    for body, headers in (
        ({"client_id": one}, {}),
        ({"client_id": one, "client_secret": ""}, {}),
        ({"client_id": one, "client_secret": secret + "x"}, {}),
        ({}, basic(one, "wrong")), ({}, basic(one, "")),
        # a public client has no secret
        ({"client_id": other, "client_secret": "x"}, {}),
        ({"client_id": other, "client_secret": ""}, {}),
        ({}, basic(other, secret)), ({}, basic(other, "")),
    ):  # fmt: skip
        for user in (USER, WRONG_PASSWORD, USER | {"username": "nobody"}):
            answers.append(await client.post("/login", json=user | body, headers=headers))
            if answers[-1].status_code == 429:
                continue
            assert code(answers[-1]) == (401, "bad_credentials"), body
            assert answers[-1].headers["WWW-Authenticate"] == "Bearer"
            assert "set-cookie" not in answers[-1].headers
            assert secret not in answers[-1].text
            shown = answers[-1].json() | {"request_id": ""}
            assert shown == answers[0].json() | {"request_id": ""}
    refused = [answer for answer in answers if answer.status_code == 401]
    log = (await admin.get("/admin/audit", params={"limit": 200})).json()["items"]
    actions = [row["action"] for row in log]
    assert actions.count("client.refused") == len(refused) > 5
    assert "login.failed" not in actions
    assert secret not in str(log)
    # no attempt counts for the user
    assert (await client.post("/login", json=USER)).status_code == 200


@ON_SQLITE
async def test_wrong_client_secrets_are_throttled_and_the_right_one_is_not(
    app: AsyncFlask, parts: Parts, confidential: dict[str, Any]
) -> None:
    """One count for /login and /oauth/token; users who name no client are not touched."""
    most = parts.settings.login_failures_pair
    wrong = {**confidential, "client_secret": "wrong"}
    async with client_of(app, "192.0.2.9") as client:
        for attempt in range(most):
            if attempt % 2:
                answer = await granted(client, wrong)
            else:
                answer = await client.post("/login", json=USER | through(wrong))
            assert answer.status_code == 401
        answer = await client.post("/login", json=USER | through(wrong))
        assert code(answer) == (429, "too_many_requests")
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await granted(client, wrong)).status_code == 429
        for body in (through(confidential), {}):
            assert (await client.post("/login", json=USER | body)).status_code == 200


@ON_SQLITE
async def test_a_client_is_presented_in_one_way(
    client: httpx.AsyncClient, confidential: dict[str, Any], public: dict[str, Any]
) -> None:
    """Two ways, two clients and a malformed Basic are 400; faults of the body are 422."""
    one, secret = confidential["client_id"], confidential["client_secret"]
    right = basic(one, secret)
    for body, headers in (
        (through(confidential), right),
        ({"client_secret": secret}, right),
        ({"client_id": public["client_id"]}, right),
        ({"client_id": str(uuid4())}, right),
        ({}, {"Authorization": "Basic"}),
        ({}, {"Authorization": "Basic !!"}),
        ({}, {"Authorization": b"Basic \xe9"}),
        ({}, {"Authorization": "Basic Og=="}),
        ({}, {"Authorization": "Basic " + base64.b64encode(b"no colon").decode()}),
        ({}, {"Authorization": "Basic " + base64.b64encode(b"\xff:x").decode()}),
        ({}, {"Authorization": right["Authorization"] + ", Bearer x"}),
    ):  # fmt: skip
        answer = await client.post("/login", json=USER | body, headers=headers)
        assert code(answer) == (400, "bad_request"), (body, headers)
        assert secret not in answer.text
    for body, field in (
        ({"client_secret": secret}, "client_id"),
        ({"client_id": one, "client_secret": None}, "client_secret"),
        ({"client_id": one, "client_secret": 1}, "client_secret"),
        ({"client_id": one, "client_secret": "x" * 257}, "client_secret"),
        ({"client_id": one, "client_secret": "a\0b"}, "client_secret"),
    ):
        answer = await client.post("/login", json=USER | body)
        assert code(answer) == (422, "validation_failed"), body
        assert [error["field"] for error in answer.json()["errors"]] == [field]
        assert secret not in answer.text
    lone = b'{"username": "a", "password": "b", "client_id": "%b", "client_secret": "\\ud800"}'
    answer = await client.post(
        "/login", content=lone % one.encode(), headers={"Content-Type": "application/json"}
    )
    assert code(answer) == (422, "validation_failed")


@ON_SQLITE
async def test_an_unknown_client_is_422_and_other_schemes_are_ignored(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, confidential: dict[str, Any]
) -> None:
    """As it was without a secret; a disabled client is told the same with its right secret."""
    unknown = str(uuid4())
    one, secret = confidential["client_id"], confidential["client_secret"]
    asked = [
        ({"client_id": unknown}, {}), ({"client_id": unknown, "client_secret": "x"}, {}),
        ({}, basic(unknown, "x")), ({}, basic(one.upper(), secret)),
    ]  # fmt: skip
    for body, headers in asked:
        answer = await client.post("/login", json=USER | body, headers=headers)
        assert code(answer) == (422, "validation_failed")
        assert [error["field"] for error in answer.json()["errors"]] == ["client_id"]
    # Basic with the name of somebody who is no client: a proxy asked for it
    proxys = basic("somebody", "x")["Authorization"]
    for header in (
        f"Bearer {secret}",
        "Bearer",
        "Digest x",
        "Negotiate",
        ", ,",
        "basically x",
        proxys,
    ):
        headers = {"Authorization": header}
        answer = await client.post("/login", json=USER, headers=headers)
        assert answer.status_code == 200, header
        assert "client_id" not in said(answer.json()["access_token"])
    assert (await admin.patch(f"{CLIENTS}/{one}", json={"is_active": False})).is_success
    for body, headers in (({}, basic(one, secret)), (through(confidential), {})):
        refused = await client.post("/login", json=USER | body, headers=headers)
        assert code(refused) == (422, "validation_failed")
        assert refused.json()["errors"] == UNKNOWN


async def test_a_confidential_clients_session_is_refreshed_at_the_token_endpoint_alone(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, confidential: dict[str, Any]
) -> None:
    """/refresh refuses it, and spends nothing: session and token stay good (RFC 6749 section 6)."""
    answer = await client.post("/login", json=USER | through(confidential))
    tokens = answer.json()
    for _ in range(2):
        refused = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
        assert code(refused) == (401, "invalid_token")
        assert "/oauth/token" in refused.json()["detail"]
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
        assert "set-cookie" not in refused.headers
    me = await client.get("/me", headers=bearer(tokens["access_token"]))
    assert me.status_code == 200
    answer = await refreshed(client, confidential, tokens["refresh_token"])
    assert answer.status_code == 200, answer.text
    # a spent one neither refreshes at /refresh nor ends the session there
    refused = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
    assert code(refused) == (401, "invalid_token")
    other = await registered(admin, "user", grants=["refresh_token"])
    newest = answer.json()["refresh_token"]
    foreign = await refreshed(client, other, newest)
    assert (foreign.status_code, foreign.json()["error"]) == (400, "invalid_grant")
    answer = await refreshed(client, confidential, newest)
    assert answer.status_code == 200
    # signing out and one's own sessions are as for everybody
    access = bearer(answer.json()["access_token"])
    sessions = (await client.get("/me/sessions", headers=access)).json()["items"]
    assert [session["current"] for session in sessions] == [True]
    out = await client.post("/logout", headers=bearer(answer.json()["refresh_token"]))
    assert (out.status_code, out.json()) == (200, {"logout": True})
    answer = await refreshed(client, confidential, answer.json()["refresh_token"])
    assert answer.json()["error"] == "invalid_grant"


@ON_SQLITE
async def test_a_cookie_of_a_confidential_clients_session_is_not_refreshed_here(
    client: httpx.AsyncClient, confidential: dict[str, Any]
) -> None:
    """/refresh leaves the cookies as they are; they sign out, and /oauth/token takes the value."""
    body = USER | through(confidential) | {"transport": "cookies"}
    answer = await client.post("/login", json=body)
    assert answer.status_code == 200
    csrf = {"X-CSRF-TOKEN": client.cookies["csrf_refresh_token"]}
    refused = await client.post("/refresh", headers=csrf)
    assert code(refused) == (401, "invalid_token")
    assert "set-cookie" not in refused.headers
    answer = await refreshed(client, confidential, client.cookies["refresh_token"])
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    csrf = {"X-CSRF-TOKEN": client.cookies["csrf_access_token"]}
    assert (await client.post("/logout", headers=csrf)).json() == {"logout": True}
    assert not client.cookies


async def test_a_public_client_signs_in_and_refreshes_as_before(
    client: httpx.AsyncClient, public: dict[str, Any]
) -> None:
    """By its client_id alone, at /refresh and at /oauth/token."""
    body = USER | {"client_id": public["client_id"]}
    tokens = (await client.post("/login", json=body)).json()
    answer = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
    assert answer.status_code == 200
    form = {
        "grant_type": "refresh_token", "client_id": public["client_id"],
        "refresh_token": answer.json()["refresh_token"],
    }  # fmt: skip
    assert (await client.post("/oauth/token", data=form)).status_code == 200


@ON_SQLITE
async def test_a_client_stays_public_or_confidential(
    admin: httpx.AsyncClient, confidential: dict[str, Any], public: dict[str, Any]
) -> None:
    """What sessions through it were opened by cannot change under them."""
    for app, to in ((confidential, True), (public, False)):
        path = f"{CLIENTS}/{app['client_id']}"
        answer = await admin.patch(path, json={"public": to, "name": "x"})
        assert code(answer) == (422, "validation_failed")
        assert [error["field"] for error in answer.json()["errors"]] == ["public"]
        assert (await admin.get(path)).json()["public"] is not to
