"""``rolecall serve``: a supervisor that binds the address and keeps Hypercorn workers alive.

Hypercorn's own master exits 0 when a worker is killed, and leaves orphans when it is killed itself.
Here a worker that dies is replaced, and all die with the supervisor, kill -9 included.
A worker's standard input is a socket to the supervisor, on which it says that it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib
import json
import logging
import os
import signal
import socket
import ssl
import sys
import time
import tomllib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config

from api import heads, idle, metrics, wire
from api.embedded import tied
from api.errors import StartupError
from api.tracebacks import plain_traceback

log = logging.getLogger("rolecall.server")

ROOT = Path(__file__).parent.parent
# What hypercorn.toml says, for where there is none; the reasons are there.
SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "worker_class": "uvloop",
        "backlog": 1024,
        "graceful_timeout": 15,
        "startup_timeout": 60,
        "shutdown_timeout": 10,
        "keep_alive_timeout": 15,
        "keep_alive_max_requests": 100_000,
        "h11_max_incomplete_size": 16_384,
        "h2_max_concurrent_streams": 100,
        "include_server_header": False,
    }
)
# So many starts in a row that came to nothing, with no worker left that serves, end the service.
FAILED_STARTS = 5
HIGHEST_PORT = 65_535
DEATHS_REMEMBERED_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 5.0
MARGIN_SECONDS = 5.0
START_FAILED = 3  # a worker's exit code; it has said why

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class ServerError(StartupError):
    """The address cannot be served, or hypercorn.toml be read; the message says what to do."""


def serve(
    *,
    bind: str,
    workers: int,
    app: str = "api.main:asgi",
    environment: Mapping[str, str] = MappingProxyType({}),
    config_path: Path | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; return the exit code.

    0: stopped as asked, every request in flight answered or past ``graceful_timeout``. 1: the
    workers only die (the reason is logged), or one had to be killed. 130: a second SIGINT.
    ``environment`` is added to the workers' own. ``on_ready`` is called once, with the URL, when
    every worker has started. Call it from the main thread. Raises ``ServerError``.
    """
    path = config_path or find_config()
    config = load_config(path)
    with contextlib.closing(listen(bind, config.backlog)) as listener:
        job = Job(app, listener.fileno(), str(path) if path else None)
        url = _url(listener, secure=config.ssl_enabled)
        patience = config.graceful_timeout + config.shutdown_timeout + MARGIN_SECONDS
        supervisor = Supervisor(job, listener, workers, dict(environment), patience)
        try:
            return asyncio.run(supervisor.run(lambda: on_ready(url) if on_ready else None))
        finally:
            if bind.startswith("unix:"):
                Path(bind.removeprefix("unix:")).unlink(missing_ok=True)


# --- The address and the settings ---


def listen(bind: str, backlog: int = 1024) -> socket.socket:
    """Return a socket that listens on ``HOST:PORT``, ``[IPv6]:PORT`` or ``unix:PATH``.

    One socket is shared by all workers: a connection that waits is not lost with a worker, as it
    would be with SO_REUSEPORT. Raises ``ServerError``.
    """
    try:
        if bind.startswith("unix:"):
            return _listen_unix(Path(bind.removeprefix("unix:")), backlog)
        host, _, port = bind.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if not 0 <= int(port) <= HIGHEST_PORT:  # create_server would leak its socket
            raise ValueError(port)
        return idle.limited(socket.create_server((host, int(port)), family=family, backlog=backlog))
    except (OSError, ValueError) as error:
        raise ServerError(_why_not(bind, error)) from None


def _listen_unix(path: Path, backlog: int) -> socket.socket:
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(errno.EADDRINUSE, "")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _why_not(bind: str, error: Exception) -> str:
    elsewhere = "choose another address with --bind or ROLECALL_BIND"
    if isinstance(error, socket.gaierror) or not isinstance(error, OSError):
        return f"{bind} is no address: give HOST:PORT, [IPv6]:PORT or unix:PATH as --bind."
    if error.errno == errno.EADDRINUSE:
        return f"{bind} is taken by another program: stop it, or {elsewhere}."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"This user may not listen on {bind}: take a port above 1023, or {elsewhere}."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{bind} is no address of this machine: {elsewhere}."
    return f"Cannot listen on {bind} ({error.strerror or error}): {elsewhere}."


def _url(listener: socket.socket, *, secure: bool) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{host}:{port}"


def find_config() -> Path | None:
    """Return the hypercorn.toml of this folder, else of the project's, else None."""
    places = (Path.cwd() / "hypercorn.toml", ROOT / "hypercorn.toml")
    return next((path for path in places if path.is_file()), None)


def load_config(path: Path | None) -> Config:
    """Return ``SETTINGS`` with those of ``path`` over them. Raises ``ServerError``."""
    try:
        told = tomllib.loads(path.read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise ServerError(f"{path} cannot be read: {error}.") from None
    unknown = [name for name in told if not hasattr(Config, name)]
    if unknown:
        raise ServerError(f"{path} has settings that Hypercorn does not know: {unknown}.")
    config = heads.Dated.from_mapping({**SETTINGS, **told})
    config.workers = 1  # to Hypercorn, each worker is alone
    if config.errorlog == "-":
        # its own handler would print every line a second time
        config.errorlog = logging.getLogger("hypercorn.error")
        config.errorlog.setLevel(logging.WARNING)
    return config


# --- The supervisor ---


@dataclass(frozen=True)
class Job:
    """What a worker is told: what to serve, on which inherited socket, with which settings."""

    app: str
    listener: int
    config_path: str | None


@dataclass(eq=False)
class Worker:
    """One process, and our end of the line to it; ``ready`` once it serves."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: bool = False


class Supervisor:
    """Starts workers, replaces those that die, and ends them all together."""

    def __init__(
        self,
        job: Job,
        listener: socket.socket,
        count: int,
        environment: Mapping[str, str],
        patience: float,
    ) -> None:
        self._job = job
        self._listener = listener
        self._count = count
        self._environment = {**os.environ, **environment, "PYTHONPATH": _import_path()}
        self._patience = patience
        self._workers: set[Worker] = set()
        self._failed_starts = 0
        self._deaths: deque[float] = deque(maxlen=16)
        self._proven = asyncio.Event()
        self._told = asyncio.Event()
        self._at_once = asyncio.Event()
        self._on_ready: Callable[[], None] | None = None

    async def run(self, on_ready: Callable[[], None]) -> int:
        """Keep the workers up until told to stop, or until that is hopeless."""
        self._on_ready = on_ready
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                loop.add_signal_handler(number, self._hear, number)
        keeping = asyncio.create_task(self._keep_all())
        await _first(keeping, asyncio.create_task(self._told.wait()))
        hopeless = keeping.done()
        await _cancel(keeping)
        # or those who connect now would wait for nobody
        self._listener.close()
        stopped = await self._end_workers()
        if hopeless:
            keeping.result()
        if self._at_once.is_set():
            return 128 + signal.SIGINT
        return 1 if hopeless or not stopped else 0

    def _hear(self, number: int) -> None:
        if number == signal.SIGINT and self._told.is_set():
            self._at_once.set()
        self._told.set()

    async def _keep_all(self) -> None:
        """Return when it is hopeless. The first worker shows that the application starts at all."""
        keepers = [asyncio.create_task(self._keep())]
        try:
            await _first(*keepers, asyncio.create_task(self._proven.wait()))
            if self._proven.is_set():
                keepers += [asyncio.create_task(self._keep()) for _ in range(self._count - 1)]
            await _first(*keepers)
            for keeper in keepers:
                if keeper.done():
                    keeper.result()
        finally:
            await _cancel(*keepers)

    async def _keep(self) -> None:
        """Keep one worker up; return when that is hopeless."""
        while True:
            worker = await self._start()
            worker.ready = bool(await worker.reader.read(1))
            if worker.ready:
                self._note_ready()
            code = await worker.process.wait()
            self._workers.discard(worker)
            worker.writer.close()
            metrics.forget_worker(worker.process.pid, self._environment.get(metrics.FOLDER))
            if self._is_hopeless(worker, code):
                return
            pause = self._pause()
            log.error("a worker ended (%s); another starts in %.1f s", _ending(code), pause)
            await asyncio.sleep(pause)

    async def _start(self) -> Worker:
        command = [sys.executable, "-P", "-m", "api.server", json.dumps(asdict(self._job))]
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *tied(command),
                stdin=theirs.fileno(),
                env=self._environment,
                pass_fds=(self._listener.fileno(),),
                # Ctrl-C goes to the whole group: it is for us to answer
                process_group=0,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = Worker(process, reader, writer)
        self._workers.add(worker)
        return worker

    def _note_ready(self) -> None:
        self._failed_starts = 0
        self._proven.set()
        ready = sum(worker.ready for worker in self._workers)
        if self._on_ready is not None and ready == self._count:
            self._on_ready()
            self._on_ready = None

    def _is_hopeless(self, worker: Worker, code: int) -> bool:
        if worker.ready:
            return False
        self._failed_starts += 1
        if not self._proven.is_set():
            if code != START_FAILED:
                log.error("the first worker ended before it was ready (%s)", _ending(code))
            return True
        return self._failed_starts >= FAILED_STARTS and not any(w.ready for w in self._workers)

    def _pause(self) -> float:
        """Return seconds to wait before the next start, longer with every recent death."""
        now = time.monotonic()
        recent = sum(now - death < DEATHS_REMEMBERED_SECONDS for death in self._deaths)
        self._deaths.append(now)
        return min(LONGEST_PAUSE_SECONDS, 0.1 * ((1 << recent) - 1))

    async def _end_workers(self) -> bool:
        """Return whether all ended by themselves when told to."""
        ends = [asyncio.create_task(worker.process.wait()) for worker in self._workers]
        self._signal(signal.SIGTERM)
        ended = asyncio.gather(*ends)
        await _first(ended, asyncio.create_task(self._at_once.wait()), timeout=self._patience)
        stopped = all(end.done() for end in ends)
        if not stopped:
            log.error("workers had to be killed")
            self._signal(signal.SIGKILL)
        await ended
        for worker in self._workers:
            worker.writer.close()
        return stopped

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(number)


def _import_path() -> str:
    # exactly ours, and -P: a folder named api where the user happens to stand must not be imported
    return os.pathsep.join(path or str(Path.cwd()) for path in sys.path)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


async def _first(*tasks: asyncio.Future[Any], timeout: float | None = None) -> None:  # noqa: ASYNC109  asyncio.wait has the same
    """Wait for the first of ``tasks``; the last, which waits for an event, is not left behind."""
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    if (last := tasks[-1]) is not tasks[0] and not last.done():
        last.cancel()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- A worker ---


class Strict:
    """An application whose lifespan must succeed, and say why where it does not.

    Hypercorn goes on without a lifespan that raises, as if there were none. The lifespan is not
    told to end before ``last_requests`` has returned.
    """

    app: Application
    last_requests: Callable[[], Awaitable[None]]

    def __init__(self) -> None:
        self.started = False
        self.failure: str | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: Message, receive: Receive, send: Send) -> None:
        async def told() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.last_requests()
            return message

        async def watched(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.started = True
            elif message["type"] == "lifespan.startup.failed":
                raise StartupError(message.get("message") or "it does not say why")
            await send(message)

        try:
            await self.app(scope, told, watched)
        except Exception as error:
            if self.started:
                raise
            self.failure = _one_line(error)
            await send({"type": "lifespan.startup.failed", "message": self.failure})


def work(job: Job) -> int:
    """Be a worker: serve on the inherited socket until SIGTERM; return the exit code."""
    strict = Strict()
    try:
        config = load_config(Path(job.config_path) if job.config_path else None)
        config.bind = [f"fd://{job.listener}"]
        strict.app = _load(job.app)
        _run(_serve(strict, config), config.worker_class)
    except Exception as error:  # noqa: BLE001  whatever it is, it is logged and the exit code
        if strict.started:
            log.error("The application did not end well\n%s", plain_traceback(error))  # noqa: TRY400
            return 1
        reason = strict.failure or _one_line(error)
        log.error("The application does not start: %s", reason)  # noqa: TRY400  one line
        log.debug("where it failed\n%s", plain_traceback(error))
        return START_FAILED
    return 0


def _load(name: str) -> Application:
    module, _, attribute = name.partition(":")
    found: Application = getattr(importlib.import_module(module), attribute)
    return found


def _run(main: Coroutine[Any, Any, None], worker_class: str) -> None:
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if worker_class == "uvloop":
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.get_loop().set_exception_handler(_unless_theirs)
        runner.run(main)


async def _serve(app: Strict, config: Config) -> None:
    told = asyncio.Event()

    async def until_told() -> None:
        # Hypercorn waits for this once it serves; before, SIGTERM ends the process at once
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        os.write(sys.stdin.fileno(), b"1")
        await told.wait()

    wire.install()
    latecomers = idle.install()
    app.last_requests = functools.partial(latecomers.ended, config.shutdown_timeout / 2)
    application: Any = app  # Hypercorn's type for it is closed
    await hypercorn_serve(application, config, shutdown_trigger=until_told, mode="asgi")


def _unless_theirs(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # what scanners send to a TLS port is no error of ours, nor is a client that reads nothing, nor
    # what a stop cuts off
    error = context.get("exception")
    if isinstance(error, ssl.SSLError | TimeoutError | asyncio.CancelledError):
        return
    # asyncio's own handler logs the arguments of callbacks too, and leaves the traceback to the
    # formatter that is set up
    said = context.get("message") or "Unhandled exception on the event loop"
    log.error("%s%s", said, f"\n{plain_traceback(error)}" if error else "")


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split()) or "it does not say why"
    return said if isinstance(error, StartupError) else f"{type(error).__name__}: {said}"


if __name__ == "__main__":
    sys.exit(work(Job(**json.loads(sys.argv[1]))))
