"""A load of keep-alive connections that checks every answer: requests a second, latencies.

It must cost less than what it measures: one Protocol per connection on uvloop, no task per
request.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvloop

CONNECTIONS = 32
# Which request a connection sends next, given its number and the body of its last answer.
Next = Callable[[int, bytes], bytes]


@dataclass(frozen=True)
class Measured:
    """One round: requests, and a second; the median and 99th percentile in milliseconds."""

    count: int
    rate: float
    p50: float
    p99: float


class Wrong(RuntimeError):
    """An answer had another status than the load expects: what was measured is worth nothing."""


class _Connection(asyncio.Protocol):
    def __init__(self, number: int, following: Next, until: float, expected: bytes) -> None:
        self.times: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._number = number
        self._next = following
        self._until = until
        self._expected = expected
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._send(b"")

    def _send(self, last: bytes) -> None:
        self._began = time.perf_counter()
        assert self._transport is not None
        self._transport.write(self._next(self._number, last))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        if b"content-length: " in lower:
            length = int(lower.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            if len(rest) < length:
                return
            body = rest[:length]
        elif rest.endswith(b"0\r\n\r\n"):  # chunked: its last piece
            body = rest
        else:
            return
        now = time.perf_counter()
        self._buffer = b""
        if head[9:12] != self._expected:
            self._end(Wrong(f"{head[:200]!r} {body[:200]!r}"))
            return
        self.times.append(now - self._began)
        if now < self._until:
            self._send(body)
        else:
            self._next(self._number, body)  # it may keep what the last answer brought
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(Wrong(f"the connection was closed: {error}"))

    def _end(self, error: Exception | None) -> None:
        if not self.over.done():
            if error is None:
                self.over.set_result(None)
            else:
                self.over.set_exception(error)
            assert self._transport is not None
            self._transport.close()


def load(
    port: int,
    following: Next,
    seconds: float,
    *,
    expected: bytes = b"200",
    connections: int = CONNECTIONS,
) -> Measured:
    """Send requests over and over; raise ``Wrong`` if an answer has another status."""
    return uvloop.run(_load(port, following, seconds, expected, connections))


async def _load(
    port: int, following: Next, seconds: float, expected: bytes, connections: int
) -> Measured:
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    made = []
    for number in range(connections):
        _, one = await loop.create_connection(
            lambda n=number: _Connection(n, following, began + seconds, expected),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        made.append(one)
    async with asyncio.timeout(seconds + 30):
        await asyncio.gather(*(one.over for one in made))
    times = sorted(t for one in made for t in one.times)
    took = time.perf_counter() - began
    return Measured(
        len(times),
        len(times) / took,
        statistics.median(times) * 1000,
        times[int(len(times) * 0.99)] * 1000,
    )
