"""A load of keep-alive connections that checks every answer: requests a second, latencies."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

CONNECTIONS = 32


@dataclass(frozen=True)
class Measured:
    """One round: requests a second, and the median and 99th percentile in milliseconds."""

    rate: float
    p50: float
    p99: float


async def load(port: int, request: bytes, seconds: float, expected: bytes = b"200") -> Measured:
    """Send ``request`` over and over; raise if an answer has another status."""
    until = time.perf_counter() + seconds
    rounds = await asyncio.gather(
        *(_one(port, request, until, expected) for _ in range(CONNECTIONS))
    )
    times = sorted(t for one in rounds for t in one)
    return Measured(
        len(times) / seconds,
        statistics.median(times) * 1000,
        times[int(len(times) * 0.99)] * 1000,
    )


async def _one(port: int, request: bytes, until: float, expected: bytes) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    while (began := time.perf_counter()) < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if head[9:12] != expected:
            raise RuntimeError(f"unexpected answer: {head[:200]!r}")
        length = head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]
        await reader.readexactly(int(length))
        times.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()
    return times
