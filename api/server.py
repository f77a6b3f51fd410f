"""``rolecall serve``: a supervisor that binds the address and keeps Hypercorn workers alive.

Hypercorn's own master exits 0 when a worker is killed, and leaves orphans when it is killed
itself. Here a worker that dies is replaced; workers watch a pipe whose other end only the
supervisor holds, and end when it closes, however the supervisor went.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config

from api.errors import StartupError

log = logging.getLogger("rolecall.server")

POLL_SECONDS = 0.05
# A worker that dies sooner than this after its start, so many times in a row, will not recover.
SHORT_LIFE_SECONDS = 10.0
SHORT_LIVES = 5
GIVE_UP_CODE = 3
ROOT = Path(__file__).parent.parent


class ServerError(StartupError):
    """The address cannot be served; the message says what to do."""


def serve(
    *,
    bind: str,
    workers: int,
    app: str = "api.main:asgi",
    environment: Mapping[str, str] | None = None,
    config_path: Path | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    ``environment`` is added to the workers' own. ``on_ready`` is called with the URL once every
    worker has started. Raises ``ServerError`` where ``bind`` cannot be had.
    """
    with listen(bind) as listener:
        supervisor = Supervisor(
            listener, workers, app, dict(environment or {}), config_path or find_config()
        )
        return supervisor.run(lambda: on_ready(_url(listener)) if on_ready else None)


def listen(bind: str) -> socket.socket:
    """Return a listening socket for ``HOST:PORT``, ``[IPv6]:PORT`` or ``unix:PATH``."""
    try:
        if bind.startswith("unix:"):
            return _listen_unix(Path(bind.removeprefix("unix:")))
        host, _, port = bind.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=1024)
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerError(
            f"Cannot listen on {bind} ({reason}): stop what serves there, or choose another "
            "address with --bind or ROLECALL_BIND."
        ) from None


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError("another process serves there")
        path.unlink()
    listener.bind(str(path))
    listener.listen(1024)
    return listener


def find_config() -> Path | None:
    """Return hypercorn.toml, of this folder or of the project's."""
    return next((p for p in (Path("hypercorn.toml"), ROOT / "hypercorn.toml") if p.is_file()), None)


class Worker:
    """One process; ``ready`` once its application has started."""

    def __init__(self, command: list[str], environ: dict[str, str], fds: tuple[int, ...]) -> None:
        self.began = time.monotonic()
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self.process = subprocess.Popen(  # noqa: S603  ourselves, no shell
            [*command, str(write)], env=environ, pass_fds=(*fds, write), start_new_session=True
        )
        os.close(write)
        self.ready = False

    def look(self) -> int | None:
        """Notice that it is ready; return its exit code if it has ended."""
        if not self.ready:
            with contextlib.suppress(BlockingIOError):
                self.ready = bool(os.read(self._read, 1))
        return self.process.poll()

    def close(self) -> None:
        """Forget about a process that has ended."""
        os.close(self._read)


class Supervisor:
    """Starts workers, replaces those that die, and ends them all together."""

    def __init__(
        self,
        listener: socket.socket,
        count: int,
        app: str,
        environment: dict[str, str],
        config_path: Path | None,
    ) -> None:
        self._count = count
        # workers read the one end; the other closes when this process ends, in whatever way
        self._leash, self._hand = os.pipe()
        self._fds = (listener.fileno(), self._leash)
        self._grace = load_config(config_path).graceful_timeout
        details = [app, str(config_path or ""), str(listener.fileno()), str(self._leash)]
        self._command = [sys.executable, "-m", "api.server", json.dumps(details)]
        self._environ = os.environ | environment
        self._workers: list[Worker] = []
        self._stops = 0
        self._short_lives = 0

    def run(self, on_ready: Callable[[], None]) -> int:
        """Return 0 after a stop that was asked for, ``GIVE_UP_CODE`` where workers only die."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        code, said = 0, False
        self._workers = [self._start() for _ in range(self._count)]
        while not self._stops:
            if not self._replace_the_dead():
                code = GIVE_UP_CODE
                break
            if not said and all(worker.ready for worker in self._workers):
                said = True
                on_ready()
            time.sleep(POLL_SECONDS)
        self._end_all()
        return code

    def _start(self) -> Worker:
        return Worker(self._command, self._environ, self._fds)

    def _stop(self, *_: Any) -> None:
        self._stops += 1

    def _replace_the_dead(self) -> bool:
        for index, worker in enumerate(self._workers):
            code = worker.look()
            if code is None:
                continue
            worker.close()
            brief = time.monotonic() - worker.began < SHORT_LIFE_SECONDS
            self._short_lives = self._short_lives + 1 if brief else 0
            log.error("worker %d ended with code %d", worker.process.pid, code)
            if (code == GIVE_UP_CODE and not worker.ready) or self._short_lives >= SHORT_LIVES:
                self._workers.pop(index)
                return False
            time.sleep(min(1.0, 0.1 * self._short_lives))
            self._workers[index] = self._start()
        return True

    def _end_all(self) -> None:
        os.close(self._hand)
        for worker in self._workers:
            worker.process.terminate()
        # the workers' own limit, and a little for them to leave
        until = time.monotonic() + self._grace + 5
        while any(worker.process.poll() is None for worker in self._workers):
            if self._stops > 1 or time.monotonic() > until:
                for worker in self._workers:
                    worker.process.kill()
            time.sleep(POLL_SECONDS)
        for worker in self._workers:
            worker.close()


def load_config(path: Path | None) -> Config:
    """Return Hypercorn's configuration."""
    config = Config.from_toml(path) if path else Config()
    config.workers = 1
    return config


def work(details: str, ready: int) -> int:
    """Be a worker: serve ``app`` on the inherited socket until told to stop or left alone."""
    name, config_path, listener, leash = json.loads(details)
    config = load_config(Path(config_path) if config_path else None)
    config.bind = [f"fd://{listener}"]
    module, _, attribute = name.partition(":")
    try:
        app = getattr(importlib.import_module(module), attribute)
        _run(_serve(app, config, int(leash), ready), config.worker_class)
    except StartupError as error:
        print(f"rolecall: {error}", file=sys.stderr)  # noqa: T201  before there is a log
        return GIVE_UP_CODE
    return 0


def _run(main: Any, worker_class: str) -> None:
    if worker_class == "uvloop":
        with contextlib.suppress(ImportError):
            import uvloop

            uvloop.run(main)
            return
    asyncio.run(main)


async def _serve(app: Any, config: Config, leash: int, ready: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # the terminal's Ctrl-C is the supervisor's to answer
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_reader(leash, stop.set)
    refused: list[str] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await app(scope, receive, _telling(send, ready, refused))

    try:
        await hypercorn_serve(watched, config, shutdown_trigger=stop.wait, mode="asgi")
    except Exception:
        if refused:
            raise StartupError(refused[0]) from None
        raise
    finally:
        loop.remove_reader(leash)


def _telling(send: Any, ready: int, refused: list[str]) -> Any:
    async def telling(message: dict[str, Any]) -> None:
        if message["type"] == "lifespan.startup.complete":
            os.write(ready, b"1")
        elif message["type"] == "lifespan.startup.failed":
            refused.append(message.get("message") or "The application did not start.")
        await send(message)

    return telling


def _url(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], int(sys.argv[2])))
