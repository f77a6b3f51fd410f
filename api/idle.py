"""How long Hypercorn keeps a connection on which nothing is asked.

Hypercorn makes a timer for it, two tasks, and cancels both, with every request; and it keeps a
connection whose client has gone until the timer ends. When it stops it waits for some only.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from contextlib import suppress
from typing import Any

from hypercorn.asyncio import run
from hypercorn.asyncio.tcp_server import MAX_RECV, TCPServer
from hypercorn.events import Closed, Event, RawData, Updated

# What a client has not taken in for so long is given up, and its connection with it.
UNREAD_SECONDS = 30
# A connection that was accepted is begun two or three turns later.
TURNS = 10
TURN_SECONDS = 0.005
# For a client to take in what is sent at the end, and over TLS to say that it has heard of it, for
# which asyncio waits half a minute.
CLOSE_SECONDS = 3.0


class Latecomers:
    """Connections that were accepted, but not yet begun, when the listener was closed.

    Hypercorn waits for those alone that it has begun by then, and cuts off what is asked on these
    once the application has ended: halfway, with an answer of 500.
    """

    def __init__(self) -> None:
        self._connections: set[asyncio.Future[Any]] = set()
        self._over = False

    def admit(self) -> bool:
        """Whether the current task, a connection's, will be waited for."""
        task = asyncio.current_task()
        if self._over or task is None:
            return False
        self._connections.add(task)
        return True

    async def ended(self, seconds: float) -> None:
        """Wait for them, for ``seconds`` at most: before the application is told to end."""
        for _ in range(TURNS):
            await asyncio.sleep(TURN_SECONDS)
        self._over = True
        if self._connections:
            await asyncio.wait(self._connections, timeout=seconds)


class Watched(TCPServer):
    """A connection that one task watches for as long as it lasts.

    It ends ``keep_alive_timeout`` after it began, or was last answered, unless a whole head of a
    request came in; when the server stops, once nothing is being answered on it.
    """

    def __init__(self, latecomers: Latecomers, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._latecomers = latecomers
        # None while something is being answered
        self._idle_since: float | None = self.loop.time()
        self._ended = False

    async def run(self) -> None:
        """As Hypercorn does, unless it comes so late that nobody would wait for its end."""
        if self.context.terminated.is_set() and not self._latecomers.admit():
            self.writer.close()
            return
        try:
            await super().run()
        except Exception as error:  # noqa: BLE001  whatever it is: a stop must wait for the others
            said = {"message": "A connection failed", "exception": error}
            self.loop.call_exception_handler(said)

    async def protocol_send(self, event: Event) -> None:
        """As Hypercorn does; whether it is idle is only noted."""
        if not isinstance(event, Updated):
            try:
                if is_cut_off():
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await super().protocol_send(event)
                else:
                    await super().protocol_send(event)
            except TimeoutError:
                # given up, here or by the kernel: Hypercorn knows of ConnectionError alone
                self.writer.transport.abort()
                await self.protocol.handle(Closed())
            return
        self._idle_since = self.loop.time() if event.idle else None
        if event.idle and self.context.terminated.is_set():
            # whoever watched ended then; what was written is sent yet
            self.writer.close()
            self._limit_farewell()

    async def _read_data(self) -> None:
        """As Hypercorn does, but what came in behind our end of it asks for nothing any more."""
        while not self.reader.at_eof():
            try:
                data = await asyncio.wait_for(self.reader.read(MAX_RECV), self.config.read_timeout)
            except OSError:
                break
            if self._ended:
                break
            await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())
        # nothing more can come: whoever is answered last ends the connection
        await self.idle_task.stop()

    async def _close(self) -> None:
        """As Hypercorn does, but at a stop nobody is waited for without end."""
        self._limit_farewell()
        if not is_cut_off():
            await super()._close()
            return
        async with asyncio.timeout(CLOSE_SECONDS) as limit:
            await super()._close()  # which keeps the cancellation to itself
        if limit.expired():
            self.writer.transport.abort()

    async def _idle_timeout(self) -> None:
        terminated = self.context.terminated
        while not terminated.is_set() and (left := self._seconds_left()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(terminated.wait(), left)
        if terminated.is_set():
            # what has come in already is read first
            await asyncio.sleep(TURN_SECONDS)
        if self._idle_since is not None:
            self._ended = True
            self._limit_farewell()
            await asyncio.shield(self._initiate_server_close())

    def _limit_farewell(self) -> None:
        """At a stop, leave a client that does not say that it has heard of the end of TLS.

        At other times it has as long as asyncio gives it, for it may be slow.
        """
        over_tls = self.writer.get_extra_info("ssl_object") is not None
        if over_tls and self.context.terminated.is_set():
            self.loop.call_later(CLOSE_SECONDS, self.writer.transport.abort)

    def _seconds_left(self) -> float:
        """Return for how long the connection cannot be too old."""
        since = self._idle_since
        age = 0 if since is None else self.loop.time() - since
        return self.config.keep_alive_timeout - age


def is_cut_off() -> bool:
    """Whether this is said at the end of a task that was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def install() -> Latecomers:
    """Let Hypercorn keep connections so, in this process; return those it does not wait for."""
    latecomers = Latecomers()
    run.TCPServer = functools.partial(Watched, latecomers)  # type: ignore[attr-defined,assignment]
    return latecomers


def limited(listener: socket.socket) -> socket.socket:
    """Let the kernel drop connections whose client takes in nothing (Linux; tcp(7))."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = int(UNREAD_SECONDS * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener
