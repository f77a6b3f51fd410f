"""The Redis side: keys, the shared lookup, time limits, the breaker.

Redis is *warm* while its epoch, a lease that names the server's ``run_id``, is there and names
the server at the other end of our connection. Everything else is *cold*: ``Cold`` is raised, and
the caller asks the ledger.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import orjson
import structlog
from redis import asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from api.blocklist.ledger import Entry, Subject
from api.line import Line, Script

log = structlog.get_logger("rolecall.blocklist")

LIMIT_SECONDS = 0.1
BULK_SECONDS = 5.0
# Redis does nothing else meanwhile: about two milliseconds.
ENTRIES_AT_ONCE = 1_000
LEASE_SECONDS = 1.5
# For a free connection; whoever waits has a limit of its own around it.
QUEUE_SECONDS = 1.0
# A key outlives its token by this much, whatever the clocks of Redis and the workers say.
MARGIN_SECONDS = 60
MARK = b"1"
FOR_EVER = -1  # what PTTL says of a key that does not expire
PREFIXES = {"jti": "j:", "sid": "s:", "sub": "u:"}
# Extends the lease only while what it rests on is there: a FLUSHALL in between took that too. And
# by Redis's own clock, from before the ledger was read: a server that hung finds the command when
# it goes on, long after whoever sent it gave up.
LEASE = Script("""
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) >= tonumber(ARGV[2]) then return 0 end
local ground = redis.pcall('GET', KEYS[3])
if type(ground) ~= 'string' or string.sub(ground, 1, #ARGV[4]) ~= ARGV[4] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PXAT', ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
return 1
""")
# MGET answers nil for a key that holds no string: how many there are of whatever kind goes last.
LOOK_UP = Script("""
local found = redis.call('MGET', unpack(KEYS))
found[#KEYS + 1] = redis.call('EXISTS', unpack(KEYS))
return found
""")
# Many entries in one argument: redis-py takes longer to pack three thousand. Two revocations
# published out of order must not lower a floor, nor shorten the life of a key; garbage is
# overwritten.
WRITE = """
for _, entry in ipairs(cjson.decode(ARGV[1])) do
  local key, floor, left = unpack(entry)
  local old = redis.pcall('GET', key)
  old = type(old) == 'string' and tonumber(old) or nil
  if floor == 0 then floor = 1 end
  if old then
    floor = math.max(floor, old)
    left = math.max(left, redis.call('PTTL', key))
  end
  redis.call('SET', key, string.format('%d', floor), 'PX', left)
end
return 1
"""


class Cold(Exception):
    """Redis cannot be trusted to tell; the reason is for the log, and for whoever may ask."""


# The first that fits.
WORDS: tuple[tuple[str, tuple[type[Exception], ...]], ...] = (
    ("timeout", (TimeoutError, RedisTimeout)),
    ("not let in", (AuthenticationError, NoPermissionError)),
    ("loading", (BusyLoadingError,)),
    ("read-only", (ReadOnlyError,)),
    ("out of memory", (OutOfMemoryError,)),
    ("no connection", (RedisConnectionError, OSError)),
)


def in_words(error: Exception) -> str:
    """Return what ails Redis in words of ours, which name no class and no address."""
    if isinstance(error, Cold):
        return str(error)
    return next((words for words, kinds in WORDS if isinstance(error, kinds)), "error")


@dataclass(slots=True)
class Server:
    """What the connection learnt of the server at its other end."""

    run_id: str = ""
    may_evict: bool = False


class Index:
    """The entries of the ledger as Redis keys. All times are limited; nothing is retried."""

    def __init__(self, url: str, prefix: str) -> None:
        self._prefix = prefix
        self._epoch, self._base = f"{prefix}epoch", f"{prefix}base"
        self._turn = f"{prefix}rebuild"
        self._server = Server()
        self._open = False
        self.reason: str | None = "starting"
        # one connection, so that the server it learnt of is the server that answers
        self._line = Line(url, LIMIT_SECONDS, self._on_connect)
        self._bulk = client(url, BULK_SECONDS, 8)
        self._entries = self._bulk.register_script(WRITE)

    async def _on_connect(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO")
        info = _info(await connection.read_response())
        evicts = info.get("maxmemory", "0") != "0" and info.get("maxmemory_policy") != "noeviction"
        self._server = Server(info.get("run_id", ""), evicts)
        if evicts:
            log.error(
                "redis_may_evict",
                policy=info.get("maxmemory_policy"),
                advice="set maxmemory-policy noeviction: until then the database answers",
            )

    async def look_up(self, subjects: Sequence[Subject]) -> list[bytes | None]:
        """Return the values of ``subjects`` in their order. Raises ``Cold``."""
        if not self._open:
            raise Cold(self.reason or "closed")
        keys = [self._epoch, *map(self._key, subjects)]
        try:
            values: list[bytes | None]
            *values, present = await self._line.run(LOOK_UP, keys)
        except Exception as error:
            self.fail(error)
            raise Cold(self.reason) from error
        self._refuse_untrusted(values[0])
        if present != sum(value is not None for value in values):
            log.error("garbage_in_redis", keys=len(keys))
            raise Cold("garbage")
        return values[1:]

    def _refuse_untrusted(self, epoch: bytes | None) -> None:
        if self._server.may_evict:
            self.close("may evict")
            raise Cold("may evict")
        if epoch is None or epoch != self._server.run_id.encode():
            self.close("no epoch" if epoch is None else "another server's epoch")
            raise Cold(self.reason)

    def fail(self, error: Exception) -> None:
        """Close for what was raised; the log has the name of it too."""
        self.close(in_words(error), error=type(error).__name__)

    def close(self, reason: str, **said: str) -> None:
        """Stop asking Redis until the reconciler has opened it again."""
        if self._open:
            log.warning("redis_cold", reason=reason, **said)
        self._open, self.reason = False, reason

    def open(self) -> None:
        """Ask Redis again: the reconciler has seen it take and keep the newest rows."""
        if not self._open:
            log.info("redis_warm")
        self._open, self.reason = True, None

    @property
    def is_open(self) -> bool:
        """Whether requests ask Redis."""
        return self._open

    async def server(self) -> tuple[str, int]:
        """Return the run id of the server at the other end, and its clock in milliseconds.

        Raises what redis-py raises.
        """
        seconds, microseconds = await self._line.ask("TIME")
        if self._server.may_evict:
            self._server = Server()
            await self._line.hang_up()
            raise Cold("may evict")
        return self._server.run_id, int(seconds) * 1000 + int(microseconds) // 1000

    async def complete_until(self, run_id: str) -> int | None:
        """Return until when (by the database's clock, in seconds) all rows are in this Redis.

        None where the whole ledger was never loaded into the server ``run_id``.
        """
        value: bytes | None = (await self._line.ask("MGET", self._base))[0]
        name, _, until = (value or b"").partition(b" ")
        return int(until) if name == run_id.encode() and until.isdigit() else None

    async def lease(self, run_id: str, since: int, until: int, *, turn: str = "") -> bool:
        """Write the epoch, and that all rows recorded before ``until`` are here.

        It stands for ``LEASE_SECONDS`` from ``since``, Redis's clock before the ledger was read.
        False where that is over, or the base that this rests on (``turn``: the worker's turn to
        rebuild) is gone.
        """
        ground = (self._turn, turn) if turn else (self._base, f"{run_id} ")
        done = await self._line.run(
            LEASE,
            [self._epoch, self._base, ground[0]],
            *(run_id, since + int(LEASE_SECONDS * 1000), f"{run_id} {until}", ground[1]),
        )
        return bool(done)

    async def lease_left(self) -> float:
        """Return for how many more seconds the epoch stands."""
        return float(max(0, await self._line.ask("PTTL", self._epoch)) / 1000)

    async def forget(self) -> None:
        """Go cold in every worker, and drop what is under our keys and not of our making.

        Every key of ours is a string that expires; one of another kind stays wrong for ever.
        """
        self.close("rebuild")
        await self._line.ask("DEL", self._epoch, self._base)
        for prefix in PREFIXES.values():
            async for key in self._bulk.scan_iter(f"{self._prefix}{prefix}*", count=1_000):
                async with asyncio.timeout(BULK_SECONDS):
                    pipeline = self._bulk.pipeline(transaction=False)
                    pipeline.type(key)
                    pipeline.pttl(key)
                    kind, left = await pipeline.execute()
                    if kind != b"string" or left == FOR_EVER:
                        await self._bulk.unlink(key)

    async def publish(self, entries: Sequence[Entry]) -> None:
        """Write a few entries within the limit."""
        async with asyncio.timeout(LIMIT_SECONDS):
            await self._write(entries)

    async def load(self, entries: Sequence[Entry]) -> None:
        """Write a batch of many entries."""
        async with asyncio.timeout(BULK_SECONDS):
            await self._write(entries)

    async def _write(self, entries: Sequence[Entry]) -> None:
        now = time.time()
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            values = [
                (
                    f"{self._prefix}{PREFIXES[entry.kind]}{entry.subject}",
                    entry.floor,
                    max(1, int((entry.expires_at - now + MARGIN_SECONDS) * 1000)),
                )
                for entry in entries[start : start + ENTRIES_AT_ONCE]
            ]
            await self._entries(args=[orjson.dumps(values)])

    async def take_turn(self, name: str, seconds: float) -> bool:
        """Return whether this worker is the one that rebuilds."""
        if await self._line.ask("SET", self._turn, name, "PX", int(seconds * 1000), "NX"):
            return True
        (holder,) = await self._line.ask("MGET", self._turn)
        if holder is None:
            # not a string, so not one of ours
            await self._line.ask("DEL", self._turn)
        return False

    async def keep_turn(self, name: str, seconds: float) -> bool:
        """Return whether the turn is still this worker's, for another ``seconds``."""
        (holder,) = await self._line.ask("MGET", self._turn)
        if holder != name.encode():
            return False
        return bool(await self._line.ask("PEXPIRE", self._turn, int(seconds * 1000)))

    async def end_turn(self) -> None:
        """Let another worker rebuild, should it need to."""
        await self._line.ask("DEL", self._turn)

    async def aclose(self) -> None:
        """Close the connections."""
        self._open, self.reason = False, "stopped"
        await self._line.hang_up()
        await self._bulk.aclose()

    def _key(self, subject: Subject) -> str:
        kind, name = subject
        return f"{self._prefix}{PREFIXES[kind]}{name}"


def client(url: str, seconds: float, connections: int) -> aioredis.Redis:
    """Return a client that waits ``seconds`` at most for anything and retries nothing."""
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=QUEUE_SECONDS,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        retry=Retry(NoBackoff(), 0),
    )
    return aioredis.Redis.from_pool(pool)


def floor_of(value: bytes) -> int | None:
    """Return a floor as it was read, None where it is garbage."""
    return int(value) if value.isdigit() and len(value) < 19 else None


def _info(raw: bytes | str) -> Mapping[str, str]:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    pairs: Iterable[list[str]] = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}
