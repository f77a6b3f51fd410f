"""Numbers of several workers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import httpx

from tests._redis import RedisServer
from tests.live._serve import free_port, start, wait_until

TRUSTED = re.compile(r"^rolecall_redis_trusted (\S+)$", re.MULTILINE)
LIVE = re.compile(
    r'rolecall_requests_total\{method="GET",route="/health/live",status="200"\} (\S+)'
)


def test_the_numbers_are_those_of_all_workers(tmp_path: Path) -> None:
    """Whichever worker is asked; and nothing of them is left when the service ends."""
    serving = start(tmp_path, "--workers", "2")
    try:
        with serving.client() as client:
            for _ in range(20):
                assert client.get("/health/live").status_code == 200
            for _ in range(5):
                found = LIVE.search(client.get("/metrics").text)
                assert found is not None
                assert float(found[1]) == 20
    finally:
        assert serving.stop() == 0
    assert not list((tmp_path / "data").glob("metrics.*"))


def test_an_address_of_their_own(tmp_path: Path) -> None:
    """With ROLECALL_METRICS_BIND the numbers are there, and no more on the public address."""
    bind = f"127.0.0.1:{free_port()}"
    serving = start(tmp_path, ROLECALL_METRICS_BIND=bind)
    try:
        with serving.client() as client:
            assert client.get("/health/live").status_code == 200
            refused = client.get("/metrics")
            assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
            assert "rolecall_requests" not in refused.text
        found = LIVE.search(httpx.get(f"http://{bind}/metrics").text)
        assert found is not None
        assert float(found[1]) == 1
    finally:
        assert serving.stop() == 0


async def test_a_redis_that_may_evict_shows_everywhere(tmp_path: Path, short_tmp: Path) -> None:
    """In readiness, in the metrics and in one line of each worker's log; and so does its end."""
    redis = RedisServer(short_tmp / "evicting")
    redis.start()
    serving = start(tmp_path, "--workers", "2", REDIS_URL=redis.url)

    def trusted() -> str:
        found = TRUSTED.search(client.get("/metrics").text)
        assert found is not None
        return found[1]

    def ready() -> tuple[str, str | None]:
        answer = client.get("/health/ready")
        assert answer.status_code == 200
        return answer.json()["status"], answer.json()["reason"]

    try:
        with serving.client() as client:
            wait_until(lambda: trusted() == "1.0" and ready() == ("ok", None))
            await redis.command("CONFIG", "SET", "maxmemory", "100mb")
            await redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            wait_until(lambda: trusted() == "0.0" and ready() == ("degraded", "may evict"))
            await asyncio.sleep(2)
            lines = serving.log.read_text().count('"redis_may_evict"')
            assert lines == 2, "one of each worker"
            # a worker that dies meanwhile says nothing of those that live
            os.kill(serving.workers()[0], signal.SIGKILL)
            wait_until(lambda: len(serving.workers()) == 2)
            await redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
            wait_until(lambda: trusted() == "1.0" and ready() == ("ok", None))
    finally:
        assert serving.stop() == 0
        redis.stop()
