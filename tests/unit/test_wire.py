"""Hypercorn's connection as we have it: it ends with its client, and changes to nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing, suppress
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import h11
import pytest
from h2.errors import ErrorCodes
from hypercorn import protocol
from hypercorn.asyncio.worker_context import EventWrapper, WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.typing import ConnectionState

from api import wire
from api.server import listen
from api.wire import Answered, NotTaken, PatientHTTP2, PlainHTTP1, Untaken

REQUEST = b"GET / HTTP/1.1\r\nHost: it\r\n"


class Tasks:
    """Stands for Hypercorn's task group; the application is ``asked`` and never answers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.begun: list[asyncio.Task[Any]] = []

    def spawn(self, work: Any) -> None:
        """Begin what goes on beside the requests."""
        self.begun.append(asyncio.create_task(work()))

    async def end(self) -> None:
        """Wait until that has ended by itself."""
        await asyncio.wait_for(asyncio.gather(*self.begun), 2)

    async def spawn_app(self, _app: Any, _config: Any, scope: Any, send: Any) -> Any:
        """Begin a request."""
        self.asked.append((scope, send))

        async def put(_message: Any) -> None: ...

        return put


def connection(tasks: Tasks, sent: list[Event]) -> PlainHTTP1:
    """Return a connection that writes into ``sent``."""

    async def send(event: Event) -> None:
        sent.append(event)

    return PlainHTTP1(
        None,
        Config(),
        WorkerContext(None),
        tasks,
        ConnectionState({}),
        False,
        ("127.0.0.1", 1),
        None,
        send,
    )


async def answer(tasks: Tasks, here: PlainHTTP1, headers: Any, *bodies: bytes) -> None:
    """Answer the newest request, in one piece or several."""
    _, send = tasks.asked[-1]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number, body in enumerate(bodies, 1):
        more = number < len(bodies)
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def test_a_head_goes_along_with_its_body() -> None:
    """One write an answer, on a connection that goes on; a stream's head waits for nothing."""
    tasks, sent = Tasks(), []  # type: ignore[var-annotated]
    here = connection(tasks, sent)
    for method, body, written in (
        (b"GET", b"hello", [b"hello"]),
        (b"HEAD", b"", [b""]),
        (b"GET", b"again", [b"again"]),
    ):
        await here.handle(RawData(REQUEST.replace(b"GET", method) + b"\r\n"))
        await answer(tasks, here, [(b"content-length", b"5")], body)
        writes = [event.data for event in sent if isinstance(event, RawData)]
        assert [data.partition(b"\r\n\r\n")[2] for data in writes] == written
        assert writes[0].startswith(b"HTTP/1.1 200")
        assert b"\r\ndate: " in writes[0]
        await tasks.asked[-1][1](None)
        sent.clear()
    await here.handle(RawData(REQUEST + b"\r\n"))
    await answer(tasks, here, [(b"x-stream", b"1")])
    assert [event.data[:12] for event in sent if isinstance(event, RawData)] == [b"HTTP/1.1 200"]


@pytest.mark.parametrize("name", [b"x-team", b"content-type"])
async def test_an_answer_of_two_readings_is_not_written(name: bytes) -> None:
    """A header with a line break, two lengths: an error of the application, and 500."""
    for wrong in ([(name, b"a\r\nset-cookie: b")], [(b"content-length", b"4")]):
        tasks, sent = Tasks(), []  # type: ignore[var-annotated]
        here = connection(tasks, sent)
        await here.handle(RawData(REQUEST + b"\r\n"))
        with pytest.raises(h11.LocalProtocolError):
            await answer(tasks, here, [(b"content-length", b"5"), *wrong], b"hello")
        assert sent == [Updated(idle=False)]
        await tasks.asked[-1][1](None)
        written = b"".join(event.data for event in sent if isinstance(event, RawData))
        assert written.startswith(b"HTTP/1.1 500 ")
        assert b"set-cookie" not in written
        assert isinstance(sent[-1], Closed)


async def test_a_connection_ends_after_so_many_requests() -> None:
    """The last answer says so: keep_alive_max_requests is Hypercorn's, and it holds here."""
    tasks, sent = Tasks(), []  # type: ignore[var-annotated]
    here = connection(tasks, sent)
    here.config.keep_alive_max_requests = 2
    for last in (False, True):
        await here.handle(RawData(REQUEST + b"\r\n"))
        await answer(tasks, here, [(b"content-length", b"5")], b"hello")
        written = b"".join(event.data for event in sent if isinstance(event, RawData))
        assert (b"connection: close" in written.lower()) is last
        assert isinstance(sent[-1], Closed) is last


@pytest.mark.parametrize("behind", [b"\r\n", b"garbage", REQUEST + b"\r\n"])
@pytest.mark.parametrize(
    "head", [REQUEST + b"Connection: close\r\n\r\n", REQUEST.replace(b"1.1", b"1.0") + b"\r\n"]
)
async def test_what_follows_the_last_request_is_not_read(head: bytes, behind: bytes) -> None:
    """Along with it, or while it is answered: it gets its answer, and nothing else is asked."""
    for pieces in ([head + behind], [head, behind], [head, behind[:1], behind[1:]]):
        tasks, sent = Tasks(), []  # type: ignore[var-annotated]
        here = connection(tasks, sent)
        for piece in pieces:
            await here.handle(RawData(piece))
        assert sent == [Updated(idle=False)]
        await answer(tasks, here, [(b"content-length", b"5")], b"hello")
        written = b"".join(event.data for event in sent if isinstance(event, RawData))
        assert written.startswith(b"HTTP/1.1 200 ")
        assert written.endswith(b"\r\n\r\nhello")
        assert isinstance(sent[-1], Closed)
        assert len(tasks.asked) == 1


async def test_upgrades_are_ignored() -> None:
    """To HTTP/2 or a WebSocket: a plain request, without the header; others keep theirs."""
    for upgrade in (b"h2c", b"H2C", b"websocket", b"TLS/1.0"):
        tasks, sent = Tasks(), []  # type: ignore[var-annotated]
        head = REQUEST + b"Connection: upgrade\r\nuPgrade: " + upgrade + b"\r\nX-Kept: 1\r\n\r\n"
        here = connection(tasks, sent)
        # h11 reads on only when it knows the answer
        reading = asyncio.create_task(here.handle(RawData(head)))
        await asyncio.sleep(0.01)
        ((scope, _),) = tasks.asked
        assert scope["type"] == "http"
        assert dict(scope["headers"]) == {
            b"host": b"it",
            b"connection": b"upgrade",
            b"x-kept": b"1",
        }
        assert not [event for event in sent if isinstance(event, RawData)]
        await here.handle(Closed())
        await asyncio.wait_for(reading, 1)


@pytest.mark.parametrize("head", [
    REQUEST.replace(b"\r\n", b"\n") + b"\n", REQUEST + b"\n", REQUEST + b"X: a\nY: b\r\n\r\n",
    REQUEST + b"X: a\r\n b\r\n\r\n", REQUEST + b"X: a\r\n\tb\r\n\r\n", b"\n" + REQUEST + b"\r\n",
])  # fmt: skip
async def test_lines_that_can_be_read_in_two_ways_are_refused(head: bytes) -> None:
    """A bare LF, a folded header, in one piece and byte by byte: 400, and nobody is asked."""
    for pieces in ([head], [head[n : n + 1] for n in range(len(head))]):
        tasks, sent = Tasks(), []  # type: ignore[var-annotated]
        here = connection(tasks, sent)
        for piece in pieces:
            await here.handle(RawData(piece))
        assert tasks.asked == []
        written = b"".join(event.data for event in sent if isinstance(event, RawData))
        assert written.startswith(b"HTTP/1.1 400 ")
        assert any(isinstance(event, Closed) for event in sent)


async def test_a_target_is_read_as_rfc_9112_says() -> None:
    """Absolute where its authority is the Host's; `*` with OPTIONS; behind an empty line."""
    for line, path, query in (
        (b"GET /a?b", b"/a", b"b"),
        (b"GET HTTP://It/a?http://b", b"/a", b"http://b"),
        (b"GET http://it", b"/", b""),
        (b"GET https://it?b", b"/", b"b"),
        (b"OPTIONS *", b"/", b""),
        (b"\r\nGET /a", b"/a", b""),
    ):
        tasks = Tasks()
        here = connection(tasks, [])
        head = line + b" HTTP/1.1\r\nHost: it\r\nX-Kept: 1\r\n\r\n"
        reading = asyncio.create_task(here.handle(RawData(head)))
        await asyncio.sleep(0.01)
        ((scope, _),) = tasks.asked
        assert (scope["raw_path"], scope["query_string"]) == (path, query), line
        assert scope["headers"] == [(b"host", b"it"), (b"x-kept", b"1")]
        await here.handle(Closed())
        await asyncio.wait_for(reading, 1)


async def test_what_is_no_request_is_a_problem() -> None:
    """400 where h11 has 501, a problem document with an id, and the connection closed."""
    for head in (
        REQUEST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        REQUEST.replace(b"GET", b"get") + b"\r\n",
        REQUEST.replace(b"/", b"http://other/", 1) + b"\r\n",
        b"GET http://it/ HTTP/1.0\r\n\r\n",
    ):
        tasks, sent = Tasks(), []  # type: ignore[var-annotated]
        await connection(tasks, sent).handle(RawData(head + REQUEST + b"\r\n"))
        assert tasks.asked == []
        assert isinstance(sent[-1], Closed)
        got = b"".join(event.data for event in sent if isinstance(event, RawData))
        answer, _, body = got.partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"content-type: application/problem+json" in answer.lower()
        problem = json.loads(body)
        assert (problem["status"], problem["code"]) == (400, "bad_request")
        assert problem["request_id"].encode() in answer


async def test_who_waits_for_a_turn_is_released() -> None:
    """Requests sent ahead, and the client gone before the first answer: the reader ends."""
    tasks = Tasks()
    here = connection(tasks, [])
    reading = asyncio.create_task(here.handle(RawData((REQUEST + b"\r\n") * 3)))
    await asyncio.sleep(0.01)
    assert not reading.done()
    await here.handle(Closed())
    await asyncio.wait_for(reading, 1)
    assert len(tasks.asked) == 1
    # an answer that is still made goes nowhere, and is no error
    await here._send_error_response(500)


class HTTP2:
    """A connection with a client in this process, which grants a stream ``window`` bytes."""

    def __init__(self, window: int) -> None:
        self.tasks, self.sent = Tasks(), []  # type: ignore[var-annotated]
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self.client.initiate_connection()
        self.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.here = PatientHTTP2(
            None, Config(), WorkerContext(None), self.tasks, ConnectionState({}), True,
            ("127.0.0.1", 1), None, self.send,
        )  # fmt: skip
        self.got = 0
        self.is_slow = True
        self.found: list[h2.events.Event] = []
        self.reset: dict[int, int] = {}

    async def send(self, event: Event) -> None:
        """Take in what the server writes, in a turn of its own as from a socket that is full."""
        if self.is_slow:
            await asyncio.sleep(0)
        self.sent.append(event)
        if isinstance(event, RawData):
            for found in self.client.receive_data(event.data):
                self.found.append(found)
                if isinstance(found, h2.events.DataReceived):
                    self.got += len(found.data)
                elif isinstance(found, h2.events.StreamReset):
                    self.reset[found.stream_id] = found.error_code

    async def ask(self, stream: int = 1, *, method: str = "GET", ended: bool = True) -> None:
        """Make a request."""
        if stream == 1:
            await self.here.initiate()
        self.send_request(stream, method=method, ended=ended)
        await self.tell()

    def send_request(
        self, stream: int, *, method: str = "GET", path: bytes | None = b"/", ended: bool = True
    ) -> None:
        """Write a request, to be sent with what else there is to tell."""
        names: list[Any] = [(":method", method), (":authority", "it")]
        if method == "websocket":
            # RFC 8441
            names[:1] = [(":method", "CONNECT"), (":protocol", "websocket")]
        if path is not None:
            names += [(b":path", path), (":scheme", "https")]
        self.client.send_headers(stream, names, end_stream=ended)

    async def tell(self) -> None:
        """Give the server what the client has to say."""
        await self.here.handle(RawData(self.client.data_to_send()))

    async def grant(self, size: int, every: float) -> None:
        """Let the answer go on by ``size`` bytes again and again."""
        while True:
            await asyncio.sleep(every)
            self.client.increment_flow_control_window(size)
            self.client.increment_flow_control_window(size, 1)
            await self.tell()


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an answer that nobody reads, and the buffers that ``install`` would bring."""
    monkeypatch.setattr(wire, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(protocol.h2, "StreamBuffer", Untaken)


@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize("size", [5, 100_000])
async def test_an_answer_by_http2_that_nobody_takes_is_given_up(size: int) -> None:
    """Whether it is waiting for its end or in its midst; what else is asked there is answered."""
    one = HTTP2(window=0)
    await one.ask()
    answering = answer(one.tasks, one.here, [(b"content-length", b"%d" % size)], b"x" * size)
    await asyncio.wait_for(answering, 5)
    assert one.reset == {1: ErrorCodes.CANCEL}
    assert one.sent[-1] == Updated(idle=True)
    assert not one.here.streams
    await asyncio.sleep(0.01)
    assert not one.here.stream_buffers
    assert one.got == 0
    await one.ask(3)
    one.client.increment_flow_control_window(5, 3)
    await one.tell()
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    assert one.got == 5
    assert not any(isinstance(event, Closed) for event in one.sent)
    await one.here.handle(Closed())
    await one.tasks.end()


async def leave(send: Any, *, cancelled: bool) -> None:
    """End an application's task that answered nothing, as Hypercorn does."""

    async def ends() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await send(None)

    if not cancelled:
        await send(None)
        return
    task = asyncio.create_task(ends())
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("cancelled", "stops", "status", "code"),
    [
        (False, True, 500, "internal_error"),
        (True, True, 503, "unavailable"),
        (True, False, 500, "internal_error"),
    ],
)
async def test_what_an_application_leaves_unanswered_gets_a_problem_document(
    cancelled: bool, stops: bool, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raised, or the server's patience ended, or its connection failed: over either protocol."""
    monkeypatch.setattr(protocol.h11, "HTTPStream", Answered)
    monkeypatch.setattr(protocol.h2, "HTTPStream", Answered)
    monkeypatch.setattr(protocol.h2, "StreamBuffer", Untaken)
    for method in (b"GET", b"HEAD"):
        tasks, sent = Tasks(), []  # type: ignore[var-annotated]
        here = connection(tasks, sent)
        await here.handle(RawData(REQUEST.replace(b"GET", method) + b"\r\n"))
        if stops:
            await here.context.terminated.set()
        await leave(tasks.asked[-1][1], cancelled=cancelled)
        written = b"".join(event.data for event in sent if isinstance(event, RawData))
        head, _, body = written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        for header in (b"connection: close", b"retry-after: 1", b"cache-control: no-store"):
            assert header in head.lower()
        assert b"content-type: application/problem+json" in head
        assert isinstance(sent[-1], Closed)
        if method == b"HEAD":
            assert body == b""
            continue
        problem = json.loads(body)
        assert (problem["status"], problem["code"]) == (status, code)
        assert ("it may have been done" in problem["detail"]) is (status == 503)
        assert problem["request_id"] in head.decode()
    one = HTTP2(window=10_000)
    await one.ask()
    if stops:
        await one.here.context.terminated.set()
    async with asyncio.timeout(5):
        await leave(one.tasks.asked[-1][1], cancelled=cancelled)
    (answered,) = (found for found in one.found if isinstance(found, h2.events.ResponseReceived))
    names = dict(answered.headers)
    assert names[b":status"] == b"%d" % status
    assert b"connection" not in names
    assert int(names[b"content-length"]) == one.got > 0
    assert any(isinstance(found, h2.events.StreamEnded) for found in one.found)
    assert not one.reset
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_the_last_answer_by_http2_has_its_end_before_the_connection_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a stop, which refuses new ones: the other way round it is an answer cut off."""
    monkeypatch.setattr(protocol.h2, "StreamBuffer", Untaken)
    one = HTTP2(window=10_000)
    await one.ask()
    await one.here.context.terminated.set()
    await one.ask(3)
    # asked and given up again in one go: h2 has forgotten it before we refuse it
    one.send_request(5)
    one.client.reset_stream(5)
    one.send_request(7)
    await one.tell()
    assert one.reset == {3: ErrorCodes.REFUSED_STREAM, 7: ErrorCodes.REFUSED_STREAM}
    assert len(one.tasks.asked) == 1
    async with asyncio.timeout(5):
        await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    kinds = [type(found) for found in one.found]
    end, over = h2.events.StreamEnded, h2.events.ConnectionTerminated
    assert kinds.index(end) < kinds.index(over)
    assert one.got == 5
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_a_body_by_http2_may_go_on_after_it_was_answered() -> None:
    """It goes nowhere, and neither it nor the window that it takes ends what else is asked."""
    one = HTTP2(window=10_000)
    await one.ask(method="POST", ended=False)
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    # more than there is room for at once
    for _ in range(10):
        one.client.send_data(1, b"x" * 10_000)
        await one.tell()
    one.client.end_stream(1)
    await one.tell()
    await one.ask(3)
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"again")
    assert one.got == 10
    await one.here.handle(Closed())
    await one.tasks.end()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("CONNECT", None),
        ("websocket", b"/"),
        ("GET", b"/\xc3\xa9"),
        ("G\xc9T", b"/"),
        ("get", b"/"),
    ],
)
async def test_a_request_by_http2_that_is_none_ends_no_other(
    method: str, path: bytes | None
) -> None:
    """A CONNECT, a path or a method that is not ASCII, or a method in small letters."""
    one = HTTP2(window=10_000)
    await one.ask()
    one.send_request(3, method=method, path=path)
    one.send_request(5)
    await one.tell()
    assert one.reset == {3: ErrorCodes.PROTOCOL_ERROR}
    assert len(one.tasks.asked) == 2
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    assert one.got == 5
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_a_connection_by_http2_ends_after_so_many_requests() -> None:
    """What was asked is answered, what is one too many refused, and then it is closed."""
    one = HTTP2(window=10_000)
    one.here.config.keep_alive_max_requests = 2
    await one.ask()
    first = one.tasks.asked[-1][1]
    await one.ask(3)
    await one.ask(5)
    assert one.reset == {5: ErrorCodes.REFUSED_STREAM}
    assert len(one.tasks.asked) == 2
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    assert not any(isinstance(event, Closed) for event in one.sent)
    one.tasks.asked.append((None, first))
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    assert one.got == 10
    assert isinstance(one.sent[-1], Closed)
    assert isinstance(one.found[-1], h2.events.ConnectionTerminated)
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_a_connection_by_http2_whose_only_request_is_reset_is_idle() -> None:
    """Or it would be kept for ever; one on which another is asked is not."""
    one = HTTP2(window=10_000)
    await one.ask(method="POST", ended=False)
    await one.ask(3)
    for stream, idle in ((1, False), (3, True)):
        one.client.reset_stream(stream)
        await one.tell()
        assert one.sent[-1] == Updated(idle=idle)
    await one.here.handle(Closed())
    await one.tasks.end()


@pytest.mark.parametrize("why", ["the server stops", "it is worn out"])
async def test_a_connection_by_http2_whose_last_request_is_reset_ends(why: str) -> None:
    """And what came along with that is refused in words, not by silence."""
    one = HTTP2(window=10_000)
    await one.ask(method="POST", ended=False)
    if why == "the server stops":
        await one.here.context.terminated.set()
    else:
        one.here.config.keep_alive_max_requests = 1
    one.client.reset_stream(1)
    one.send_request(3)
    await one.tell()
    assert one.reset == {3: ErrorCodes.REFUSED_STREAM}
    assert isinstance(one.found[-1], h2.events.ConnectionTerminated)
    assert Updated(idle=True) in one.sent
    assert isinstance(one.sent[-1], Closed) is (why == "it is worn out")
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_floods_by_http2_are_forgotten() -> None:
    """Requests given up at once, priorities of what was never asked: however many there are."""
    one = HTTP2(window=10_000)
    one.here.config.keep_alive_max_requests = 10_000
    await one.ask()
    one.is_slow = False
    for stream in range(3, 5_003, 2):
        one.send_request(stream)
        one.client.reset_stream(stream)
        one.client.prioritize(stream + 10_000, weight=16)
    await one.tell()
    one.is_slow = True
    await one.ask(5_003)
    await answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    assert one.got == 5
    assert len(one.here.stream_buffers) < 10
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_what_cannot_even_be_told_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that granted no room for the farewell does not take a part for the whole."""
    monkeypatch.setattr(protocol.h2, "HTTPStream", Answered)
    one = HTTP2(window=100)
    await one.ask()
    await leave(one.tasks.asked[-1][1], cancelled=True)
    assert one.reset == {1: ErrorCodes.INTERNAL_ERROR}
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_who_waits_for_a_turn_at_a_stop_is_released() -> None:
    """The request before it was the last that is answered; nobody waits for graceful_timeout."""
    tasks, sent = Tasks(), []  # type: ignore[var-annotated]
    here = connection(tasks, sent)
    reading = asyncio.create_task(here.handle(RawData((REQUEST + b"\r\n") * 3)))
    await asyncio.sleep(0.01)
    await here.context.terminated.set()
    await answer(tasks, here, [(b"content-length", b"5")], b"hello")
    await asyncio.wait_for(reading, 1)
    assert isinstance(sent[-1], Closed)
    assert len(tasks.asked) == 1


async def test_websockets_are_not_offered() -> None:
    """RFC 8441 section 3: by the setting that says so."""
    one = HTTP2(window=10_000)
    await one.ask()
    assert one.client.remote_settings.enable_connect_protocol == 0
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_a_client_of_http2_that_has_gone_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer that it took none of ends at once."""
    monkeypatch.setattr(protocol.h2, "StreamBuffer", Untaken)
    one = HTTP2(window=0)
    await one.ask()
    sending = answer(one.tasks, one.here, [(b"content-length", b"5")], b"hello")
    answering = asyncio.create_task(sending)
    await asyncio.sleep(0.05)
    assert not answering.done()
    await one.here.handle(Closed())
    await asyncio.wait_for(answering, 5)
    await one.tasks.end()


@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize("size", [65_535, 65_536, 1_000_000])
async def test_a_long_answer_by_http2_is_given_in_one_go(size: int) -> None:
    """To a client that has room for all of it, and so has nothing to tell us meanwhile."""
    one = HTTP2(window=2_000_000)
    one.client.increment_flow_control_window(2_000_000)
    await one.ask()
    began = asyncio.get_running_loop().time()
    await answer(one.tasks, one.here, [(b"content-length", b"%d" % size)], b"x" * size)
    assert asyncio.get_running_loop().time() - began < wire.UNREAD_SECONDS
    assert one.got == size
    assert any(isinstance(found, h2.events.StreamEnded) for found in one.found)
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_of_an_answer_by_http2_that_is_not_taken_little_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that grants no window has many at once; the rest stays where all have it from."""
    monkeypatch.setattr(protocol.h2, "StreamBuffer", Untaken)
    one = HTTP2(window=0)
    await one.ask()
    sending = answer(one.tasks, one.here, [(b"content-length", b"1000000")], b"x" * 1_000_000)
    answering = asyncio.create_task(sending)
    await asyncio.sleep(0.05)
    assert 0 < len(one.here.stream_buffers[1].buffer) <= 2**15
    await one.here.handle(Closed())
    await asyncio.wait_for(answering, 5)
    await one.tasks.end()


@pytest.mark.parametrize("window", [0, 10_000])
async def test_requests_that_are_given_up_leave_nothing(window: int) -> None:
    """More than there is room for, one after the other, of which the application answers none."""
    one = HTTP2(window=window)
    one.here.config.keep_alive_max_requests = 10_000
    await one.here.initiate()
    for stream in range(1, 1_201, 2):
        one.send_request(stream, method="POST", ended=False)
        await one.tell()
        one.client.reset_stream(stream)
        await one.tell()
        await one.tasks.asked[-1][1](None)
    assert len(one.tasks.asked) == 600
    assert not one.here.streams
    await asyncio.sleep(0.01)
    assert not one.here.stream_buffers
    await one.here.handle(Closed())
    await one.tasks.end()


@pytest.mark.parametrize("size", [5, 100_000])
async def test_who_answers_what_was_given_up_is_released(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, though the client had granted no room for it."""
    monkeypatch.setattr(protocol.h2, "StreamBuffer", Untaken)
    one = HTTP2(window=0)
    await one.ask()
    sending = answer(one.tasks, one.here, [(b"content-length", b"%d" % size)], b"x" * size)
    answering = asyncio.create_task(sending)
    await asyncio.sleep(0.05)
    assert not answering.done()
    one.client.reset_stream(1)
    await one.tell()
    await asyncio.wait_for(answering, 2)
    await asyncio.sleep(0.01)
    assert not one.here.stream_buffers
    await one.here.handle(Closed())
    await one.tasks.end()


async def test_nothing_is_begun_where_too_much_is_not_forgotten() -> None:
    """As long as the task that sends is held up by a client that reads nothing."""
    one = HTTP2(window=10_000)
    one.here.config.keep_alive_max_requests = 10_000
    await one.ask()
    one.is_slow = False
    held_up = asyncio.Event()

    async def send_data(_stream: int) -> None:
        await held_up.wait()

    one.here._send_data = send_data  # type: ignore[method-assign]
    for stream in range(3, 3_003, 2):
        one.send_request(stream)
        one.client.reset_stream(stream)
    await one.tell()
    assert len(one.here.stream_buffers) == wire.STREAMS_AT_MOST
    held_up.set()
    await one.here.handle(Closed())
    await one.tasks.end()


@pytest.mark.usefixtures("little_patience")
async def test_there_is_an_end_to_waiting_for_room() -> None:
    """Where more of an answer comes than is kept for a client."""
    pushing = asyncio.create_task(Untaken(EventWrapper).push(b"x" * 100_000))
    await asyncio.wait([pushing], timeout=5)
    assert pushing.done()
    assert isinstance(pushing.exception(), NotTaken)


@pytest.mark.usefixtures("little_patience")
async def test_an_answer_by_http2_is_given_while_any_of_it_is_taken() -> None:
    """However long the whole takes."""
    one = HTTP2(window=0)
    await one.ask()
    granting = asyncio.create_task(one.grant(20_000, every=0.1))
    began = asyncio.get_running_loop().time()
    answering = answer(one.tasks, one.here, [(b"content-length", b"200000")], b"x" * 200_000)
    await asyncio.wait_for(answering, 5)
    granting.cancel()
    assert asyncio.get_running_loop().time() - began > 2 * wire.UNREAD_SECONDS
    assert one.got == 200_000
    assert not any(isinstance(event, Closed) for event in one.sent)
    await one.here.handle(Closed())
    await one.tasks.end()


def test_the_limits_are_set_where_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the socket that workers inherit, and in Hypercorn."""
    with closing(listen("127.0.0.1:0")) as listener:
        found = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert found == wire.UNREAD_SECONDS * 1000
    monkeypatch.setattr(protocol, "H11Protocol", protocol.H11Protocol)  # type: ignore[attr-defined]
    monkeypatch.setattr(protocol, "H2Protocol", protocol.H2Protocol)  # type: ignore[attr-defined]
    monkeypatch.setattr(protocol.h2, "StreamBuffer", protocol.h2.StreamBuffer)
    for version in (protocol.h11, protocol.h2):
        monkeypatch.setattr(version, "HTTPStream", version.HTTPStream)  # type: ignore[attr-defined]
    wire.install()
    assert protocol.H11Protocol is PlainHTTP1  # type: ignore[attr-defined]
    assert protocol.H2Protocol is PatientHTTP2  # type: ignore[attr-defined]
    assert protocol.h2.StreamBuffer is Untaken
    assert protocol.h11.HTTPStream is protocol.h2.HTTPStream is Answered  # type: ignore[attr-defined]
