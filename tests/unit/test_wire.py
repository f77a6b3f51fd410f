"""Hypercorn's connection as we have it: it ends with its client, and changes to nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing
from typing import Any

import h11
import pytest
from hypercorn import protocol
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.typing import ConnectionState

from api import wire
from api.server import listen
from api.wire import PlainHTTP1

REQUEST = b"GET / HTTP/1.1\r\nHost: it\r\n"


class Tasks:
    """Stands for Hypercorn's task group; the application is ``asked`` and never answers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def spawn_app(self, _app: Any, _config: Any, scope: Any, send: Any) -> Any:
        """Begin a request."""
        self.asked.append((scope, send))

        async def put(_message: Any) -> None: ...

        return put


def connection(tasks: Tasks, sent: list[Event], fails: bool = False) -> PlainHTTP1:
    """Return a connection that writes into ``sent``, or to a client that takes nothing in."""

    async def send(event: Event) -> None:
        if fails and isinstance(event, RawData):
            raise TimeoutError
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


async def test_a_client_that_takes_nothing_in_has_gone() -> None:
    """The kernel's time-out of a write ends the connection as a reset does."""
    tasks = Tasks()
    here = connection(tasks, [], fails=True)
    await here.handle(RawData(REQUEST + b"\r\n"))
    assert here.stream is not None
    await here._send_error_response(500)
    assert here.stream is None


def test_the_limits_are_set_where_it_is_served() -> None:
    """On the socket that workers inherit, and in Hypercorn."""
    with closing(listen("127.0.0.1:0")) as listener:
        found = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert found == wire.UNREAD_SECONDS * 1000
    before = protocol.H11Protocol  # type: ignore[attr-defined]
    try:
        wire.install()
        assert protocol.H11Protocol is PlainHTTP1  # type: ignore[attr-defined]
    finally:
        protocol.H11Protocol = before  # type: ignore[attr-defined]
