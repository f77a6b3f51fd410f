"""`examples/rolecall_auth.py` before a server that counts; tests/live has it before a real one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from examples.rolecall_auth import RolecallAuth

TOGETHER = 20


class Server:
    """Refuses the token ``old`` with ``code``; its refresh is slow, and may be refused."""

    def __init__(self, code: str = "token_expired", refresh: int = 200) -> None:
        self.code, self.refresh = code, refresh
        self.asked: Counter[str] = Counter()
        # nobody is told that the token is old before all have asked with it
        self.barrier = threading.Barrier(TOGETHER)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked[request.url.path] += 1
        token = request.headers["Authorization"].removeprefix("Bearer ")
        if request.url.path == "/refresh":
            assert token == "next"
            body = {"access_token": "new", "refresh_token": "after"}
            return httpx.Response(self.refresh, json=body if self.refresh == 200 else {})
        if token == "old":
            return httpx.Response(401, json={"code": self.code})
        return httpx.Response(200, content=request.read())

    def together(self, request: httpx.Request) -> httpx.Response:
        answer = self(request)
        if answer.status_code == 401:
            self.barrier.wait(5)
        elif request.url.path == "/refresh":
            time.sleep(0.05)
        return answer

    async def slowly(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        await asyncio.sleep(0.01)
        return self(request)


def auth() -> RolecallAuth:
    """Return an auth with a token that is no good any more."""
    return RolecallAuth("http://it/", "old", "next")


@pytest.mark.parametrize("code", ["token_expired", "token_stale"])
def test_threads_share_one_refresh(code: str) -> None:
    """All of them were told 401; one refreshes, and everybody is answered."""
    server = Server(code)
    transport = httpx.MockTransport(server.together)
    with (
        httpx.Client(auth=auth(), transport=transport) as client,
        ThreadPoolExecutor(TOGETHER) as pool,
    ):
        answers = list(pool.map(lambda _: client.get("http://it/a"), range(TOGETHER)))
    assert [answer.status_code for answer in answers] == [200] * TOGETHER
    assert server.asked == {"/a": 2 * TOGETHER, "/refresh": 1}


@pytest.mark.parametrize("code", ["token_expired", "token_stale"])
async def test_tasks_share_one_refresh(code: str) -> None:
    """The same without threads."""
    server = Server(code)
    transport = httpx.MockTransport(server.slowly)
    async with httpx.AsyncClient(auth=auth(), transport=transport) as client:
        answers = await asyncio.gather(*(client.get("http://it/a") for _ in range(TOGETHER)))
    assert [answer.status_code for answer in answers] == [200] * TOGETHER
    assert server.asked == {"/a": 2 * TOGETHER, "/refresh": 1}


async def test_a_refused_refresh_is_asked_for_once() -> None:
    """The 401 is handed on to everybody, now and later; new tokens begin anew."""
    server, own = Server(refresh=401), auth()
    transport = httpx.MockTransport(server.slowly)
    async with httpx.AsyncClient(auth=own, transport=transport) as client:
        answers = await asyncio.gather(*(client.get("http://it/a") for _ in range(TOGETHER)))
        answers.append(await client.get("http://it/a"))
        assert {answer.status_code for answer in answers} == {401}
        assert server.asked["/refresh"] == 1
        own.access_token = "new"
        assert (await client.get("http://it/a")).status_code == 200


@pytest.mark.parametrize("refresh", [503, 429])
def test_a_refresh_that_failed_is_tried_again(refresh: int) -> None:
    """The service was away: nothing is known of the session."""
    server = Server(refresh=refresh)
    with httpx.Client(auth=auth(), transport=httpx.MockTransport(server)) as client:
        assert client.get("http://it/a").status_code == 401
        server.refresh = 200
        assert client.get("http://it/a").status_code == 200
    assert server.asked["/refresh"] == 2


@pytest.mark.parametrize("code", ["token_revoked", "missing_token", ""])
def test_what_no_refresh_repairs_is_handed_on(code: str) -> None:
    """And nothing is asked for."""
    server = Server(code)
    with httpx.Client(auth=auth(), transport=httpx.MockTransport(server)) as client:
        assert client.get("http://it/a").status_code == 401
    assert server.asked == {"/a": 1}


def pieces() -> Iterator[bytes]:
    """A body that is made as it is sent."""
    yield from (b"one ", b"two")


async def pieces_async() -> AsyncIterator[bytes]:
    """The same, awaited."""
    for piece in pieces():
        yield piece


class Wire(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Takes bodies piece by piece, once, as a connection does; MockTransport keeps them."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._answer(request, b"".join(request.stream))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self._answer(request, b"".join([piece async for piece in request.stream]))

    def _answer(self, request: httpx.Request, body: bytes) -> httpx.Response:
        return Server()(httpx.Request("POST", request.url, headers=request.headers, content=body))


def test_a_body_is_sent_again() -> None:
    """Though it was made while it was sent the first time."""
    with httpx.Client(auth=auth(), transport=Wire()) as client:
        assert client.post("http://it/a", content=pieces()).text == "one two"


async def test_a_body_is_sent_again_by_tasks() -> None:
    """The same without threads."""
    async with httpx.AsyncClient(auth=auth(), transport=Wire()) as client:
        assert (await client.post("http://it/a", content=pieces_async())).text == "one two"


def test_an_answer_is_not_read_ahead() -> None:
    """A download that goes well is read by whoever asked for it."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=pieces()))
    client = httpx.Client(auth=auth(), transport=transport)
    with client, client.stream("GET", "http://it/a") as answer:
        assert not answer.is_stream_consumed
        assert answer.read() == b"one two"
