"""The bridge under real servers: Hypercorn by ASGI and by WSGI, and Flask's own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from redis import asyncio as aioredis

from tests._redis import RedisServer
from tests.live._serve import ROOT, free_port, wait_until

# Not the five seconds it has: a request that crosses the end of an idle connection is lost.
HYPERCORN = [sys.executable, "-m", "hypercorn", "--keep-alive", "60", "--bind"]
MODULE = "tests.live._bridge_app"
SERVERS = {
    "asgi": lambda port: [*HYPERCORN, f"127.0.0.1:{port}", f"{MODULE}:asgi"],
    "wsgi": lambda port: [*HYPERCORN, f"127.0.0.1:{port}", f"{MODULE}:app"],
    "flask": lambda port: [sys.executable, "-m", MODULE, str(port)],
}


@contextmanager
def served(kind: str, redis_url: str) -> Iterator[str]:
    """Serve the application by ``kind``; give its URL."""
    port = free_port()
    process = subprocess.Popen(
        SERVERS[kind](port),
        cwd=ROOT,
        env=os.environ | {"REDIS_URL": redis_url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            # Python drops a KeyboardInterrupt that meets a finalizer: Flask's server has no other
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def asgi_url(redis_server: RedisServer) -> Iterator[str]:
    """The application under Hypercorn, natively."""
    with served("asgi", redis_server.url) as url:
        yield url


@pytest.fixture(scope="module", params=["asgi", "wsgi", "flask"])
def url(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[str]:
    """The application under each server in turn."""
    if request.param == "asgi":
        yield request.getfixturevalue("asgi_url")
        return
    with served(request.param, redis_server.url) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of as many connections as it has requests."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
        yield client


@pytest.fixture
def together(client: httpx.AsyncClient, asgi_url: str) -> int:
    """How many requests can be inside at once: natively any number, else one a server's thread.

    Hypercorn's WSGI has the default executor's, so one more than the processors at the least.
    """
    return 50 if str(client.base_url).startswith(asgi_url) else 5


async def test_views_wait_together(client: httpx.AsyncClient, together: int) -> None:
    """Fifty async views are inside at once: each answers only when all have come."""
    answers = await asyncio.gather(*(client.get(f"/meet/{together}") for _ in range(together)))
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.json() for answer in answers] == [{"met": together}] * together


async def test_sync_views_wait_together(client: httpx.AsyncClient, together: int) -> None:
    """Sync views block threads of their own, up to SYNC_THREADS; others are served meanwhile."""
    number = min(together, 40)
    path = f"/meet-in-threads/{number}"
    waiting = [asyncio.create_task(client.get(path)) for _ in range(number - 1)]
    await asyncio.sleep(0.3)
    assert (await client.get("/counts")).status_code == 200
    assert not any(task.done() for task in waiting)
    answers = [await client.get(path), *await asyncio.gather(*waiting)]
    assert [answer.json() for answer in answers] == [{"met": number}] * number


async def test_a_thousand_requests_share_one_redis_client(
    client: httpx.AsyncClient, redis_server: RedisServer
) -> None:
    """None fails, none is lost, and there is one lifespan, so one loop and one pool."""
    async with aioredis.Redis.from_url(redis_server.url) as redis:
        await redis.delete("bridge")
        answers = []
        for _ in range(20):
            paths = ["/redis", "/blocking-redis"] * 25
            answers += await asyncio.gather(*(client.get(path) for path in paths))
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["count"] for answer in answers} == set(range(1, 1001))
        assert await redis.get("bridge") == b"1000"
    assert (await client.get("/counts")).json()["started"] == 1


async def test_chunked_bodies_are_read(asgi_url: str) -> None:
    """A chunked body arrives whole (52); a header with an underscore does not (54)."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    headers = {"X_User": "root"}
    async with httpx.AsyncClient(base_url=asgi_url) as client:
        answer = await client.post("/echo", content=pieces(), headers=headers)
    assert answer.status_code == 200
    assert answer.json() == {"bytes": 10_000, "x-user": None}


def converse(url: str, first: bytes, more: bytes = b"", every: float = 0, most: int = 0) -> bytes:
    """Send ``first``, then ``more`` up to ``most`` times; return all that came back."""
    host, _, port = url.removeprefix("http://").partition(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(first)
        for _ in range(most):
            try:
                wire.sendall(more)
            except OSError:
                break
            time.sleep(every)
        try:
            while piece := wire.recv(65536):
                got += piece
        except ConnectionError:
            pass
    return got


HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def status(answer: bytes) -> int:
    """Return the status of a raw answer."""
    return int(answer.split(b" ", 2)[1])


async def echoed(url: str) -> int:
    """Return how often the view that takes a body was called."""
    async with httpx.AsyncClient(base_url=url) as client:
        return int((await client.get("/counts")).json().get("echoed", 0))


async def test_an_endless_body_ends_at_the_cap(asgi_url: str) -> None:
    """Chunked and endless: 413 at the cap, the view is never called (52)."""
    before = await echoed(asgi_url)
    chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
    answer = await asyncio.to_thread(converse, asgi_url, CHUNKED, chunk, 0.001, 20_000)
    assert status(answer) == 413
    assert await echoed(asgi_url) == before


async def test_an_announced_oversize_is_refused_unread(asgi_url: str) -> None:
    """A Content-Length over the cap is 413 though no byte of the body was sent."""
    answer = await asyncio.to_thread(converse, asgi_url, HEAD + b"Content-Length: 100001\r\n\r\n")
    assert status(answer) == 413


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "announced"])
async def test_a_dripped_body_meets_the_deadline(asgi_url: str, chunked: bool) -> None:
    """A byte now and then buys no time: 408 at the total deadline of a second (53)."""
    first, drop = (
        (CHUNKED, b"1\r\nx\r\n") if chunked else (HEAD + b"Content-Length: 99\r\n\r\n", b"x")
    )
    answer = await asyncio.to_thread(converse, asgi_url, first, drop, 0.2, 30)
    assert status(answer) == 408


async def test_a_stream_ends_with_its_client(asgi_url: str) -> None:
    """A stream is sent as it comes, and closed when its client leaves."""
    async with httpx.AsyncClient(base_url=asgi_url) as client:
        before = (await client.get("/counts")).json().get("streams closed", 0)
        async with client.stream("GET", "/stream") as response:
            assert response.status_code == 200
            assert await anext(response.aiter_lines()) == "tick"
        async with asyncio.timeout(5):
            while (await client.get("/counts")).json().get("streams closed", 0) != before + 1:
                await asyncio.sleep(0.02)
