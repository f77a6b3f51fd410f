"""HTTP/2 as we have it: no stream ends, or holds, what is asked beside it."""

from __future__ import annotations

import asyncio

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from h2.errors import ErrorCodes
from hypercorn import protocol
from hypercorn.asyncio.worker_context import EventWrapper
from hypercorn.events import Closed, Updated

from api import http2, idle
from api.http2 import NotTaken, Untaken
from api.wire import Answered
from tests.unit._wire import HTTP2, answer, leave


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an answer that nobody reads, and the buffers that ``install`` would bring."""
    monkeypatch.setattr(idle, "UNREAD_SECONDS", 0.3)
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
    for stream, is_idle in ((1, False), (3, True)):
        one.client.reset_stream(stream)
        await one.tell()
        assert one.sent[-1] == Updated(idle=is_idle)
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
    assert asyncio.get_running_loop().time() - began < idle.UNREAD_SECONDS
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
    assert len(one.here.stream_buffers) == http2.STREAMS_AT_MOST
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
    assert asyncio.get_running_loop().time() - began > 2 * idle.UNREAD_SECONDS
    assert one.got == 200_000
    assert not any(isinstance(event, Closed) for event in one.sent)
    await one.here.handle(Closed())
    await one.tasks.end()
