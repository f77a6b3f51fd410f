"""One connection to Redis, on which callers take turns in the order they came.

What redis-py's client and pool do around a connection costs more than twice what the connection
itself costs, and the pool lets whoever used it last use it next: under load the reconciler of the
blocklist would never come to extend the lease.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis import asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError

# What has arrived is read first: a loop that is busy for longer than the limit is no hung Redis.
GRACE_SECONDS = 0.02


class Script:
    """A Lua script; ``sha`` is what Redis knows it by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Line:
    """Asks within ``seconds``, waiting for its turn and connecting included; retries nothing.

    Raises what redis-py raises, and ``TimeoutError``. A question that is given up takes the
    connection with it: its late answer is nobody else's.
    """

    def __init__(
        self,
        url: str,
        seconds: float,
        on_connect: Callable[[AbstractConnection], Awaitable[None]] | None = None,
    ) -> None:
        self._seconds = seconds
        pool = aioredis.ConnectionPool.from_url(
            # the limit is ours: redis-py's own make a task for every command
            url, socket_timeout=None, socket_connect_timeout=None, redis_connect_func=on_connect,
        )  # fmt: skip
        self._connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._turn = asyncio.Lock()

    async def ask(self, *command: Any, seconds: float | None = None) -> Any:
        """Return the answer to one command, within ``seconds`` where that is another limit."""
        connection = self._connection
        async with _within(seconds or self._seconds), self._turn:
            if _is_over(connection):
                await connection.disconnect(nowait=True)
            await connection.send_packed_command(connection.pack_command(*command))
            return await connection.read_response()

    async def run(
        self,
        script: Script,
        keys: Sequence[str],
        *arguments: Any,
        seconds: float | None = None,
    ) -> Any:
        """Return what a script returns; Redis learns it where it does not know it."""
        rest = (len(keys), *keys, *arguments)
        try:
            return await self.ask("EVALSHA", script.sha, *rest, seconds=seconds)
        except NoScriptError:
            return await self.ask("EVAL", script.text, *rest, seconds=seconds)

    async def hang_up(self) -> None:
        """Close the connection; the next question opens another."""
        async with self._turn:
            await self._connection.disconnect(nowait=True)


def _is_over(connection: AbstractConnection) -> bool:
    """Whether Redis has closed it since: restarted, or tired of waiting."""
    reader = connection._reader  # noqa: SLF001  what redis-py's pool asks for it costs a time limit
    return reader is not None and reader.at_eof()


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        due = loop.call_later(seconds, lambda: limit.reschedule(loop.time() + GRACE_SECONDS))
        try:
            yield
        finally:
            due.cancel()
