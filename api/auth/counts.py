"""How often attempts failed in a window of time, by name, and how many are being looked at.

In this process, and in Redis for all. A window begins with the first failure, and ends with its
count.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import structlog

from api.line import Line, Script

log = structlog.get_logger("rolecall.throttle")

# For all that is asked at once, a burst of sign-ins included, and for connecting.
REDIS_SECONDS = 0.5
# Longer than anything is looked at: a place that nobody let go of is free again then.
HELD_SECONDS = 60.0
# What Redis did not hear is told it again so often; so much of it is kept.
LATER_SECONDS = 0.5
UNTOLD_AT_MOST = 10_000
# Expired counts are swept out when there are twice as many as the last sweep left, or this many.
SWEEP_AT_LEAST = 10_000
# Each name has two keys: its failures, and who holds its places, until when.
ENTER = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = {}
for n = 1, #KEYS, 2 do
  local failed, held = KEYS[n], KEYS[n + 1]
  redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
  redis.call('ZADD', held, now + ARGV[2], ARGV[1])
  redis.call('PEXPIRE', held, ARGV[2])
  local number = tonumber(redis.call('GET', failed) or 0)
  found[#found + 1] = {number, redis.call('ZCARD', held), redis.call('PTTL', failed)}
end
return found
""")
LEAVE = Script("""
for n = 1, #KEYS, 2 do
  redis.call('ZREM', KEYS[n + 1], ARGV[1])
  if ARGV[2] == '1' and redis.call('INCR', KEYS[n]) == 1 then
    redis.call('PEXPIRE', KEYS[n], ARGV[3])
  end
end
""")


class Count(NamedTuple):
    """So many failures, in a window that ends in ``left`` seconds, and so many places held."""

    failed: int
    held: int
    left: float


class Counts(Protocol):
    """Counts of one window's length. All of what is asked at once is done at once."""

    async def enter(self, names: Sequence[str], who: str) -> list[Count]:
        """Hold a place of each name; return what the counts are then."""

    async def leave(self, names: Sequence[str], who: str, *, failed: bool) -> None:
        """Let go of the places; leave a failure in each where it ``failed``."""


class LocalCounts:
    """Counts of this process. Nothing is awaited."""

    def __init__(self, window: float) -> None:
        self._window = window
        # how many, and when the window ends
        self._failed: dict[str, tuple[int, float]] = {}
        self._held: Counter[str] = Counter()
        self._sweep_at = SWEEP_AT_LEAST

    async def enter(self, names: Sequence[str], _who: str) -> list[Count]:
        """As ``Counts`` has it."""
        now = time.monotonic()
        self._held.update(names)
        found = []
        for name in names:
            number, until = self._failures(name, now)
            found.append(Count(number, self._held[name], until - now))
        return found

    async def leave(self, names: Sequence[str], _who: str, *, failed: bool) -> None:
        """As ``Counts`` has it."""
        now = time.monotonic()
        for name in names:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
            if failed:
                number, until = self._failures(name, now)
                self._failed[name] = number + 1, until
        if len(self._failed) > self._sweep_at:
            self._failed = {name: kept for name, kept in self._failed.items() if kept[1] > now}
            self._sweep_at = max(SWEEP_AT_LEAST, 2 * len(self._failed))

    def _failures(self, name: str, now: float) -> tuple[int, float]:
        number, until = self._failed.get(name, (0, 0.0))
        return (number, until) if until > now else (0, now + self._window)


class RedisCounts:
    """Counts of all processes. ``enter`` raises what ``Line`` raises, and may have counted then.

    What Redis does not hear of who leaves it is told later, so that nothing of it is lost with a
    moment's trouble: a failure may count twice, where only the answer was lost.
    """

    def __init__(self, url: str, *, prefix: str, window: float) -> None:
        self._line = Line(url, REDIS_SECONDS)
        self._prefixes = f"{prefix}failed:", f"{prefix}held:"
        self._window = int(window * 1000)
        self._untold: deque[tuple[Sequence[str], str, bool]] = deque(maxlen=UNTOLD_AT_MOST)
        self._telling: asyncio.Task[None] | None = None

    async def enter(self, names: Sequence[str], who: str) -> list[Count]:
        """As ``Counts`` has it."""
        found = await self._line.run(ENTER, self._keys(names), who, int(HELD_SECONDS * 1000))
        return [Count(failed, held, left / 1000) for failed, held, left in found]

    async def leave(self, names: Sequence[str], who: str, *, failed: bool) -> None:
        """As ``Counts`` has it."""
        told = False
        try:
            if not self._untold:
                await self._tell(names, who, failed=failed)
                told = True
        except Exception as error:  # noqa: BLE001  whatever ails Redis
            log.warning("throttle_told_later", error=type(error).__name__)
        finally:
            if not told:
                self._untold.append((names, who, failed))
                self._telling = self._telling or asyncio.create_task(self._tell_later())

    async def _tell(self, names: Sequence[str], who: str, *, failed: bool) -> None:
        await self._line.run(LEAVE, self._keys(names), who, int(failed), self._window)

    async def _tell_later(self) -> None:
        while self._untold:
            await asyncio.sleep(LATER_SECONDS)
            with suppress(Exception):
                await self._tell_all()
        self._telling = None

    async def _tell_all(self) -> None:
        while self._untold:
            names, who, failed = untold = self._untold.popleft()
            try:
                await self._tell(names, who, failed=failed)
            except BaseException:
                self._untold.appendleft(untold)
                raise

    def _keys(self, names: Sequence[str]) -> list[str]:
        return [prefix + name for name in names for prefix in self._prefixes]

    async def stop(self) -> None:
        """Close the connection."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        await self._line.hang_up()
