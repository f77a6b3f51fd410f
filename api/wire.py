"""What Hypercorn lets happen on a connection that must not: closed off here.

An upgrade to HTTP/2 without TLS, or to a WebSocket that is refused, takes a connection out of reach
of every time limit, and whoever reads nothing of an answer keeps it for ever. A request is read as
RFC 9112 says: what is read in one way here and in another by whoever stands before us is none, and
is told so as every error is.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import h2.events as h2events
import h11
from h2.errors import ErrorCodes
from h2.events import DataReceived, PriorityUpdated, RequestReceived, StreamReset
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from h11._receivebuffer import ReceiveBuffer
from hypercorn import protocol
from hypercorn.asyncio.worker_context import EventWrapper
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import h2
from hypercorn.protocol import h11 as http1
from hypercorn.protocol.events import Body, EndBody, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from api import heads
from api.heads import Header
from api.idle import is_cut_off

# What a client has not taken in for so long is given up, and its connection with it.
UNREAD_SECONDS = 30
# Requests of one connection of HTTP/2 that are not yet forgotten, those given up included: the tree
# of priorities has room for a thousand.
STREAMS_AT_MOST = 500
CUT_OFF = "The service stops, and did not wait longer: it may have been done, or not."


class Turn(EventWrapper):
    """Hypercorn's event; ``awaited`` tells whether somebody waits for it."""

    awaited = False

    async def wait(self) -> None:
        """Wait until it is set."""
        self.awaited = True
        try:
            await super().wait()
        finally:
            self.awaited = False


class StrictLines(ReceiveBuffer):
    """What came in. Heads and trailers hold lines that end in CRLF, and none that is folded.

    RFC 9112 allows to refuse both (sections 2.2 and 5.2); h11 takes both.
    """

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """As h11 does. Raises ``RemoteProtocolError``, which is answered 400."""
        before = len(self)
        lines = super().maybe_extract_lines()
        if lines is not None:
            # those that end in CRLF, and the empty one behind them
            whole = sum(map(len, lines)) + 2 * (len(lines) + 1)
            if before - len(self) != whole or any(line[0] in b" \t" for line in lines):
                raise h11.RemoteProtocolError("a line ends in a bare LF, or is folded")
        return lines


# RFC 9112 section 3.2.2
ABSOLUTE_FORM = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE | re.DOTALL)


class Requests(h11.Connection):
    """h11's reader of requests, for what it takes too much or too little of."""

    def __init__(self, most: int) -> None:
        super().__init__(h11.SERVER, most)
        # h11 has no setting for it
        self._receive_buffer = StrictLines()

    def _extract_next_receive_event(self) -> Any:
        if self.their_state is h11.IDLE and self.trailing_data[0].startswith(b"\r\n"):
            # RFC 9112 section 2.2: after a body, or before all else
            self._receive_buffer.maybe_extract_at_most(2)
        elif self.their_state is h11.MUST_CLOSE:
            # RFC 9112 section 9.6: what follows the last request is not read, nor is it an error
            # in the place of an answer that is on its way
            self._receive_buffer.maybe_extract_at_most(len(self._receive_buffer))
        event = super()._extract_next_receive_event()
        return _read(event) if isinstance(event, h11.Request) else event


def _read(request: h11.Request) -> h11.Request:
    """Return a request with its target in origin form. Raises ``RemoteProtocolError`` (400)."""
    if request.method != request.method.upper():
        # Hypercorn takes get for GET (RFC 9110 section 9.1)
        raise h11.RemoteProtocolError("methods are case-sensitive")
    target = request.target
    if target == b"*" and request.method == b"OPTIONS":
        target = b"/"
    elif found := ABSOLUTE_FORM.fullmatch(target):
        authority, path = found.groups()
        if authority.lower() != dict(request.headers).get(b"host", b"").lower():
            raise h11.RemoteProtocolError("two authorities")
        target = path if path.startswith(b"/") else b"/" + path
    return request if target is request.target else _changed(request, target=target)


def _changed(request: h11.Request, **changes: Any) -> h11.Request:
    members = {
        "method": request.method,
        "target": request.target,
        "headers": request.headers.raw_items(),
        "http_version": request.http_version,
    }
    return h11.Request(**(members | changes))


def _problem(status: int, detail: str | None = None) -> tuple[int, list[Header], bytes]:
    """Return an answer that no application gives: its status, headers and body."""
    # here, not above: the supervisor imports this too, and has no need of Flask
    from api import http, problems
    from api.json import encoded

    error = problems.of_status(status)
    error.detail = detail or error.detail
    request_id = http.new_request_id()
    body = encoded(problems.document(error, request_id))
    headers = http.HEADERS | problems.headers(error) | {
        "X-Request-ID": request_id,
        "Content-Type": problems.PROBLEM,
        "Content-Length": str(len(body)),
    }  # fmt: skip
    ours = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return error.status, ours, body


class Answered(HTTPStream):
    """A request; where the application leaves it without an answer it gets a problem document."""

    async def _send_error_response(self, status_code: int) -> None:
        detail = None
        if status_code == 500 and is_cut_off() and self.context.terminated.is_set():
            status_code, detail = 503, CUT_OFF
        status, headers, body = _problem(status_code, detail)
        if self.scope["http_version"] in {"1.0", "1.1"}:
            headers.append((b"connection", b"close"))
        await self.send(Response(self.stream_id, headers, status))
        if self.scope["method"] != "HEAD":
            await self.send(Body(self.stream_id, body))
        await self.send(EndBody(self.stream_id))
        self.state = ASGIHTTPState.CLOSED
        said: Any = {"status": status, "headers": headers}
        await self.config.log.access(self.scope, said, time.time() - self.start_time)


class PlainHTTP1(H11Protocol):
    """HTTP/1.1 that stays so. HTTP/2 is agreed on in the TLS handshake, and there alone.

    A proxy that passes ``Upgrade: h2c`` on sees nothing of the requests that follow; RFC 9113 has
    no such upgrade any more. A server may ignore any (RFC 9110 section 7.8).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        most = self.config.h11_max_incomplete_size
        self.connection = Requests(most)
        self.can_read = self._turn = Turn()
        self._write, self.send = self.send, self._write_whole
        self._given_up = False
        self._is_head, self._head = False, b""

    async def handle(self, event: Event) -> None:
        """As Hypercorn does, but never wait for the turn of a request on a closed connection."""
        await super().handle(event)
        if isinstance(event, Closed):
            await self._give_up_turn()

    async def _give_up_turn(self) -> None:
        """Let go of a reader that waits for the turn of a request which never comes."""
        if self._turn.awaited:
            self._given_up = True
            self.connection = h11.Connection(h11.SERVER)  # with nothing left to read
            await self._turn.set()

    async def stream_send(self, event: StreamEvent) -> None:
        """As Hypercorn does, but a head of an answer goes along with what it announces."""
        if isinstance(event, Response) and event.status_code >= 200:
            self._is_head = any(name == b"content-length" for name, _ in event.headers)
            await self._send_h11_event(self._response(event))
            self._is_head = False
        else:
            await super().stream_send(event)

    def _response(self, event: Response) -> h11.Response:
        headers = [*event.headers, *self.config.response_headers("h11")]
        if self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        return h11.Response(headers=heads.checked(headers), status_code=event.status_code)

    async def _write_whole(self, event: Event) -> None:
        if isinstance(event, RawData):
            event = RawData(self._head + event.data)
            self._head = event.data if self._is_head else b""
            if self._is_head or not event.data:
                return
        elif isinstance(event, Closed):
            # the last answer before a stop: Hypercorn lets it wait
            await self._give_up_turn()
        await self._write(event)

    async def _send_h11_event(self, event: Any) -> None:
        if not self._given_up:
            await super()._send_h11_event(event)

    async def _send_error_response(self, status_code: int) -> None:
        """A problem document, of a request that reached no application.

        h11 has 501 for every Transfer-Encoding that it does not know.
        """
        status, headers, body = _problem(400 if status_code == 501 else status_code)
        headers += [(b"connection", b"close"), *self.config.response_headers("h11")]
        head = h11.Response(status_code=status, headers=headers)
        for event in (head, h11.Data(body), h11.EndOfMessage()):
            await self._send_h11_event(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Change to nothing; the application refuses other versions."""

    async def _create_stream(self, request: h11.Request) -> None:
        headers = request.headers.raw_items()
        kept = [(name, value) for name, value in headers if name.lower() != b"upgrade"]
        if len(kept) < len(headers):
            request = _changed(request, headers=kept)
        await super()._create_stream(request)


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
        while len(self.buffer) >= h2.BUFFER_LOW_WATER and not self._complete:
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
            self._limit.reschedule(asyncio.get_running_loop().time() + UNREAD_SECONDS)
        return data

    async def _waited_for(self, room: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(UNREAD_SECONDS) as self._limit:
                await room
        except TimeoutError:
            raise NotTaken from None
        finally:
            self._limit = None


class PatientHTTP2(H2Protocol):
    """HTTP/2, of which no stream ends, or keeps for ever, what else is asked beside it.

    Its clients may keep an answer waiting while the kernel sees them well.
    """

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
            if isinstance(event, Body | EndBody) and is_cut_off():
                await self._send_now(event)
            elif isinstance(event, Body):
                # no more at once than is kept for a client; the rest of it others may have as well
                for start in range(0, len(event.data), h2.BUFFER_HIGH_WATER):
                    piece = event.data[start : start + h2.BUFFER_HIGH_WATER]
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

    async def _handle_events(self, events: list[h2events.Event]) -> None:
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


def install() -> None:
    """Let Hypercorn serve HTTP so, in this process."""
    protocol.H11Protocol = PlainHTTP1  # type: ignore[attr-defined,assignment]
    protocol.H2Protocol = PatientHTTP2  # type: ignore[attr-defined,assignment]
    h2.StreamBuffer = Untaken  # type: ignore[assignment,misc]
    http1.HTTPStream = h2.HTTPStream = Answered  # type: ignore[attr-defined]


def limited(listener: socket.socket) -> socket.socket:
    """Let the kernel drop connections whose client takes in nothing (Linux; tcp(7))."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = int(UNREAD_SECONDS * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener
