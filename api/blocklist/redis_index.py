"""The Redis side: the ledger's rows as one hash, the shared look-up, time limits, the breaker.

One hash holds every entry and, beside them, the *epoch*: a lease that names the server by its
``run_id``. Redis loses a key whole or not at all: whatever evicts, deletes or replaces the entries
takes the epoch along. Redis is trusted while the epoch stands and names the server at the other
end of our connection. Everything else raises ``RedisUntrusted``, and the caller asks the ledger.
"""

from __future__ import annotations

import asyncio
import secrets
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
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from api import metrics
from api.blocklist.ledger import Entry, Found, Key, key_of
from api.line import Line, Script

log = structlog.get_logger("rolecall.blocklist")

LIMIT_SECONDS = 0.1
# For many entries at once.
BULK_SECONDS = 1.0
# The script blocks Redis for about a millisecond.
ENTRIES_AT_ONCE = 500
# How many entries are looked at for removal at once.
SWEPT_AT_ONCE = 500
LEASE_SECONDS = 1.5
# For a free connection; whoever waits has a limit of its own around it.
QUEUE_SECONDS = 1.0
# An entry outlives its token by this much, whatever the clocks of Redis and the workers say.
MARGIN_SECONDS = 60
# Fields of the hash beside the entries, whose names have a colon.
BUILD, SNAPSHOT, HIGHEST = "build", "snapshot", "highest"
UNEXPECTED = "unexpected data"

# Extends the lease only of the hash that was looked at before: an older copy, of a replica or a
# file, lacks this worker's mark. By Redis's own clock, from before the ledger was read: a server
# that hung may run the command after the sender timed out. Nobody shortens another's lease, unless
# it was written before that clock was set back.
LEASE = Script("""
local time = redis.call('TIME')
local till = tonumber(ARGV[2])
if time[1] * 1000 + math.floor(time[2] / 1000) >= till then return 0 end
local found = redis.pcall('HMGET', KEYS[1], 'build', ARGV[5], 'epoch')
if found[1] ~= ARGV[3] or found[2] ~= ARGV[6] then return 0 end
local name, other = string.match(found[3] or '', '^(%w+) (%d+)$')
local before = name == ARGV[1] and tonumber(other) or 0
if before < tonumber(ARGV[7]) then return 0 end
-- one that ends more than a minute later was written before the clock was set back: it is replaced
if before < till + 60000 then till = math.max(till, before) end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1] .. ' ' .. string.format('%.0f', till),
  'snapshot', ARGV[4])
return till
""")
# The clock, the epoch and the entries; in slices, for Lua's unpack takes some 8,000 values.
LOOK_UP = Script("""
local time = redis.call('TIME')
local found = {time[1] * 1000 + math.floor(time[2] / 1000), redis.call('HGET', KEYS[1], 'epoch')}
for first = 1, #ARGV, 4000 do
  local last = math.min(first + 3999, #ARGV)
  for _, value in ipairs(redis.call('HMGET', KEYS[1], unpack(ARGV, first, last))) do
    found[#found + 1] = value
  end
end
return found
""")
# Many entries in one argument: redis-py takes longer to pack three thousand. Two revocations
# published out of order must not lower a floor, nor shorten the life of an entry; what is not ours
# is overwritten.
WRITE = Script("""
local highest = tonumber(redis.call('HGET', KEYS[1], 'highest')) or 0
for _, entry in ipairs(cjson.decode(ARGV[1])) do
  local field, floor, expires, exempt = unpack(entry)
  local old = redis.call('HGET', KEYS[1], field)
  if old then
    local had, till, exempted = string.match(old, '^(%d+) (%d+) ?(.*)$')
    if had then
      if tonumber(had) >= floor then floor, exempt = tonumber(had), exempted end
      expires = math.max(expires, tonumber(till))
    end
  end
  local value = string.format('%.0f %.0f', floor, expires)
  if exempt ~= '' then value = value .. ' ' .. exempt end
  redis.call('HSET', KEYS[1], field, value)
  highest = math.max(highest, floor)
end
redis.call('HSET', KEYS[1], 'highest', string.format('%.0f', highest))
return 1
""")
# Looks again at what was read a moment ago: it may have been written anew.
SWEEP = Script("""
local now = tonumber(redis.call('TIME')[1])
if math.abs(now - tonumber(ARGV[1])) > tonumber(ARGV[2]) then return 0 end
local removed = 0
for n = 3, #ARGV do
  local value = redis.call('HGET', KEYS[1], ARGV[n])
  local till = value and string.match(value, '^%d+ (%d+)')
  if till and tonumber(till) < now then
    removed = removed + redis.call('HDEL', KEYS[1], ARGV[n])
  end
end
return removed
""")
# Marks the hash complete if it is still the one that this build created.
END_BUILD = Script("""
if redis.call('HGET', KEYS[1], 'building') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'building')
redis.call('HSET', KEYS[1], 'build', ARGV[1], 'snapshot', ARGV[2])
return 1
""")


class RedisUntrusted(Exception):
    """Redis cannot be trusted to know everything; the reason is for the log and for readiness."""


# The first that fits.
REASONS: tuple[tuple[str, tuple[type[Exception], ...]], ...] = (
    ("timeout", (TimeoutError, RedisTimeout)),
    ("authentication failed", (AuthenticationError, NoPermissionError)),
    ("loading", (BusyLoadingError,)),
    ("read-only", (ReadOnlyError,)),
    ("out of memory", (OutOfMemoryError,)),
    ("no connection", (RedisConnectionError, OSError)),
)


def reason_of(error: Exception) -> str:
    """Return what is wrong with Redis in our own words, which name no class and no address."""
    if isinstance(error, RedisUntrusted):
        return str(error)
    if isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE"):
        return UNEXPECTED
    return next((words for words, kinds in REASONS if isinstance(error, kinds)), "error")


@dataclass(frozen=True, slots=True)
class ServerState:
    """What Redis says of itself and of our hash.

    ``now`` is its clock in milliseconds, ``build`` names the hash (another one after each rebuild)
    and is None where it is not complete. Every transaction in ``snapshot`` is in it; an older copy
    of the hash has an older snapshot. ``mark`` was written into it before the rest was read.
    ``highest`` the highest floor in it. ``evicts`` is the policy by which keys may be evicted.
    """

    run_id: str
    now: int
    evicts: str | None
    build: str | None
    snapshot: str | None
    highest: int
    mark: str


class RedisIndex:
    """The ledger's rows in Redis. Every wait has a limit; nothing is retried."""

    def __init__(self, url: str, prefix: str) -> None:
        self._key = f"{prefix}revocations"
        self._rebuild_lock = f"{prefix}rebuild"
        self._mark = f"mark:{secrets.token_hex(4)}"
        self._evicts: str | None = None
        # the latest end of a lease that was seen, of the server of that run id
        self._latest: tuple[str | None, int] = (None, 0)
        self._cursor = 0
        # whether the hash holds unexpected data, and which one that is: it is built anew then
        self._is_corrupt = False
        self._corrupt_build: str | None = None
        # of the server at the other end of the connection, None before the first
        self.run_id: str | None = None
        self._open = False
        self.reason: str | None = "starting"
        # one connection, so that the server it learnt of is the server that answers
        self._line = Line(url, LIMIT_SECONDS, self._on_connect)
        metrics.set_redis_trusted(trusted=False)

    async def _on_connect(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        self.run_id = _info(await connection.read_response()).get("run_id")

    async def look_up(self, keys: Sequence[Key]) -> dict[Key, Found]:
        """Return what is known of each of ``keys`` that has an entry.

        Raises ``RedisUntrusted``.
        """
        if not self._open:
            raise RedisUntrusted(self.reason or "closed")
        try:
            now, epoch, *values = await self._line.run(LOOK_UP, [self._key], *keys)
        except Exception as error:
            self.fail(error)
            raise RedisUntrusted(self.reason) from error
        self._ensure_trusted(now, epoch)
        present = ((key, value) for key, value in zip(keys, values, strict=True) if value)
        return {key: self._read(value) for key, value in present}

    def _ensure_trusted(self, now: int, epoch: bytes | None) -> None:
        if epoch is None:
            self.close("no epoch")
            raise RedisUntrusted(self.reason)
        name, _, until = epoch.decode(errors="replace").partition(" ")
        if name != self.run_id or not _is_number(until):
            self.close("another server's epoch")
            raise RedisUntrusted(self.reason)
        if now >= int(until):
            self.close("the lease has ended")
            raise RedisUntrusted(self.reason)
        if self._latest[0] == name and int(until) < self._latest[1]:
            # an older copy, or a lease that was replaced: the next pass looks into it
            self.close("the lease went back")
            raise RedisUntrusted(self.reason)
        self._latest = (name, int(until))

    def _read(self, value: bytes) -> Found:
        floor, _, rest = value.decode(errors="replace").partition(" ")
        expires, _, exempt = rest.partition(" ")
        if not (_is_number(floor) and _is_number(expires)):
            self.close(UNEXPECTED)
            raise RedisUntrusted(self.reason)
        return Found(int(floor), exempt or None)

    def fail(self, error: Exception) -> None:
        """Close for what was raised; the log has its name too."""
        self.close(reason_of(error), error=type(error).__name__)

    def close(self, reason: str, **details: str) -> None:
        """Stop asking Redis until the reconciler has opened the index again."""
        if self._open or self.reason != reason:
            log.warning("redis_untrusted", reason=reason, **details)
        self._open, self.reason = False, reason
        if reason == UNEXPECTED:
            self._is_corrupt = True
        metrics.set_redis_trusted(trusted=False)

    def stop(self) -> None:
        """Stop asking Redis, for good."""
        self._open, self.reason = False, "stopped"

    def open(self) -> None:
        """Ask Redis again: the reconciler has seen it take and keep the newest rows."""
        if not self._open:
            log.info("redis_trusted")
        self._open, self.reason = True, None
        metrics.set_redis_trusted(trusted=True)

    @property
    def is_open(self) -> bool:
        """Whether requests ask Redis."""
        return self._open

    async def state(self) -> ServerState:
        """Return how Redis and our hash stand. Raises what redis-py raises.

        Raises ``RedisUntrusted`` where the connection changed servers in between.
        """
        info = _info(await self._line.ask("INFO"))
        run_id = self.run_id or ""
        seconds, microseconds = await self._line.ask("TIME")
        evicts = None
        if info.get("maxmemory", "0") != "0" and info.get("maxmemory_policy") != "noeviction":
            evicts = info.get("maxmemory_policy")
        if evicts is not None and evicts != self._evicts:
            log.error(
                "redis_may_evict",
                policy=evicts,
                advice="set maxmemory-policy noeviction: until then the database answers",
            )
        self._evicts = evicts
        mark = secrets.token_hex(8)
        try:
            await self._line.ask("HSET", self._key, self._mark, mark)
            build, snapshot, highest = (
                value.decode(errors="replace") if value is not None else None
                for value in await self._line.ask("HMGET", self._key, BUILD, SNAPSHOT, HIGHEST)
            )
        except ResponseError as error:
            if reason_of(error) != UNEXPECTED:
                raise
            build = snapshot = highest = None  # not a hash, so not ours
        if self.run_id != run_id:
            raise RedisUntrusted("another server")
        if self._is_corrupt and self._corrupt_build not in {None, build}:
            self._is_corrupt = False  # another worker has built it anew
        self._corrupt_build = build if self._is_corrupt else None
        return ServerState(
            run_id=run_id,
            now=int(seconds) * 1000 + int(microseconds) // 1000,
            evicts=evicts,
            build=None if self._is_corrupt else build,
            snapshot=snapshot,
            highest=int(highest) if highest is not None and _is_number(highest) else 0,
            mark=mark,
        )

    async def lease(self, state: ServerState, snapshot: str, *, extend_only: bool = False) -> bool:
        """Write the epoch, and that every transaction in ``snapshot`` is in the hash of ``state``.

        It stands for ``LEASE_SECONDS`` from that moment. False where that is over, or the hash is
        another, or an older copy of it. With ``extend_only`` also where the epoch that was seen
        last is not there any more.
        """
        seen = self._latest[1] if extend_only and self._latest[0] == state.run_id else 0
        until = state.now + int(LEASE_SECONDS * 1000)
        until = await self._line.run(
            LEASE, [self._key], state.run_id, until, state.build or "", snapshot,
            self._mark, state.mark, seen,
        )  # fmt: skip
        if until:
            self._latest = (state.run_id, until)
        return bool(until)

    async def lease_left(self) -> float:
        """Return for how many more seconds the epoch stands."""
        now, epoch = await self._line.run(LOOK_UP, [self._key])
        until = (epoch or b"").rpartition(b" ")[2]
        is_number = _is_number(until.decode(errors="replace"))
        return float(max(0, int(until) - now) / 1000) if is_number else 0.0

    async def forget(self) -> None:
        """Delete the hash: no worker trusts Redis until another is complete."""
        self.close("being rebuilt")
        await self._line.ask("UNLINK", self._key)

    async def begin_build(self, build: str) -> None:
        """Begin another hash: nobody trusts Redis until it is complete."""
        await self._line.ask("UNLINK", self._key)
        await self._line.ask("HSET", self._key, "building", build)
        self._is_corrupt = False

    async def end_build(self, build: str, snapshot: str) -> bool:
        """Mark the hash complete up to ``snapshot``; False where it was lost meanwhile."""
        return bool(await self._line.run(END_BUILD, [self._key], build, snapshot))

    async def publish(self, entries: Sequence[Entry]) -> str | None:
        """Write a few entries within the limit; return the ``run_id`` of the server they are in.

        None where the connection changed servers in between. Raises what redis-py raises.
        """
        before = self.run_id
        async with asyncio.timeout(LIMIT_SECONDS):
            await self.load(entries)
        return self.run_id if before in {None, self.run_id} else None

    async def load(self, entries: Sequence[Entry]) -> None:
        """Write entries, some at a time."""
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            values = [
                (
                    key_of(entry.kind, entry.subject),
                    entry.floor,
                    int(entry.expires_at) + MARGIN_SECONDS,
                    entry.exempt or "",
                )
                for entry in entries[start : start + ENTRIES_AT_ONCE]
            ]
            await self._line.run(WRITE, [self._key], orjson.dumps(values), seconds=BULK_SECONDS)

    async def sweep(self, most: int) -> int:
        """Look at some ``most`` entries more, and remove those that have expired by Redis's clock.

        Each call goes on where the one before ended. Return ``most``, or less at the end of the
        hash, where the next call begins anew.
        """
        for _ in range(0, most, SWEPT_AT_ONCE):
            cursor, pairs = await self._line.ask(
                "HSCAN", self._key, self._cursor, "COUNT", SWEPT_AT_ONCE
            )
            self._cursor, now = int(cursor), int(time.time())
            fields = zip(pairs[::2], pairs[1::2], strict=True)
            if old := [field for field, value in fields if _expired(value, now)]:
                # not where Redis's clock and ours differ by more than entries outlive their tokens
                await self._line.run(SWEEP, [self._key], now, MARGIN_SECONDS, *old)
            if not self._cursor:
                return 0
        return most

    async def acquire_rebuild_lock(self, name: str, seconds: float) -> bool:
        """Return whether this worker is the one that rebuilds."""
        if await self._line.ask("SET", self._rebuild_lock, name, "PX", int(seconds * 1000), "NX"):
            return True
        (holder,) = await self._line.ask("MGET", self._rebuild_lock)
        if holder is None:
            # not a string, so not one of ours
            await self._line.ask("DEL", self._rebuild_lock)
        return holder == name.encode() and await self.extend_rebuild_lock(name, seconds)

    async def extend_rebuild_lock(self, name: str, seconds: float) -> bool:
        """Return whether this worker still holds the lock, for another ``seconds``."""
        (holder,) = await self._line.ask("MGET", self._rebuild_lock)
        if holder != name.encode():
            return False
        return bool(await self._line.ask("PEXPIRE", self._rebuild_lock, int(seconds * 1000)))

    async def release_rebuild_lock(self) -> None:
        """Let another worker rebuild."""
        await self._line.ask("DEL", self._rebuild_lock)

    async def aclose(self) -> None:
        """Close the connection."""
        self.stop()
        await self._line.hang_up()


def _is_number(text: str) -> bool:
    """Return whether a text is a number of ours: digits that fit in 64 bits."""
    return text.isascii() and text.isdigit() and len(text) < 19


def _expired(value: bytes, now: int) -> bool:
    parts = value.split(b" ")
    return len(parts) > 1 and _is_number(parts[1].decode(errors="replace")) and int(parts[1]) < now


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


def _info(raw: bytes | str) -> Mapping[str, str]:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    pairs: Iterable[list[str]] = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}
