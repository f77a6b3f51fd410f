"""What Hypercorn lets happen on a connection that must not: closed off here.

An upgrade to HTTP/2 without TLS, or to a WebSocket that is refused, takes a connection out of reach
of every time limit. A request is read as RFC 9112 says: what is read in one way here and in another
by whoever stands before us is none, and is told so as every error is. HTTP/2 has a room of its own.
"""

from __future__ import annotations

import re
import time
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from hypercorn import protocol
from hypercorn.asyncio.worker_context import EventWrapper
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import h2
from hypercorn.protocol import h11 as http1
from hypercorn.protocol.events import Body, EndBody, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from api import heads
from api.heads import Header
from api.http2 import PatientHTTP2, Untaken
from api.idle import is_cut_off

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


def install() -> None:
    """Let Hypercorn serve HTTP so, in this process."""
    protocol.H11Protocol = PlainHTTP1  # type: ignore[attr-defined,assignment]
    protocol.H2Protocol = PatientHTTP2  # type: ignore[attr-defined,assignment]
    h2.StreamBuffer = Untaken  # type: ignore[assignment,misc]
    http1.HTTPStream = h2.HTTPStream = Answered  # type: ignore[attr-defined]
