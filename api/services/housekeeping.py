"""What has had its day is forgotten in the background, in small batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import structlog

from api.background import Background
from api.errors import Unavailable

log = structlog.get_logger("rolecall.housekeeping")

EVERY_SECONDS = 60.0
# Between two batches others get their turn to write.
PAUSE_SECONDS = 0.1
BATCH = 1_000

Prune = Callable[[int], Awaitable[int]]


async def prune(forget: Prune) -> int:
    """Forget batch after batch until nothing is left to; return how much it was."""
    total = 0
    while count := await forget(BATCH):
        total += count
        if count < BATCH:
            break
        await asyncio.sleep(PAUSE_SECONDS)
    return total


@asynccontextmanager
async def keeping_house(**kinds: Prune) -> AsyncIterator[None]:
    """Prune each of ``kinds`` once a minute, in every worker, for as long as the block lasts."""

    async def round_() -> None:
        for kind, forget in kinds.items():
            with suppress(Unavailable):
                if forgotten := await prune(forget):
                    log.info("pruned", kind=kind, rows=forgotten)

    background = Background(round_, EVERY_SECONDS)
    background.start()
    try:
        yield
    finally:
        await background.stop()
