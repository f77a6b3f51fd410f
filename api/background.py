"""Work that is done again and again beside the requests, and ends without being cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from api.tracebacks import plain_traceback

log = structlog.get_logger("rolecall.background")

# Longer than any wait inside has a limit of; after it the work is cancelled.
PATIENCE_SECONDS = 8.0


class Background:
    """Await ``work()`` every ``seconds``; the first time after ``seconds`` too."""

    def __init__(self, work: Callable[[], Awaitable[object]], seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._stopping.clear()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End, once what is being done is done."""
        self._stopping.set()
        task, self._task = self._task, None
        if task is not None:
            await asyncio.wait([task], timeout=PATIENCE_SECONDS)
        while task is not None and not task.done():
            # a library below may swallow a cancellation that meets its own time limit
            task.cancel()
            await asyncio.wait([task], timeout=1)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(self._seconds):
                    await self._stopping.wait()
            except TimeoutError:
                await self._once()

    async def _once(self) -> None:
        try:
            await self._work()
        except Exception as error:  # noqa: BLE001  it must be done the next time all the same
            log.error("background_work_failed", exception=plain_traceback(error))  # noqa: TRY400
