"""An application on the bridge alone: what real servers serve in `test_bridge`.

REDIS_URL names the Redis that its one shared client uses. ``python -m tests.live._bridge_app PORT``
serves it on Flask's own development server.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flask import Flask, request
from flask.typing import ResponseReturnValue
from redis import asyncio as aioredis

from api.asgi import AsyncFlask

counts: Counter[str] = Counter()
meeting: dict[int, asyncio.Barrier] = {}
meeting_of_threads: dict[int, threading.Barrier] = {}


@asynccontextmanager
async def lifespan(app: Flask) -> AsyncIterator[None]:
    """Hold one Redis client for the application's life."""
    pool = aioredis.BlockingConnectionPool.from_url(os.environ["REDIS_URL"], max_connections=5)
    async with aioredis.Redis.from_pool(pool) as client:
        app.extensions["redis"] = client
        counts["started"] += 1
        yield


app = AsyncFlask(__name__, lifespan=lifespan)
app.config.update(MAX_CONTENT_LENGTH=100_000, BODY_TIMEOUT=1.0)
asgi = app.asgi


@app.get("/meet/<int:number>")
async def meet(number: int) -> ResponseReturnValue:
    """Answer once ``number`` requests are in here together."""
    barrier = meeting.setdefault(number, asyncio.Barrier(number))
    async with asyncio.timeout(20):
        await barrier.wait()
    return {"met": number}


@app.get("/meet-in-threads/<int:number>")
def meet_in_threads(number: int) -> ResponseReturnValue:
    """Answer once ``number`` requests are in here together, each blocking its thread."""
    meeting_of_threads.setdefault(number, threading.Barrier(number)).wait(20)
    return {"met": number}


@app.get("/redis")
async def count() -> ResponseReturnValue:
    """Count in Redis, over the shared client."""
    return {"count": await app.extensions["redis"].incr("bridge")}


@app.get("/blocking-redis")
def count_from_a_thread() -> ResponseReturnValue:
    """Count in Redis from a sync view, over the same client on the same loop."""

    async def increment() -> int:
        return int(await app.extensions["redis"].incr("bridge"))

    return {"count": app.ensure_sync(increment)()}


@app.post("/echo")
async def echo() -> ResponseReturnValue:
    """Say what came."""
    counts["echoed"] += 1
    return {"bytes": len(request.get_data()), "x-user": request.headers.get("X-User")}


@app.get("/stream")
async def stream() -> ResponseReturnValue:
    """Stream until the client leaves."""

    async def ticks() -> AsyncIterator[str]:
        try:
            while True:
                yield "tick\n"
                await asyncio.sleep(0.01)
        finally:
            counts["streams closed"] += 1

    return app.response_class(ticks())


@app.get("/counts")
async def show() -> ResponseReturnValue:
    """Say what happened."""
    return dict(counts)


if __name__ == "__main__":
    app.run(port=int(sys.argv[1]), threaded=True)
