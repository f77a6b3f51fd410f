"""How long Hypercorn keeps a connection on which nothing is asked.

Hypercorn makes a timer for it, two tasks, and cancels both, with every request; and it keeps a
connection whose client has gone until the timer ends.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from hypercorn.asyncio import run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, Updated


class Watched(TCPServer):
    """A connection that one task watches for as long as it lasts.

    It ends ``keep_alive_timeout`` after it began, or was last answered, unless a whole head of a
    request came in; when the server stops, once nothing is being answered on it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # None while something is being answered
        self._idle_since: float | None = self.loop.time()

    async def protocol_send(self, event: Event) -> None:
        """As Hypercorn does; whether it is idle is only noted."""
        if not isinstance(event, Updated):
            try:
                await super().protocol_send(event)
            except TimeoutError:
                # the kernel gave the client up: Hypercorn knows of ConnectionError alone
                await self.protocol.handle(Closed())
            return
        self._idle_since = self.loop.time() if event.idle else None
        if event.idle and self.context.terminated.is_set():
            # whoever watched ended then; what was written is sent yet
            self.writer.close()

    async def _read_data(self) -> None:
        await super()._read_data()
        # nothing more can come: whoever is answered last ends the connection
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        terminated = self.context.terminated
        while not terminated.is_set() and (left := self._seconds_left()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(terminated.wait(), left)
        if self._idle_since is not None:
            await asyncio.shield(self._initiate_server_close())

    def _seconds_left(self) -> float:
        """Return for how long the connection cannot be too old."""
        since = self._idle_since
        age = 0 if since is None else self.loop.time() - since
        return self.config.keep_alive_timeout - age


def install() -> None:
    """Let Hypercorn keep connections so, in this process."""
    run.TCPServer = Watched  # type: ignore[attr-defined,assignment]
