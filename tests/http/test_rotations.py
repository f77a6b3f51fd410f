"""Refreshes that arrive together share a transaction, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import event, select, update

from api.db import db_now
from api.db.models import Session, User
from api.parts import Parts
from tests.conftest import bearer, sign_in


async def refreshed(client: httpx.AsyncClient, login: Any) -> tuple[int, str]:
    """Return the status, and the error's code or nothing."""
    answer = await client.post("/refresh", headers=bearer(login["refresh_token"]))
    return answer.status_code, answer.json().get("code", "")


async def sid_of(client: httpx.AsyncClient, login: Any) -> UUID:
    """Return the session that a login opened."""
    answer = await client.get("/me/sessions", headers=bearer(login["access_token"]))
    return next(UUID(one["id"]) for one in answer.json()["items"] if one["current"])


async def test_each_of_a_lot_has_the_answer_that_it_has_alone(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Good, spent, spent long ago, ended, idle, of nobody any more: in one lot, each its own."""
    good, lost, stolen, ended, idle = [await sign_in(client, transport="json") for _ in range(5)]
    gone = await sign_in(client, "admin", "adminpass", transport="json")
    successor = await client.post("/refresh", headers=bearer(lost["refresh_token"]))
    await refreshed(client, stolen)
    await client.post("/logout", headers=bearer(ended["access_token"]))
    sids = [await sid_of(client, one) for one in (stolen, idle)]
    async with parts.database.write() as session:
        past = db_now(-60)
        await session.execute(update(Session).where(Session.id == sids[0]).values(rotated_at=past))
        await session.execute(
            update(Session).where(Session.id == sids[1]).values(idle_expires_at=past)
        )
        await session.execute(update(User).where(User.username == "admin").values(is_active=False))
    lot = [good, lost, stolen, ended, idle, gone, good]
    answers = await asyncio.gather(*(refreshed(client, one) for one in lot))
    assert answers == [
        (200, ""), (200, ""), (401, "refresh_reused"), (401, "token_revoked"),
        (401, "token_expired"), (401, "token_revoked"), (200, ""),
    ]  # fmt: skip
    access = await client.get("/protected", headers=bearer(stolen["access_token"]))
    assert (access.status_code, access.json()["code"]) == (401, "token_revoked")
    after = await client.post("/refresh", headers=bearer(successor.json()["refresh_token"]))
    assert after.status_code == 200


async def test_many_sessions_rotate_in_few_transactions(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Thirty refreshes at once, each of its own session, begin far fewer than thirty times."""
    logins = [await sign_in(client, transport="json") for _ in range(30)]
    commits = 0

    def counting(_connection: Any) -> None:
        nonlocal commits
        commits += 1

    engine = parts.database.engine.sync_engine
    event.listen(engine, "commit", counting)
    answers = await asyncio.gather(*(refreshed(client, one) for one in logins))
    event.remove(engine, "commit", counting)
    assert answers == [(200, "")] * 30
    assert commits <= 15
    async with parts.database.read() as session:
        generations = list(await session.scalars(select(Session.generation)))
    assert generations.count(2) == 30


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_row_that_somebody_holds_keeps_nobody_else_waiting(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """A session locked by a long transaction waits alone; those that came with it are answered."""
    held, *others = [await sign_in(client, transport="json") for _ in range(6)]
    sid = await sid_of(client, held)
    async with parts.database.write() as session:
        await session.execute(select(Session.id).where(Session.id == sid).with_for_update())
        waiting = asyncio.create_task(refreshed(client, held))
        answers = await asyncio.gather(*(refreshed(client, one) for one in others))
        assert answers == [(200, "")] * 5
        assert not waiting.done()
    assert await waiting == (200, "")


async def test_a_lot_that_cannot_be_committed_spends_nothing(
    client: httpx.AsyncClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database goes away in the midst of it: 503 for each, and each token still works."""
    logins = [await sign_in(client, transport="json") for _ in range(5)]

    async def failing(*_: Any) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr("sqlalchemy.ext.asyncio.AsyncConnection.commit", failing)
        answers = await asyncio.gather(*(refreshed(client, one) for one in logins))
    assert answers == [(503, "unavailable")] * 5
    answers = await asyncio.gather(*(refreshed(client, one) for one in logins))
    assert answers == [(200, "")] * 5


async def test_a_client_that_gives_up_leaves_its_lot_alone(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """The others are answered, and the one that gave up may ask again within the grace."""
    logins = [await sign_in(client, transport="json") for _ in range(5)]
    tasks = [asyncio.create_task(refreshed(client, one)) for one in logins]
    async with asyncio.timeout(5):
        while not parts.rotations._together._waiting:
            await asyncio.sleep(0)
    tasks[0].cancel()
    answers = await asyncio.gather(*tasks[1:])
    assert answers == [(200, "")] * 4
    assert await refreshed(client, logins[0]) == (200, "")
