"""HTTP/2, which Hypercorn speaks over its own TLS: no stream ends, or holds, another beside it.

Whoever reads nothing of an answer keeps it for ever, and much of what a client may send raises in
the reader, which cuts off all requests of the connection, done or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from h2.errors import ErrorCodes
from h2.events import DataReceived, PriorityUpdated, RequestReceived, StreamReset
from h2.events import Event as Received
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hypercorn.asyncio.worker_context import EventWrapper
from hypercorn.events import Closed, Event, Updated
from hypercorn.protocol.events import Body, EndBody, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, H2Protocol, StreamBuffer

from api import idle

# Requests of one connection that are not yet forgotten, those given up included: the tree of
# priorities has room for a thousand.
STREAMS_AT_MOST = 500


class NotTaken(Exception):
    """Nothing of an answer is taken in."""


class Untaken(StreamBuffer):
    """What a client of HTTP/2 has given us no window for yet.

    It is waited for as long as some of it is taken, else ``NotTaken`` is raised.
    """

    _limit: asyncio.Timeout | None = None

    def __init__(self, event_class: type[EventWrapper]) -> None:
        super().__init__(event_class)
        self._ended = event_class()

    async def push(self, data: bytes) -> None:
        """As Hypercorn means it, in bounds: it goes on when nothing can be sent, too."""
        await self._waited_for(self._room_behind(data))

    async def _room_behind(self, data: bytes) -> None:
        await super().push(data)
        while len(self.buffer) >= BUFFER_LOW_WATER and not self._complete:
            await self._paused.wait()
            await self._paused.clear()

    async def drain(self) -> None:
        """Wait, in bounds, until all is sent, and its end where there is one.

        Hypercorn waits for the data alone. Where a stream was the last before a stop, it then
        closed the connection before the end of the stream was sent.
        """
        await self._waited_for(self._ended.wait() if self._complete else super().drain())

    async def close(self) -> None:
        """As Hypercorn has it, also once the end was sent."""
        await super().close()
        await self._ended.set()

    async def pop(self, max_length: int) -> bytes:
        """As Hypercorn has it; whoever waits may wait anew."""
        data = await super().pop(max_length)
        if data and self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time() + idle.UNREAD_SECONDS)
        return data

    async def _waited_for(self, room: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(idle.UNREAD_SECONDS) as self._limit:
                await room
        except TimeoutError:
            raise NotTaken from None
        finally:
            self._limit = None


class PatientHTTP2(H2Protocol):
    """A connection, whose client may keep an answer waiting while the kernel sees it well."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # no WebSockets (RFC 8441)
        self.connection.local_settings[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 0
        self.connection.local_settings.acknowledge()

    async def handle(self, event: Event) -> None:
        """As Hypercorn does, but nobody waits for a client that has gone."""
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in tuple(self.stream_buffers.values()):
                await buffer.close()

    async def stream_send(self, event: StreamEvent) -> None:
        """As Hypercorn does, but an answer that nobody takes in is given up, and no other."""
        try:
            if isinstance(event, Body | EndBody) and idle.is_cut_off():
                await self._send_now(event)
            elif isinstance(event, Body):
                # no more at once than is kept for a client; the rest of it others may have as well
                for start in range(0, len(event.data), BUFFER_HIGH_WATER):
                    piece = event.data[start : start + BUFFER_HIGH_WATER]
                    await super().stream_send(Body(event.stream_id, piece))
            else:
                await super().stream_send(event)
        except NotTaken:
            self._reset(event.stream_id, ErrorCodes.CANCEL)
            await self._forget(event.stream_id)
            await self._flush()
        if isinstance(event, StreamClosed):
            await self._end_if_worn_out()

    async def _send_now(self, event: Body | EndBody) -> None:
        """Without the task that sends: at the end of all it is cut off as well."""
        try:
            if isinstance(event, Body):
                self.connection.send_data(event.stream_id, event.data)
            else:
                self.connection.end_stream(event.stream_id)
        except ProtocolError:  # among others: there is no window for it
            self._reset(event.stream_id, ErrorCodes.INTERNAL_ERROR)
        await self._flush()

    async def _forget(self, stream_id: int) -> None:
        """Let the task that sends find that a stream is over, and whoever waits for it go on."""
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None:
            await buffer.close()
            self.priority.unblock(stream_id)
            await self.has_data.set()

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        """Reset a stream, unless it or the connection is closed already."""
        with suppress(ProtocolError):
            self.connection.reset_stream(stream_id, code)

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        await super()._send_data(stream_id)
        if buffer is not None and stream_id not in self.stream_buffers:
            await buffer.close()

    @property
    def _is_worn_out(self) -> bool:
        return self.keep_alive_requests >= self.config.keep_alive_max_requests

    async def _end_if_worn_out(self) -> None:
        if self._is_worn_out and self.idle:
            self.connection.close_connection()
            await self._flush()
            await self.send(Closed())

    @property
    def _refuses(self) -> bool:
        """Whether nothing new is begun here; those that are given up may not be forgotten yet."""
        crowded = len(self.stream_buffers) >= STREAMS_AT_MOST
        return crowded or self._is_worn_out or self.context.terminated.is_set()

    async def _handle_events(self, events: list[Received]) -> None:
        """As Hypercorn does, but what it would fail at ends a stream, not the connection.

        What is asked after a stop, or after ``keep_alive_max_requests``, is refused in the word
        that says: not begun, ask elsewhere (RFC 9113 section 8.7). Hypercorn closes the connection
        before what was asked is answered.
        """
        for event in events:
            if isinstance(event, PriorityUpdated):
                # RFC 9113 section 5.3.2 has done with them; each was kept for ever
                continue
            if isinstance(event, DataReceived) and event.stream_id not in self.streams:
                # a body may go on for a while after it was answered
                size = event.flow_controlled_length
                self.connection.acknowledge_received_data(size, event.stream_id)
            elif isinstance(event, RequestReceived) and not _is_readable(event):
                self._reset(event.stream_id, ErrorCodes.PROTOCOL_ERROR)
            elif isinstance(event, RequestReceived) and self._refuses:
                self._reset(event.stream_id, ErrorCodes.REFUSED_STREAM)
            else:
                await super()._handle_events([event])
            if isinstance(event, StreamReset):
                await self._forget(event.stream_id)
                # now, or soon there are too many
                await asyncio.sleep(0)
        await self._flush()
        if any(isinstance(event, StreamReset) for event in events):
            await self._say_whether_idle()

    async def _say_whether_idle(self) -> None:
        """Where a request was given up Hypercorn does not, and nobody knew of the end."""
        if self.idle and self.context.terminated.is_set():
            self.connection.close_connection()
            await self._flush()
        await self.send(Updated(idle=self.idle))
        await self._end_if_worn_out()


def _is_readable(request: RequestReceived) -> bool:
    """Whether Hypercorn reads it as what it is, and it is for us.

    It takes get for GET, fails at what is not ASCII and at a CONNECT, and lets all else on the
    connection end with that.
    """
    pseudo: dict[bytes, bytes] = dict(request.headers)
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    return (method + path).isascii() and method == method.upper() and method != b"CONNECT"
