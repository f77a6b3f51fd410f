"""`rolecall serve` as a process of its own, on a free port and a data folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Return a port of the loopback that nobody serves just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Serving:
    """A running supervisor; ``log`` is what it and its workers printed, ``environ`` its own."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    def client(self) -> httpx.Client:
        """Return a client that opens a connection for each request, so meets every worker."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, timeout=20, limits=limits)

    def workers(self) -> list[int]:
        found = psutil.Process(self.process.pid).children()
        return [
            child.pid
            for child in found
            if child.status() != psutil.STATUS_ZOMBIE and "redis" not in child.name()
        ]

    def redis(self) -> int:
        found = psutil.Process(self.process.pid).children()
        return next(child.pid for child in found if "redis" in child.name())

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start(
    data: Path,
    *arguments: str,
    port: int | None = None,
    wait: bool = True,
    cwd: Path = ROOT,
    command: Sequence[str | Path] = (BIN / "rolecall",),
    **environ: str,
) -> Serving:
    """Start `rolecall serve`, and wait until it answers. In ``cwd`` is its hypercorn.toml."""
    port = port or free_port()
    log = data / "serve.log"
    environ = {"ROLECALL_DATA_DIR": str(data / "data")} | environ
    data.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "serve", "--bind", f"127.0.0.1:{port}", *arguments],
            stdout=out,
            stderr=out,
            cwd=cwd,
            env=os.environ | environ,
        )
    serving = Serving(process, f"http://127.0.0.1:{port}", log, environ)
    if wait:
        try:
            wait_until(
                lambda: "Rolecall serves on" in log.read_text() or process.poll() is not None
            )
            assert process.poll() is None, log.read_text()
        except BaseException:
            process.kill()  # its workers and its Redis end with it
            raise
    return serving


def wait_until(condition: object, seconds: float = 20) -> None:
    """Wait for a condition to hold; fail after ``seconds``."""
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.05)
