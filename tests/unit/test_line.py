"""The line to Redis: turns in order, one limit for all, no answer to another's question."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from api.blocklist.redis_index import RedisUntrusted, reason_of
from api.line import Line, Script
from tests._redis import RedisServer

LIMIT = 0.2
ECHO = Script("return {ARGV[1], KEYS[1]}")


async def connected(connection: AbstractConnection) -> None:
    """Do what redis-py does."""
    await connection.on_connect()


@pytest.fixture
def server(short_tmp: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A Redis of this test's own."""
    server = RedisServer(short_tmp / f"line{abs(hash(request.node.name)) % 10**8}")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def line(server: RedisServer) -> AsyncIterator[Line]:
    """A line to it."""
    line = Line(server.url, LIMIT, connected)
    yield line
    await line.hang_up()


async def test_turns_are_taken_in_order(line: Line) -> None:
    """Whoever asks again and again does not keep another from asking."""
    asked = 0

    async def again_and_again() -> None:
        nonlocal asked
        while asked < 1_000:
            await line.ask("PING")
            asked += 1

    greedy = asyncio.create_task(again_and_again())
    while asked < 10:
        await asyncio.sleep(0)
    before = asked
    assert await line.ask("ECHO", "me") == b"me"
    assert asked - before < 5
    await greedy


async def test_a_question_that_is_given_up_leaves_no_answer_behind(line: Line) -> None:
    """Cancelled at any moment, the next one gets its own answer (46)."""
    for n in range(200):
        task = asyncio.create_task(line.ask("ECHO", f"lost{n}"))
        for _ in range(n % 7):
            await asyncio.sleep(0)
        task.cancel()
        assert await line.ask("ECHO", f"mine{n}") == f"mine{n}".encode()


async def test_a_hung_server_costs_the_limit(line: Line, server: RedisServer) -> None:
    """TimeoutError, for those behind in the queue too; and then it works again."""
    await line.ask("PING")
    server.signal(signal.SIGSTOP)
    async with asyncio.timeout(LIMIT * 20):
        asking = (line.ask("ECHO", n) for n in range(3))
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TimeoutError] * 3
    server.signal(signal.SIGCONT)
    assert await line.ask("ECHO", "well") == b"well"


async def test_a_busy_loop_is_no_hung_server(line: Line) -> None:
    """An answer that arrived while this loop did other things for longer than the limit."""
    await line.ask("PING")
    asking = asyncio.create_task(line.ask("ECHO", "here"))
    await asyncio.sleep(0)
    time.sleep(LIMIT * 1.5)  # noqa: ASYNC251  that is the point
    assert await asking == b"here"


async def test_a_script_is_taught_where_it_is_not_known(line: Line) -> None:
    """At first, and after Redis has forgotten it; an error of Redis costs no connection."""
    assert await line.run(ECHO, ["k"], "a") == [b"a", b"k"]
    await line.ask("SCRIPT", "FLUSH")
    assert await line.run(ECHO, ["k"], "b") == [b"b", b"k"]
    assert await line.run(ECHO, ["k"], "c") == [b"c", b"k"]
    with pytest.raises(ResponseError):
        await line.ask("NO-SUCH-COMMAND")
    assert await line.ask("ECHO", "still") == b"still"


async def test_a_new_server_is_connected_to(line: Line, server: RedisServer) -> None:
    """What breaks with the connection is one question."""
    await line.ask("PING")
    server.stop()
    with pytest.raises(Exception, match=r"."):
        await line.ask("PING")
    server.start()
    assert await line.ask("ECHO", "new") == b"new"


def test_a_fault_that_nobody_thought_of_has_words_too() -> None:
    """Anything else is an error, and no more."""
    assert reason_of(RuntimeError("secret")) == "error"
    assert reason_of(RedisUntrusted("may evict")) == "may evict"
    assert reason_of(ConnectionRefusedError(111, "/run/redis.sock")) == "no connection"
