"""In the background, in batches: what has expired is deleted, what was left is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import structlog

from api.background import Background
from api.errors import Unavailable
from api.services.audit_rate import RepeatedEvents

log = structlog.get_logger("rolecall.housekeeping")

EVERY_SECONDS = 60.0
FREQUENT_SECONDS = 2.0
COUNT_SECONDS = 5.0
# Between two batches others get their turn to write.
PAUSE_SECONDS = 0.1
BATCH = 1_000

Batch = Callable[[int], Awaitable[int]]


async def in_batches(work: Batch) -> int:
    """Do batch after batch until nothing is left to do; return how much it was."""
    total = 0
    while count := await work(BATCH):
        total += count
        if count < BATCH:
            break
        await asyncio.sleep(PAUSE_SECONDS)
    return total


@asynccontextmanager
async def repeatedly(work: Batch, seconds: float = FREQUENT_SECONDS) -> AsyncIterator[None]:
    """Do what there is to do every ``seconds``, in batches, for as long as the block lasts."""

    async def round_() -> None:
        with suppress(Unavailable):
            await in_batches(work)

    background = Background(round_, seconds)
    background.start()
    try:
        yield
    finally:
        await background.stop()


@asynccontextmanager
async def counting(events: RepeatedEvents) -> AsyncIterator[None]:
    """Write the counts of repeated audit events for as long as the block lasts, and at its end."""

    async def round_() -> None:
        with suppress(Unavailable):
            await events.write_due()

    background = Background(round_, COUNT_SECONDS)
    background.start()
    try:
        yield
    finally:
        await background.stop()
        try:
            await events.write_all()
        except Unavailable:
            log.warning("audit_counts_lost")


@asynccontextmanager
async def keeping_house(**kinds: Batch) -> AsyncIterator[None]:
    """Prune each of ``kinds`` once a minute, in every worker, for as long as the block lasts."""

    async def round_() -> None:
        for kind, forget in kinds.items():
            with suppress(Unavailable):
                if forgotten := await in_batches(forget):
                    log.info("pruned", kind=kind, rows=forgotten)

    background = Background(round_, EVERY_SECONDS)
    background.start()
    try:
        yield
    finally:
        await background.stop()
