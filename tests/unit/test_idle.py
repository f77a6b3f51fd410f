"""How long a connection is kept: over real sockets, with little patience."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import hypercorn.asyncio.run
import pytest
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio import serve
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import RawData, Updated

from api import idle
from api.idle import Watched
from api.server import Strict

PATIENCE = 0.4
GET = b"GET / HTTP/1.1\r\nHost: it\r\n\r\n"


class Server:
    """Serves an application that answers after ``delay`` seconds."""

    def __init__(self, patience: float) -> None:
        self.config = Config()
        self.config.keep_alive_timeout = patience
        self.context = WorkerContext(None)
        self.delay = 0.0
        self.latecomers = idle.Latecomers()
        self.connections: list[Watched] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.port = 0
        self.asked = 0
        self.body = b"ok"
        self.room: int | None = None
        self.ready = asyncio.Event()

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Be the application."""
        if scope["type"] == "lifespan":
            await self.live(receive, send)
            return
        self.asked += 1
        await asyncio.sleep(self.delay)
        headers = [(b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})

    async def live(self, receive: Any, send: Any) -> None:
        """Take some time to end."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        self.ready.set()
        await receive()
        await asyncio.sleep(self.delay / 2)
        await send({"type": "lifespan.shutdown.complete"})

    async def connected(self, reader: Any, writer: Any) -> None:
        """Serve a connection as Hypercorn's worker does."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        loop = asyncio.get_running_loop()
        if self.room is not None:
            wire = writer.get_extra_info("socket")
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.room)
        app: Any = ASGIWrapper(self.answer)
        one = Watched(self.latecomers, app, loop, self.config, self.context, {}, reader, writer)
        self.connections.append(one)
        await one


class Aborted:
    """A transport that notes that it was aborted."""

    def __init__(self, aborted: list[bool], transport: Any) -> None:
        self._aborted, self._transport = aborted, transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def abort(self) -> None:
        """End it at once."""
        self._aborted.append(True)
        self._transport.abort()


class Client:
    """One connection to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self) -> None:
        """Be answered once."""
        self.writer.write(GET)
        await self.reader.readuntil(b"\r\n\r\nok")

    async def closed_after(self, limit: float = 10) -> float:
        """Return the seconds until the server closes the connection."""
        began = time.monotonic()
        assert await asyncio.wait_for(self.reader.read(), limit) == b""
        return time.monotonic() - began

    async def leave(self) -> None:
        """Close it from this side."""
        self.writer.close()
        with suppress(ConnectionResetError):
            await self.writer.wait_closed()


@asynccontextmanager
async def serving(patience: float = PATIENCE) -> AsyncIterator[tuple[Server, Client]]:
    """Yield a server with one connection."""
    server = Server(patience)
    listening = await asyncio.start_server(server.connected, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    client = Client(*await asyncio.open_connection("127.0.0.1", server.port))
    try:
        yield server, client
    finally:
        client.writer.close()
        listening.close()
        await asyncio.wait_for(asyncio.gather(*server.tasks), 2)


def is_about(seconds: float, wanted: float) -> bool:
    """Whether a busy machine may have taken so long; never less."""
    return wanted * 0.95 < seconds < wanted + 2


async def until(condition: Callable[[], bool], limit: float = 2) -> None:
    """Wait for a condition to hold."""
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.01)


async def test_who_asks_nothing_is_closed() -> None:
    """From the first moment on, and however the bytes of a head drip in."""
    async with serving() as (_, client):
        assert is_about(await client.closed_after(), PATIENCE)
    async with serving() as (_, client):
        began = time.monotonic()
        for byte in GET[:-1]:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(PATIENCE / 5)
            if client.reader.at_eof():
                break
        assert client.reader.at_eof()
        assert is_about(time.monotonic() - began, PATIENCE)


async def test_an_answer_may_take_longer_and_the_time_begins_anew() -> None:
    """Nothing that is being answered is cut; after each answer there is the whole time again."""
    async with serving() as (server, client):
        for server.delay in (PATIENCE * 2.5, 0, PATIENCE / 2, 0):
            await client.ask()
            await asyncio.sleep(PATIENCE / 3)
        await client.ask()
        assert is_about(await client.closed_after(), PATIENCE)


async def test_one_task_watches_over_all_requests() -> None:
    """That is what it is for: Hypercorn makes two for each."""
    async with serving() as (server, client):
        await client.ask()
        watching = server.connections[0].idle_task._handle
        assert watching is not None
        for _ in range(3):
            await client.ask()
        assert server.connections[0].idle_task._handle is watching
        assert not watching.done()


async def test_a_client_that_has_gone_is_not_waited_for() -> None:
    """After its answer, or during it: nothing of the connection is kept until the time is up."""
    for delay in (0, 0.1):
        async with serving(patience=60) as (server, client):
            server.delay = delay
            if delay:
                client.writer.write(GET)
                await asyncio.sleep(0.05)
            else:
                await client.ask()
            client.writer.close()
            await until(lambda server=server: all(task.done() for task in server.tasks))


async def test_a_client_that_the_kernel_gave_up_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out of a write ends what is asked there as a reset does, and is no error."""
    async with serving(patience=60) as (server, client):
        server.delay = 60
        client.writer.write(GET)
        await until(lambda: bool(server.connections))
        (one,) = server.connections
        await until(lambda: one._idle_since is None)
        http: Any = one.protocol.protocol
        assert http.stream is not None

        async def drain() -> None:
            raise TimeoutError

        monkeypatch.setattr(one.writer, "drain", drain)
        await one.protocol_send(RawData(b"HTTP/1.1 "))
        assert http.stream is None
        server.tasks[0].cancel()
        await asyncio.wait(server.tasks, timeout=2)
        server.tasks.clear()


async def test_a_half_closed_client_gets_its_answer() -> None:
    """It asks no more, but listens."""
    async with serving(patience=60) as (server, client):
        server.delay = 0.1
        client.writer.write(GET)
        client.writer.write_eof()
        assert (await asyncio.wait_for(client.reader.read(), 5)).endswith(b"\r\n\r\nok")


async def test_a_stop_ends_what_is_idle_and_waits_for_the_rest() -> None:
    """At once, however long it might have been kept; an answer under way is still given."""
    async with serving(patience=60) as (server, client):
        await client.ask()
        await server.context.terminated.set()
        assert await client.closed_after() < 5
    async with serving(patience=60) as (server, client):
        server.delay = 0.3
        asking = asyncio.create_task(client.ask())
        await asyncio.sleep(0.1)
        await server.context.terminated.set()
        await asking
        assert await client.closed_after() < 5


async def test_what_becomes_idle_after_the_stop_is_closed() -> None:
    """HTTP/2 leaves it to the time-out; by no task, for a connection that is cut off takes none."""
    async with serving(patience=60) as (server, client):
        server.delay = 1.5
        client.writer.write(GET)
        await until(lambda: bool(server.connections))
        (one,) = server.connections
        await until(lambda: one._idle_since is None)
        await server.context.terminated.set()
        await until(lambda: one.idle_task._handle.done())  # type: ignore[union-attr]
        assert not one.writer.is_closing()
        watched = one.idle_task._handle
        await one.protocol_send(Updated(idle=True))
        assert one.writer.is_closing()
        assert one.idle_task._handle is watched


async def test_who_comes_too_late_is_not_begun() -> None:
    """When the last ones were waited for: it is closed unread, and nothing of it is half done."""
    async with serving(patience=60) as (server, client):
        await until(lambda: bool(server.connections))
        await server.context.terminated.set()
        await server.latecomers.ended(5)
        late = Client(*await asyncio.open_connection("127.0.0.1", server.port))
        late.writer.write(GET)
        with suppress(ConnectionResetError):
            assert await late.closed_after() < 5
        await late.leave()
        await client.closed_after()
        assert server.asked == 0


async def test_the_last_ones_are_waited_for_in_bounds() -> None:
    """An answer that takes longer does not keep the service from its end."""
    async with serving(patience=60) as (server, client):
        await until(lambda: bool(server.connections))
        await server.context.terminated.set()
        for server.delay, limit in ((0.3, 60), (60, 0.1)):
            late = Client(*await asyncio.open_connection("127.0.0.1", server.port))
            late.writer.write(GET)
            before = server.asked
            await until(lambda before=before: server.asked > before)
            began = time.monotonic()
            await server.latecomers.ended(limit)
            assert is_about(time.monotonic() - began, min(server.delay, limit))
            task = server.tasks.pop()
            task.cancel()
            await asyncio.wait([task], timeout=5)
            await late.leave()
            server.latecomers = idle.Latecomers()
        await client.closed_after()


async def test_a_slow_client_gets_all_of_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes over what is yet to be sent when we close: only a stop has no time."""
    monkeypatch.setattr(idle, "CLOSE_SECONDS", 0.1)
    async with serving(patience=60) as (server, client):
        server.body, server.room = b"x" * 200_000, 4_096
        wire = socket.socket()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        wire.connect(("127.0.0.1", server.port))
        slow = Client(*await asyncio.open_connection(sock=wire, limit=1_024))
        slow.writer.write(GET.replace(b"1.1", b"1.0"))
        await until(lambda: server.asked == 1)
        transport, got = server.connections[1].writer.transport, b""
        while not transport.is_closing():
            got += await asyncio.wait_for(slow.reader.read(500), 5)
        await asyncio.sleep(0.5)
        assert transport.get_write_buffer_size() > 0
        while piece := await asyncio.wait_for(slow.reader.read(10_000), 5):
            got += piece
        assert got.count(b"x") == 200_000
        await slow.leave()
        client.writer.close()


async def test_a_client_that_takes_in_nothing_is_left_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is cut off writes to it no longer than a farewell takes, nor waits for its end."""
    monkeypatch.setattr(idle, "CLOSE_SECONDS", 0.2)
    async with serving(patience=60) as (server, client):
        server.body = b"x" * 8_000_000
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(GET)
        await until(lambda: server.asked == 1)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        server.tasks[0].cancel()
        await asyncio.wait(server.tasks, timeout=5)
        assert time.monotonic() - began < 3
        server.tasks.clear()
        assert server.connections[0].writer.transport.is_closing()
        await client.leave()


@pytest.mark.parametrize("asks", [False, True], ids=["idle", "answered"])
async def test_who_does_not_hear_of_the_end_of_tls_is_left(
    asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a stop, a client that has gone without a word; asyncio would wait half a minute for it."""
    monkeypatch.setattr(idle, "CLOSE_SECONDS", 0.1)
    aborted: list[bool] = []
    async with serving(patience=60) as (server, client):
        server.delay = 0.2
        await until(lambda: bool(server.connections))
        writer = server.connections[0].writer
        monkeypatch.setattr(writer, "get_extra_info", lambda _name: object())
        monkeypatch.setattr(writer, "close", lambda: None)
        monkeypatch.setattr(writer, "write_eof", lambda: None)
        monkeypatch.setattr(writer, "_transport", Aborted(aborted, writer.transport))
        if asks:
            client.writer.write(GET)
            await until(lambda: server.asked == 1)
        await server.context.terminated.set()
        if asks:
            await client.reader.readuntil(b"\r\n\r\nok")
        assert await client.closed_after() < 3
        assert aborted


async def test_a_connection_that_fails_does_not_end_the_wait_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told to the loop's handler; Hypercorn's worker would go on without the rest."""
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: told.append(context))
    async with serving(patience=60) as (server, client):
        await until(lambda: bool(server.connections))
        error = RuntimeError("no such luck")

        async def handle(_event: Any) -> None:
            raise error

        monkeypatch.setattr(server.connections[0].protocol, "handle", handle)
        client.writer.write(GET)
        assert await client.closed_after() < 3
        await asyncio.wait(server.tasks, timeout=5)
        assert [task.exception() for task in server.tasks] == [None]
    assert len(told) == 1
    assert error in told[0]["exception"].exceptions


@pytest.mark.parametrize("turns", range(-2, 8))
async def test_no_request_is_cut_off_by_a_stop(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few turns of the loop came between its connection and the stop: it is answered."""
    monkeypatch.setattr(hypercorn.asyncio.run, "TCPServer", TCPServer)
    server, stop = Server(60), asyncio.Event()
    server.delay = 0.05
    app = Strict()
    app.app = server.answer
    app.last_requests = functools.partial(idle.install().ended, 5)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        server.config.bind = [f"fd://{os.dup(listener.fileno())}"]
        serving: Any = serve(app, server.config, shutdown_trigger=stop.wait, mode="asgi")  # type: ignore[arg-type]
        ending = asyncio.create_task(serving)
        await server.ready.wait()
        await asyncio.sleep(0.02)
        if turns < 0:
            stop.set()
        for _ in range(-turns):
            await asyncio.sleep(0)
        client.connect(listener.getsockname())
        client.sendall(GET)
        for _ in range(turns):
            await asyncio.sleep(0)
        stop.set()
        await asyncio.wait_for(ending, 5)
        client.settimeout(1)
        assert client.recv(1000)[:12] == b"HTTP/1.1 200"


async def test_what_comes_in_behind_our_end_is_not_begun() -> None:
    """Its answer would go nowhere: whoever asked can tell that nothing was done."""
    async with serving(patience=0.1) as (server, client):
        await until(lambda: bool(server.connections))
        (one,) = server.connections
        end: Any = one._initiate_server_close

        async def later() -> None:
            one.reader.feed_data(GET)
            await asyncio.sleep(0.05)
            await end()

        one._initiate_server_close = later  # type: ignore[method-assign]
        assert await client.closed_after() < 5
        assert server.asked == 0


def test_it_is_what_hypercorn_serves_with() -> None:
    """In a process that asked for it."""
    assert hypercorn.asyncio.run.TCPServer is TCPServer  # type: ignore[attr-defined]
    try:
        latecomers = idle.install()
        made: Any = hypercorn.asyncio.run.TCPServer  # type: ignore[attr-defined]
        assert (made.func, made.args) == (Watched, (latecomers,))
    finally:
        hypercorn.asyncio.run.TCPServer = TCPServer  # type: ignore[attr-defined]
