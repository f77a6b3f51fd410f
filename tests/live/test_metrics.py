"""Numbers of several workers."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from tests.live._serve import free_port, start

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
