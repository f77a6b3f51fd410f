"""Connections of Hypercorn as we have them, in this process, with an application that waits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Event, RawData
from hypercorn.typing import ConnectionState

from api.http2 import PatientHTTP2
from api.wire import PlainHTTP1

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
