"""Threads for what keeps a processor busy: few, with a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from api.errors import Unavailable

T = TypeVar("T")

WAIT_SECONDS = 10.0
CROWDED = "Too many passwords are waiting to be looked at."
# Of -20 to 19; the loop has 0.
NICE = 10


class Pool:
    """Runs functions in up to ``threads`` threads; ``waiting`` may stand in line for each.

    ``behind``: of a lower priority than the loop. Only for what lets go of the interpreter's lock:
    a thread that is put off while it holds that puts off everybody.
    """

    def __init__(self, name: str, *, threads: int, waiting: int, behind: bool) -> None:
        begin = _stand_back if behind else None
        self._threads = ThreadPoolExecutor(threads, f"rolecall-{name}", initializer=begin)
        self.room = threads * (1 + waiting)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns. Raises ``Unavailable`` when too many are waiting."""
        if self.room <= 0:
            raise Unavailable(CROWDED, retry_after=2)
        self.room -= 1
        loop = asyncio.get_running_loop()
        job = self._threads.submit(work)
        # not when the caller gives up: a thread that works still takes its place
        job.add_done_callback(lambda _: self._leave(loop))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), WAIT_SECONDS)
        except TimeoutError as error:
            raise Unavailable(CROWDED, retry_after=2) from error

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the count with it
            loop.call_soon_threadsafe(self._return_place)

    def _return_place(self) -> None:
        self.room += 1


def _stand_back() -> None:
    """Let the loop's thread go first where both want a processor: others wait for it, not for us.

    Linux gives each thread a priority of its own; elsewhere it would be the process's.
    """
    if sys.platform == "linux":
        os.nice(NICE)
