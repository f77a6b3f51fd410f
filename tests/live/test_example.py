"""The examples, under real Hypercorn."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.embedded import EmbeddedRedis
from examples.operators_morning import morning
from tests import conftest
from tests.conftest import bearer
from tests.live import _serve
from tests.live._serve import BIN, ROOT, free_port, wait_until


@pytest.fixture
def example(tmp_path: Path) -> Iterator[str]:
    """`hypercorn examples.blueprint:asgi` on a data folder that `rolecall serve` prepared."""
    prepared = _serve.start(tmp_path, "--demo")
    prepared.stop()
    data, port = tmp_path / "data", free_port()
    with EmbeddedRedis(data) as redis:
        environ = os.environ | {"ROLECALL_DATA_DIR": str(data), "REDIS_URL": redis.url}
        command = [BIN / "hypercorn", "-b", f"127.0.0.1:{port}", "examples.blueprint:asgi"]
        process = subprocess.Popen(
            command, env=environ, cwd=ROOT, stdout=sys.stderr, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(url))
        yield url
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_the_example_guards_its_blueprint(example: str) -> None:
    """The role opens it, another does not; a plain view works; public is public."""
    with httpx.Client(base_url=example) as client:
        tokens = {}
        for username, password in (("testuser", "testpass"), ("admin", "adminpass")):
            body = {"username": username, "password": password, "transport": "json"}
            tokens[username] = bearer(client.post("/login", json=body).json()["access_token"])
        assert client.get("/reports/").json()["code"] == "missing_token"
        refused = client.get("/reports/", headers=tokens["testuser"])
        assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_role")
        answer = client.get("/reports/", headers=tokens["admin"]).json()
        assert answer == {"reports": ["q1", "q2"], "for": "admin"}
        removed = client.delete("/reports/q1", headers=tokens["admin"])
        assert removed.json() == {"removed": "q1"}
        assert client.get("/reports/ping").json() == {"pong": True}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_an_operators_morning(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The script does it all over the API, on both databases, with two workers."""
    environ = {}
    if database == "postgresql":
        server = request.getfixturevalue("postgres_server")
        asyncio.run(conftest._execute(server, "DROP DATABASE IF EXISTS morning"))
        asyncio.run(conftest._execute(server, "CREATE DATABASE morning"))
        environ["DATABASE_URL"] = f"postgresql://postgres@/morning?host={server.directory}"
    serving = _serve.start(tmp_path, "--demo", "--workers", "2", **environ)
    try:
        actions = morning(serving.url, "admin", "adminpass")
        assert actions == [
            "user.created", "login", "user.roles", "admin.refused", "session.revoked",
        ]  # fmt: skip
        environ |= os.environ | {"ROLECALL_DATA_DIR": str(tmp_path / "data")}
        wait_until(lambda: "unsealed  0 rows" in _verified(environ))
        assert "The chain holds." in _verified(environ)
    finally:
        assert serving.stop() == 0


def _verified(environ: dict[str, str]) -> str:
    command = [BIN / "rolecall", "audit", "verify"]
    return subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
