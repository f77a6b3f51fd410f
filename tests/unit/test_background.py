"""Background work: done again and again, and never cut short by its end."""

from __future__ import annotations

import asyncio

import pytest

from api import background
from api.background import Background
from api.services import housekeeping


async def test_work_is_done_again_and_finished_before_the_end() -> None:
    """stop waits for the work that is being done, and nothing begins after it."""
    begun, finished = 0, 0

    async def work() -> None:
        nonlocal begun, finished
        begun += 1
        await asyncio.sleep(0.02)
        finished += 1

    running = Background(work, 0.005)
    running.start()
    async with asyncio.timeout(5):
        while begun < 3:
            await asyncio.sleep(0.001)
    await running.stop()
    assert begun == finished >= 3
    await asyncio.sleep(0.03)
    assert begun == finished


async def test_work_that_fails_is_done_again() -> None:
    """One error does not end it for good."""
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("no such luck")

    running = Background(work, 0.005)
    running.start()
    async with asyncio.timeout(5):
        while calls < 3:
            await asyncio.sleep(0.001)
    await running.stop()


async def test_work_that_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a cancellation is swallowed once."""
    monkeypatch.setattr(background, "PATIENCE_SECONDS", 0.02)
    swallowed = 0

    async def work() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed += 1

    running = Background(work, 0.001)
    running.start()
    await asyncio.sleep(0.02)
    await asyncio.wait_for(running.stop(), 5)
    assert swallowed == 1


async def test_the_house_is_kept_in_batches_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full batches are followed by another; each kind has its turn."""
    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(housekeeping, "PAUSE_SECONDS", 0)
    left = {"one": 2_500, "two": 10}

    def forgetting(kind: str) -> housekeeping.Batch:
        async def forget(most: int) -> int:
            count = min(most, left[kind])
            left[kind] -= count
            return count

        return forget

    async with housekeeping.keeping_house(one=forgetting("one"), two=forgetting("two")):
        async with asyncio.timeout(5):
            while any(left.values()):
                await asyncio.sleep(0.005)
    assert left == {"one": 0, "two": 0}
