"""Passwords: hashed off the loop, in a bounded pool; weak ones are refused there too."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from argon2 import PasswordHasher

from api.auth import pool as module
from api.auth.passwords import Passwords
from api.errors import Unavailable, WeakPassword


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    """A cheap profile."""
    found = Passwords(memory_kib=64, iterations=1)
    yield found
    found.close()


async def test_any_characters_at_any_length(passwords: Passwords) -> None:
    """Nothing is cut or folded: the last of 256 characters counts, case and form do (26)."""
    long = "pä😀 " * 64
    hashed = await passwords.hash(long)
    assert hashed.startswith("$argon2id$")
    assert await passwords.verify(long, hashed)
    for other in (long[:-1], long + " ", long.upper(), long.replace("ä", "a\u0308")):
        assert not await passwords.verify(other, hashed)


async def test_no_user_is_verified_all_the_same(passwords: Passwords) -> None:
    """Without a hash it is False, after as much work; so it is for what is no hash."""
    assert not await passwords.verify("x", None)
    assert not await passwords.verify("x", "no hash")


async def test_other_parameters_are_outdated(passwords: Passwords) -> None:
    """A hash of today's profile is not, one of another is (30)."""
    assert not passwords.outdated(await passwords.hash("x"))
    assert passwords.outdated(PasswordHasher(time_cost=2, memory_cost=64, parallelism=1).hash("x"))


async def test_too_many_at_once_are_503_and_the_loop_goes_on(
    passwords: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond its room the pool says so at once; the loop never waits for a hash (29)."""
    held = threading.Event()
    room = passwords._hashing.room
    waiting = [asyncio.create_task(passwords._hashing.run(held.wait)) for _ in range(room)]
    began = time.monotonic()
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        await passwords.verify("x", None)
    assert refused.value.headers["Retry-After"] == "2"
    assert time.monotonic() - began < 1
    held.set()
    await asyncio.gather(*waiting)
    await asyncio.sleep(0.01)
    assert passwords._hashing.room == room
    assert not await passwords.verify("x", None)


async def test_who_gives_up_leaves_its_place_to_nobody(
    passwords: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that hashes for a client that has gone still takes its place."""
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    held = threading.Event()
    room = passwords._hashing.room
    with pytest.raises(Unavailable):
        await passwords._hashing.run(lambda: held.wait(5))
    assert passwords._hashing.room == room - 1
    held.set()
    async with asyncio.timeout(5):
        while passwords._hashing.room != room:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("weak", ["password1", "testuser1!Xy", "TESTUSER-Harbour", "aaaaaaaaaaaa"])
async def test_weak_passwords_are_refused_off_the_loop(passwords: Passwords, weak: str) -> None:
    """Easy to guess, or with the username in it in whatever case; with reasons."""
    with pytest.raises(WeakPassword) as refused:
        await passwords.refuse_weak(weak, "TestUser", "new_password")
    assert refused.value.extra["reasons"]
    assert refused.value.extra["errors"][0]["field"] == "new_password"


async def test_strong_and_long_passwords_pass_without_stopping_the_loop(
    passwords: Passwords,
) -> None:
    """The slowest input for zxcvbn is scored in a thread, cut short; the loop ticks on."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    task = asyncio.create_task(tick())
    await passwords.refuse_weak("4@8({[<69!|1$5+7%20" * 13, "testuser")
    task.cancel()
    assert ticks > 3
    await passwords.refuse_weak("correct horse battery staple", "testuser")


async def test_passwords_that_are_slow_to_score_keep_nobody_from_signing_in(
    passwords: Passwords,
) -> None:
    """They stand in a line of their own: it is full, and verifying goes on at once."""
    held = threading.Event()
    room = passwords._scoring.room
    waiting = [asyncio.create_task(passwords._scoring.run(held.wait)) for _ in range(room)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await passwords.refuse_weak("correct horse battery staple", "testuser")
    async with asyncio.timeout(5):
        assert not await passwords.verify("x", None)
    held.set()
    await asyncio.gather(*waiting)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
async def test_hashing_stands_behind_the_loop(passwords: Passwords) -> None:
    """Its threads have a lower priority, the loop's thread what it had."""

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    assert await passwords._hashing.run(priority) == min(19, before + module.NICE)
    assert priority() == before
    # zxcvbn holds the interpreter's lock: put off, it would put the loop off with it
    assert await passwords._scoring.run(priority) == before
