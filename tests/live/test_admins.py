"""Administrators against each other, on a service with two workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.running import postgresql
from tests.live._serve import Serving, start

PASSWORD = "correct-Harbour-93"
ROUNDS = 50
WRONG_SIGN_INS = 60


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Two workers with the demo accounts, on each database."""
    folder: Path = tmp_path_factory.mktemp("admins")
    arguments = ("--demo", "--workers", "2")
    if request.param == "sqlite":
        serving = start(folder, *arguments)
        yield serving
        assert serving.stop() == 0
        return
    with postgresql(folder / "pg") as url:
        plain = url.replace("+asyncpg", "")
        serving = start(folder / "rolecall", *arguments, DATABASE_URL=plain)
        yield serving
        assert serving.stop() == 0


@pytest.fixture
async def admin(served: Serving) -> AsyncIterator[httpx.AsyncClient]:
    """The demo administrator, on a new connection for each request."""
    async with _client(served) as client:
        await _sign_in(client, "admin", "adminpass")
        yield client


def _client(served: Serving) -> httpx.AsyncClient:
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=served.url, timeout=30, limits=limits)


async def _sign_in(client: httpx.AsyncClient, name: str, password: str = PASSWORD) -> None:
    body = {"username": name, "password": password, "transport": "json"}
    answer = await client.post("/login", json=body)
    assert answer.status_code == 200, answer.text
    client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"


async def _made(admin: httpx.AsyncClient, name: str) -> str:
    body = {"username": name, "password": PASSWORD, "roles": ["user", "admin"]}
    answer = await admin.post("/admin/users", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def test_a_disabled_admin_makes_no_user_with_a_request_that_waited_for_its_hash(
    served: Serving, admin: httpx.AsyncClient
) -> None:
    """60 wrong sign-ins fill the queue of hashes; a rogue admin asks for another admin behind them.

    They are disabled while that waits: it is refused (79), and there is no such user.
    """
    rogue_id = await _made(admin, "rogue")
    async with _client(served) as rogue, _client(served) as crowd:
        await _sign_in(rogue, "rogue")
        wrong: list[asyncio.Task[Any]] = []
        for number in range(WRONG_SIGN_INS):
            body = {"username": f"nobody{number}", "password": "wrong", "transport": "json"}
            wrong.append(asyncio.create_task(crowd.post("/login", json=body)))
        await asyncio.sleep(0.1)
        another = {"username": "accomplice", "password": PASSWORD, "roles": ["admin"]}
        waiting = asyncio.create_task(rogue.post("/admin/users", json=another))
        await asyncio.sleep(0.1)
        disabled = await admin.patch(f"/admin/users/{rogue_id}", json={"is_active": False})
        assert disabled.status_code == 200, disabled.text
        assert not waiting.done(), "it did not wait: nothing is shown"
        answer = await waiting
        await asyncio.gather(*wrong)
    assert answer.status_code in {401, 403}, f"{answer.status_code} {answer.text}"
    found = await admin.get("/admin/users", params={"q": "accomplice"})
    assert found.json()["items"] == []


async def test_two_admins_who_disable_each_other_at_once_are_never_both_disabled(
    served: Serving, admin: httpx.AsyncClient
) -> None:
    """Fifty rounds: one of them wins, nobody waits for the other for ever, nothing answers 5xx."""
    ids = [await _made(admin, "left"), await _made(admin, "right")]
    slowest = 0.0
    async with _client(served) as left, _client(served) as right:
        await _sign_in(left, "left")
        await _sign_in(right, "right")
        for number in range(ROUNDS):
            began = time.monotonic()
            answers = await asyncio.gather(
                left.patch(f"/admin/users/{ids[1]}", json={"is_active": False}),
                right.patch(f"/admin/users/{ids[0]}", json={"is_active": False}),
            )
            slowest = max(slowest, time.monotonic() - began)
            statuses = [answer.status_code for answer in answers]
            assert set(statuses) <= {200, 401, 403}, [answer.text for answer in answers]
            active = [(await admin.get(f"/admin/users/{one}")).json()["is_active"] for one in ids]
            assert active.count(True) == 1, f"round {number}: {active} after {statuses}"
            assert statuses.count(200) == 1, f"round {number}: {statuses}"
            loser, name, client = (ids[0], "left", left) if active[1] else (ids[1], "right", right)
            back = await admin.patch(f"/admin/users/{loser}", json={"is_active": True})
            assert back.status_code == 200
            await _sign_in(client, name)
    assert slowest < 3, f"{slowest:.1f} s: somebody waited for a lock"
