"""No request of an ordinary user or client app, repeated at will, writes rows without bound."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from sqlalchemy import func, select

from api.asgi import AsyncFlask
from api.db.models import AuditEvent, Revocation
from api.parts import Parts
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_admin import admin as admin
from tests.http.test_clients import granted, through
from tests.http.test_oauth import REVOKE, auth
from tests.http.test_oauth import reports as reports

TIMES = 40


async def actions(parts: Parts, action: str) -> list[AuditEvent]:
    """Return the audit rows of an action, the oldest first."""
    query = select(AuditEvent).where(AuditEvent.action == action).order_by(AuditEvent.id)
    async with parts.database.read() as session:
        return list(await session.scalars(query))


async def written(parts: Parts) -> int:
    """Return how many rows there are that a request may have written."""
    async with parts.database.read() as session:
        audited = await session.scalar(select(func.count()).select_from(AuditEvent))
        revoked = await session.scalar(select(func.count()).select_from(Revocation))
    return (audited or 0) + (revoked or 0)


async def test_refusals_are_counted(app: AsyncFlask, parts: Parts) -> None:
    """The first refusal of a user at a route is a row, and all others are one more."""
    async with client_of(app) as client:
        tokens = await sign_in(client, transport="json")
        headers = bearer(tokens["access_token"])
        refused = await asyncio.gather(
            *(client.get("/admin/users", headers=headers) for _ in range(TIMES)),
            client.get("/admin/audit", headers=headers),
        )
    assert {answer.status_code for answer in refused} == {403}
    assert [row.detail["route"] for row in await actions(parts, "admin.refused")].count(
        "/admin/users"
    ) == 1
    await parts.repeated_events.write_all()
    rows = await actions(parts, "admin.refused")
    assert len(rows) == 3
    user: Any = tokens["user"]
    assert {row.actor for row in rows} == {user["id"]}
    assert rows[-1].detail == {"method": "GET", "route": "/admin/users", "count": TIMES - 1}


async def test_tokens_of_a_client_app_are_counted(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, parts: Parts, reports: dict[str, Any]
) -> None:
    """However many it asks for: two rows, and the numbers of the dashboard are right."""
    for _ in range(TIMES):
        assert (await granted(client, reports)).status_code == 200
    assert len(await actions(parts, "token.issued")) == 1
    await parts.repeated_events.write_all()
    first, counted = await actions(parts, "token.issued")
    assert first.actor == first.target == counted.actor == counted.target == reports["client_id"]
    assert counted.detail == {**first.detail, "count": TIMES - 1}
    stats = (await admin.get("/admin/stats", params={"days": 1})).json()
    assert sum(bucket["client_tokens"] for bucket in stats["activity"]) == TIMES


async def test_a_token_is_revoked_once(
    client: httpx.AsyncClient, parts: Parts, reports: dict[str, Any]
) -> None:
    """Whoever revokes it again, at /oauth/revoke or at /logout, writes nothing."""
    token = (await granted(client, reports)).json()["access_token"]
    form = {"token": token}
    assert (await client.post(REVOKE, data=form, auth=auth(reports))).status_code == 200
    before = await written(parts)
    for _ in range(TIMES):
        assert (await client.post(REVOKE, data=form, auth=auth(reports))).status_code == 200
        assert (await client.post("/logout", headers=bearer(token))).status_code == 401
    assert await written(parts) == before


async def test_a_session_ends_once(
    client: httpx.AsyncClient, parts: Parts, reports: dict[str, Any]
) -> None:
    """So do its refresh token at /oauth/revoke, its refreshes and its other ends."""
    tokens = await sign_in(client, transport="json", **through(reports))
    form, headers = {"token": tokens["refresh_token"]}, bearer(tokens["access_token"])
    assert (await client.post(REVOKE, data=form, auth=auth(reports))).status_code == 200
    before = await written(parts)
    for _ in range(TIMES):
        assert (await client.post(REVOKE, data=form, auth=auth(reports))).status_code == 200
        for path in ("/logout", "/logout/all"):
            assert (await client.post(path, headers=headers)).status_code == 401
        answer = await client.post("/refresh", headers=bearer(tokens["refresh_token"]))
        assert answer.status_code == 401
    assert await written(parts) == before


async def test_failures_are_bounded_by_the_throttle(
    client: httpx.AsyncClient, parts: Parts, reports: dict[str, Any]
) -> None:
    """Wrong passwords, at /login and /me/password, and wrong secrets are rows until it is 429."""
    most = parts.settings.login_failures_pair
    headers = bearer((await sign_in(client, transport="json"))["access_token"])
    body = {"current_password": "wrong-Secret-55", "new_password": "another-Lantern-47"}
    for _ in range(most):
        await client.post("/login", json={"username": "testuser", "password": "wrong-Secret-55"})
        await client.post("/me/password", json=body, headers=headers)
        await granted(client, {**reports, "client_secret": "wrong"})
    assert len(await actions(parts, "login.failed")) == most
    assert len(await actions(parts, "client.refused")) == most
    before = await written(parts)
    login = {"username": "testuser", "password": "wrong-Secret-55"}
    assert (await client.post("/login", json=login)).status_code == 429
    assert (await client.post("/me/password", json=body, headers=headers)).status_code == 429
    assert (await granted(client, {**reports, "client_secret": "wrong"})).status_code == 429
    assert await written(parts) == before


async def test_changes_of_an_address_are_bounded(client: httpx.AsyncClient, parts: Parts) -> None:
    """A user who changes it to and fro meets 429, and no further row is written."""
    headers = bearer((await sign_in(client, transport="json"))["access_token"])
    answers = [
        await client.patch("/me", json={"email": f"me{n % 2}@example.org"}, headers=headers)
        for n in range(TIMES)
    ]
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200] * 20 + [429] * (TIMES - 20)
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert len(await actions(parts, "user.changed")) == 20
