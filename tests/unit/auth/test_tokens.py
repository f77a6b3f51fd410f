"""A token that verified once is remembered: never past exp, across keys, beyond capacity."""

from __future__ import annotations

import hashlib
import threading
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from api.asgi import AsyncFlask
from api.auth import jws
from api.auth.tokens import RolecallJWTManager, VerifiedTokens
from api.parts import Parts
from tests.conftest import bearer, sign_in


def claims(seconds: float) -> dict[str, Any]:
    """Return claims that expire in ``seconds``."""
    return {"exp": int(time.time() + seconds)}


def remember(memory: VerifiedTokens, name: str, seconds: float = 60, leeway: float = 0) -> None:
    """Let ``memory`` keep a token that was verified with the keys of now."""
    memory.remember(name, {"alg": "x"}, claims(seconds), leeway, memory._keys.changes)


def test_a_remembered_token_is_itself_alone() -> None:
    """Its header and claims come back as copies; no other token's do."""
    memory = VerifiedTokens(SimpleNamespace(changes=0))
    remember(memory, "a.b.c")
    header, said = memory.recall("a.b.c")
    header["alg"] = said["exp"] = "changed"
    assert memory.recall("a.b.c")[0] == {"alg": "x"}
    assert memory.recall("a.b.d") is None
    assert memory.recall("a.b.") is None


def test_it_is_forgotten_when_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """At exp and the leeway, to the second."""
    memory = VerifiedTokens(SimpleNamespace(changes=0))
    monkeypatch.setattr("api.auth.tokens.time.time", lambda: now)
    now = 1_000.0
    memory.remember("a", {}, {"exp": 1_010}, 5, 0)
    now = 1_014.999
    assert memory.recall("a") is not None
    now = 1_015.0
    assert memory.recall("a") is None


def test_it_is_forgotten_when_the_keys_change() -> None:
    """A retired key's tokens are not accepted from memory, nor those of a key between."""
    keys = SimpleNamespace(changes=0)
    memory = VerifiedTokens(keys)
    remember(memory, "a")
    keys.changes += 1
    assert memory.recall("a") is None
    remember(memory, "b")
    assert memory.recall("a") is None
    assert memory.recall("b") is not None


def test_what_was_verified_with_keys_that_are_gone_is_not_kept() -> None:
    """A verification that began before the keys changed, and ended after."""
    keys = SimpleNamespace(changes=1)
    memory = VerifiedTokens(keys)
    memory.remember("a", {}, claims(60), 0, changes=0)
    assert memory.recall("a") is None
    keys.changes = 0  # were it ever to come back, it would be found
    assert memory.recall("a") is None


def test_the_oldest_makes_room() -> None:
    """No more than the capacity is kept."""
    memory = VerifiedTokens(SimpleNamespace(changes=0), capacity=2)
    for name in "abc":
        remember(memory, name)
    assert [memory.recall(name) is not None for name in "abc"] == [False, True, True]


def test_its_memory_is_bounded_by_bytes_too() -> None:
    """Large tokens are fewer; one that is larger than all there is room for is not kept."""
    memory = VerifiedTokens(SimpleNamespace(changes=0), capacity_bytes=10_000)
    for n in range(20):
        memory.remember(f"t{n}", {"alg": "x"}, claims(60) | {"text": "x" * 1_000}, 0, 0)
    kept = [n for n in range(20) if memory.recall(f"t{n}")]
    assert kept == list(range(20 - len(kept), 20))
    assert 5 <= len(kept) <= 9
    for n in range(20):
        header = {"alg": "x", "own": "x" * 1_000}
        memory.remember(f"h{n}", header, claims(60), 0, 0)
    assert 3 <= len(memory._known.tokens) <= 6
    memory.remember("huge", {}, claims(60) | {"text": "x" * 20_000}, 0, 0)
    assert memory.recall("huge") is None
    assert memory._known.size == 0
    remember(memory, "a")
    remember(memory, "a")
    assert memory._known.size == memory._known.tokens.popitem()[1].size


def test_it_takes_under_two_kilobytes() -> None:
    """A token of a user with some roles, whatever the blocks that JSON is written in."""
    memory = VerifiedTokens(SimpleNamespace(changes=0))
    header = {"alg": "EdDSA", "typ": "at+jwt", "kid": "k" * 43}
    tracemalloc.start()
    try:
        for n in range(500):
            said = claims(60) | {"jti": f"{n:036}", "permissions": ["area:verb"] * 20}
            memory.remember(f"{n:01000}", dict(header), said, 0, 0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 500 < 2_000
    assert memory._known.size / taken > 0.8


def test_a_header_that_cannot_be_copied_is_not_remembered() -> None:
    """What lies within it would be shared by all who are given it."""
    memory = VerifiedTokens(SimpleNamespace(changes=0))
    memory.remember("a", {"own": ["list"]}, claims(60), 0, 0)
    assert memory.recall("a") is None


def test_many_threads_make_it_tell_no_lies() -> None:
    """Each token's claims are its own, and never those of former keys, while keys change."""
    keys = SimpleNamespace(changes=0)
    memory = VerifiedTokens(keys, capacity=50)
    lies: list[object] = []
    until = time.monotonic() + 0.5

    def work(seed: int) -> None:
        n = seed
        while time.monotonic() < until:
            n += 1
            name, before = f"t{n % 120}", keys.changes
            memory.remember(name, {"kid": before}, claims(60) | {"jti": name}, 0, before)
            found = memory.recall(name)
            if found and (found[1]["jti"] != name or found[0]["kid"] < before):
                lies.append((name, before, found))

    threads = [threading.Thread(target=work, args=(n * 31,)) for n in range(6)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        keys.changes += 1
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert not lies
    assert len(memory._known.tokens) <= 50


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_one_verification_serves_many_requests(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature is checked once a token, and the blocklist asked every time."""
    verified: list[str] = []
    is_signed_by = jws.Compact.is_signed_by

    def counting(compact: jws.Compact, *key: Any) -> bool:
        verified.append(compact.signed.decode())
        return is_signed_by(compact, *key)

    monkeypatch.setattr(jws.Compact, "is_signed_by", counting)
    token = (await sign_in(client, transport="json"))["access_token"]
    for _ in range(5):
        assert (await client.get("/protected", headers=bearer(token))).status_code == 200
    assert verified == [token.rpartition(".")[0]]
    assert (await client.post("/logout", headers=bearer(token))).status_code == 200
    answer = await client.get("/protected", headers=bearer(token))
    assert answer.json()["code"] == "token_revoked"
    assert len(verified) == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_loader_that_would_not_be_awaited_is_refused(app: AsyncFlask, parts: Parts) -> None:
    """An async loader revokes everybody or lets everybody in: it cannot be registered."""
    manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]

    async def loader(*_: Any) -> bool:
        return False

    for register in (
        manager.token_in_blocklist_loader,
        manager.token_verification_loader,
        manager.user_lookup_loader,
        manager.additional_claims_loader,
    ):
        with pytest.raises(TypeError, match="async"):
            register(loader)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_failures_and_refresh_tokens_are_not_remembered(
    client: httpx.AsyncClient, app: AsyncFlask
) -> None:
    """Only an access token that verified is kept: nothing that anybody can make up."""
    manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]
    tokens = await sign_in(client, transport="json")
    access, refresh = str(tokens["access_token"]), str(tokens["refresh_token"])
    forged = access[:-6] + ("AAAAAA" if access[-6:] != "AAAAAA" else "BBBBBB")
    for token, status in ((forged, 401), ("a.b.c", 401), (refresh, 401), (access, 200)):
        answer = await client.get("/protected", headers=bearer(token))
        assert answer.status_code == status
    assert (await client.post("/refresh", headers=bearer(refresh))).status_code == 200
    assert list(manager._memory._known.tokens) == [hashlib.sha256(access.encode()).digest()]
