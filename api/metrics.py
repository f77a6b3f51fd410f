"""Numbers for Prometheus, of all workers together.

prometheus-client keeps a process's numbers in files where ``PROMETHEUS_MULTIPROC_DIR`` is
set before it is first imported: ``rolecall serve`` sets it for its workers, and whoever is asked
adds the files up. Under another server, which sets none, a process tells of itself alone.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from api.errors import StartupError

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

REQUESTS = Counter("rolecall_requests", "Requests answered.", ("method", "route", "status"))
SECONDS = Histogram(
    "rolecall_request_seconds", "Seconds from a request's body to its answer.", ("route",),
    buckets=BUCKETS,
)  # fmt: skip

REFUSALS = Counter("rolecall_refusals", "Requests refused, by the answer's code.", ("code",))
CHECKS = Counter(
    "rolecall_blocklist_checks",
    "Lookups of what was taken back (one for all requests that came together), by who answered.",
    ("by",),
)
# The lowest of all workers: 0 where any of them asks the database.
REDIS_TRUSTED = Gauge(
    "rolecall_redis_trusted",
    "Whether requests ask Redis what was revoked (1) or the database (0).",
    multiprocess_mode="livemin",
)


def set_redis_trusted(*, trusted: bool) -> None:
    """Say whether requests of this process ask Redis."""
    REDIS_TRUSTED.set(int(trusted))


def count_request(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count one answer; ``route`` is the rule that matched, so that no client makes up a label."""
    _counter(method if method in METHODS else "other", route or "none", status).inc()
    _histogram(route or "none").observe(seconds)


def count_refusal(code: str) -> None:
    """Count one error; ``code`` is one of ours or of RFC 6749's."""
    REFUSALS.labels(code).inc()


def count_check(*, by_redis: bool) -> None:
    """Count one lookup: by the database means that Redis was cold."""
    _check(by_redis).inc()


@functools.cache
def _check(by_redis: bool) -> Counter:
    return CHECKS.labels("redis" if by_redis else "database")


@functools.cache
def _counter(method: str, route: str, status: int) -> Counter:
    return REQUESTS.labels(method, route, status)


@functools.cache
def _histogram(route: str) -> Histogram:
    return SECONDS.labels(route)


def exposition() -> bytes:
    """Return the numbers in Prometheus's text format. It reads files: not for the loop."""
    folder = os.environ.get(FOLDER)
    return generate_latest(_of(Path(folder)) if folder else REGISTRY)


@contextmanager
def shared_folder(data_dir: Path) -> Iterator[Path]:
    """Make the folder that the workers of this process share, empty; remove it at the end."""
    for left in data_dir.glob("metrics.*"):
        pid = left.suffix.removeprefix(".")
        # kill -9 leaves the folder behind; in a container the next process has the same number
        if pid.isdecimal() and not _is_another(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = data_dir / f"metrics.{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def served(bind: str | None, folder: Path) -> Iterator[None]:
    """Serve the numbers in ``folder`` on an address of their own, if there is one.

    Raises ``StartupError`` where it cannot be had.
    """
    if bind is None:
        yield
        return
    host, _, port = bind.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), _of(folder))
    except OSError as error:
        raise StartupError(
            f"Cannot serve metrics on {bind} ({error.strerror or error}): "
            "choose another ROLECALL_METRICS_BIND."
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def forget_worker(pid: int, folder: str | None) -> None:
    """Remove the gauges of a worker that has ended: they are about workers that run."""
    if folder is not None:
        mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]


def _of(folder: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return registry


def _is_another(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
