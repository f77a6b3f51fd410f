"""A change that concerns thousands holds for all of them from its answer on, in every worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.running import postgresql
from tests.live._many import (
    add_sessions,
    add_users,
    count_revocations,
    database_at,
    password_hash_of,
)
from tests.live._serve import Serving, start, wait_until

MANY = 5_000
SAMPLED = 12
# A connection each, so that both workers are asked.
PROBES = 4
PASSWORD = "testpass"
# What a change may write to the ledger, however many it concerns.
ROWS_AT_MOST = 20


@dataclass
class Served:
    """A service with two workers, its database, and its administrator."""

    serving: Serving
    database: AsyncEngine
    admin: httpx.AsyncClient
    hashed: str

    async def change(self, method: str, path: str, body: Any = None) -> None:
        """Make a change as the administrator."""
        answer = await self.admin.request(method, path, json=body)
        assert answer.status_code in {200, 204}, f"{path}: {answer.status_code} {answer.text}"

    async def made(self, path: str, **body: Any) -> dict[str, Any]:
        """Make something as the administrator."""
        answer = await self.admin.post(path, json=body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def sign_in(self, username: str, **more: str) -> dict[str, str]:
        """Return the tokens of a new session."""
        body = {"username": username, "password": PASSWORD, "transport": "json", **more}
        answer = await self.admin.post("/login", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def refreshed(self, tokens: list[dict[str, str]]) -> list[dict[str, str]]:
        """Return the next tokens of each session."""
        answers = [await self._with(one["refresh_token"], "POST", "/refresh") for one in tokens]
        assert {answer.status_code for answer in answers} == {200}
        return [dict(answer.json()) for answer in answers]

    async def statuses(self, tokens: list[dict[str, str]]) -> Counter[int]:
        """Return what both workers answer to the access tokens."""
        asked = [
            self._with(one["access_token"], "GET", "/protected")
            for one in tokens
            for _ in range(PROBES)
        ]
        return Counter(answer.status_code for answer in await asyncio.gather(*asked))

    async def refreshes(self, tokens: list[dict[str, str]]) -> Counter[int]:
        """Return what is answered to the refresh tokens."""
        asked = [self._with(one["refresh_token"], "POST", "/refresh") for one in tokens]
        return Counter(answer.status_code for answer in await asyncio.gather(*asked))

    async def _with(self, token: str, method: str, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return await self.admin.request(method, path, headers=headers)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def serving(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[tuple[Serving, str]]:
    """Two workers with the demo accounts, and the URL of their database."""
    folder = short_tmp / f"many-{request.param}"
    folder.mkdir()
    arguments = ("--demo", "--workers", "2")
    if request.param == "sqlite":
        found = start(folder, *arguments)
        yield found, f"sqlite+aiosqlite:///{folder / 'data' / 'rolecall.sqlite3'}"
        found.stop()
        return
    with postgresql(folder / "pg") as url:
        found = start(folder, *arguments, DATABASE_URL=url.replace("+asyncpg", ""))
        yield found, url
        found.stop()


@pytest.fixture
async def served(serving: tuple[Serving, str]) -> AsyncIterator[Served]:
    """The service, with its administrator signed in."""
    server, url = serving
    limits = httpx.Limits(max_keepalive_connections=0)
    async with (
        database_at(url) as database,
        httpx.AsyncClient(base_url=server.url, timeout=90, limits=limits) as admin,
    ):
        hashed = await password_hash_of(database, "testuser")
        found = Served(server, database, admin, hashed)
        body = {"username": "admin", "password": "adminpass", "transport": "json"}
        token = (await admin.post("/login", json=body)).json()["access_token"]
        admin.headers["Authorization"] = f"Bearer {token}"
        yield found


async def holders(served: Served, role: str) -> tuple[list[str], list[UUID]]:
    """Make a role with many holders; return some of their names, and all their ids."""
    await served.made("/admin/roles", name=role, permissions=["audit:read"], includes=[])
    names = [f"{role}{number:05}" for number in range(MANY)]
    ids = await add_users(served.database, names, served.hashed, role)
    return names[:: MANY // SAMPLED][:SAMPLED], ids


async def test_a_role_that_many_hold_is_changed_twice_and_a_worker_dies_in_between(
    served: Served,
) -> None:
    """All tokens of before each change are refused at once (80), and after a worker was replaced.

    The change writes a few rows, not one for each holder.
    """
    names, _ = await holders(served, "many-roles")
    first = [await served.sign_in(name) for name in names]
    assert await served.statuses(first) == {200: SAMPLED * PROBES}
    before = await count_revocations(served.database)
    path = "/admin/roles/many-roles"
    await served.change("PATCH", path, {"permissions": []})
    assert await served.statuses(first) == {401: SAMPLED * PROBES}
    second = await served.refreshed(first)
    assert await served.statuses(second) == {200: SAMPLED * PROBES}
    workers = served.serving.workers()
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: workers[0] not in served.serving.workers())
    await served.change("PATCH", path, {"permissions": ["audit:read"]})
    await served.change("PATCH", path, {"permissions": []})
    assert await served.statuses(first + second) == {401: 2 * SAMPLED * PROBES}
    wait_until(lambda: len(served.serving.workers()) == 2)
    third = await served.refreshed(second)
    for _ in range(4):
        assert await served.statuses(first + second) == {401: 2 * SAMPLED * PROBES}
        assert await served.statuses(third) == {200: SAMPLED * PROBES}
        await asyncio.sleep(0.5)
    assert await count_revocations(served.database) - before <= ROWS_AT_MOST


async def test_a_client_app_with_many_sessions_is_disabled(served: Served) -> None:
    """All tokens of before are refused at once, refresh tokens too, and when it is enabled again.

    The change writes a few rows, not one for each session.
    """
    names, ids = await holders(served, "many-clients")
    app = await served.made(
        "/admin/clients", name="many", allowed_roles=["many-clients"], audiences=[],
        grants=["refresh_token"], public=True,
    )  # fmt: skip
    client_id = app["client_id"]
    await add_sessions(served.database, ids, UUID(client_id))
    tokens = [await served.sign_in(name, client_id=client_id) for name in names]
    assert await served.statuses(tokens) == {200: SAMPLED * PROBES}
    before = await count_revocations(served.database)
    await served.change("PATCH", f"/admin/clients/{client_id}", {"is_active": False})
    assert await served.statuses(tokens) == {401: SAMPLED * PROBES}
    await served.change("PATCH", f"/admin/clients/{client_id}", {"is_active": True})
    assert await served.statuses(tokens) == {401: SAMPLED * PROBES}
    assert await served.refreshes(tokens) == {401: SAMPLED}
    after = await served.sign_in(names[0], client_id=client_id)
    assert await served.statuses([after]) == {200: PROBES}
    assert await count_revocations(served.database) - before <= ROWS_AT_MOST


async def test_a_user_with_many_sessions_is_logged_out_everywhere(served: Served) -> None:
    """All their tokens of before are refused at once, and one signed in afterwards lives.

    The change writes a few rows, not one for each session.
    """
    user = await served.made("/admin/users", username="busy", password="correct-Harbour-93")
    # the password of the others
    (user_id,) = await add_users(served.database, ["busiest"], served.hashed, "user")
    await add_sessions(served.database, [user_id] * MANY)
    tokens = [await served.sign_in("busiest") for _ in range(SAMPLED)]
    assert await served.statuses(tokens) == {200: SAMPLED * PROBES}
    before = await count_revocations(served.database)
    await served.change("POST", f"/admin/users/{user_id}/logout")
    assert await served.statuses(tokens) == {401: SAMPLED * PROBES}
    assert await served.refreshes(tokens) == {401: SAMPLED}
    after = await served.sign_in("busiest")
    await served.change("POST", f"/admin/users/{user['id']}/logout")
    assert await served.statuses([after]) == {200: PROBES}
    await served.change("PATCH", f"/admin/users/{user_id}", {"is_active": False})
    assert await served.statuses([*tokens, after]) == {401: (SAMPLED + 1) * PROBES}
    assert await count_revocations(served.database) - before <= ROWS_AT_MOST
