"""Hypercorn's connection as we have it: it ends with its client, and changes to nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing

import h2.config
import h2.connection
import h2.events
import h2.settings
import h11
import pytest
from hypercorn import protocol
from hypercorn.events import Closed, RawData, Updated

from api import idle, wire
from api.http2 import PatientHTTP2, Untaken
from api.server import listen
from api.wire import Answered, PlainHTTP1
from tests.unit._wire import HTTP2, REQUEST, Tasks, answer, connection, leave


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


def test_the_limits_are_set_where_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the socket that workers inherit, and in Hypercorn."""
    with closing(listen("127.0.0.1:0")) as listener:
        found = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert found == idle.UNREAD_SECONDS * 1000
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
