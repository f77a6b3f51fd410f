"""How often something happened in a window of time, by name: in this process, and in Redis for all.

A window begins with the first time, and ends with its count. A count that was given back whole is
forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from api.line import Line, Script

# For all that is asked at once, a burst of sign-ins included, and for connecting.
REDIS_SECONDS = 0.5
# Expired counts are swept out when there are twice as many as the last sweep left, or this many.
SWEEP_AT_LEAST = 10_000
ADD = Script("""
local found = {}
for _, key in ipairs(KEYS) do
  local number, left = redis.call('INCRBY', key, ARGV[1]), redis.call('PTTL', key)
  if number <= 0 then
    redis.call('DEL', key)
    number = 0
  elseif left < 0 then
    left = tonumber(ARGV[2])
    redis.call('PEXPIRE', key, left)
  end
  found[#found + 1] = {number, left}
end
return found
""")


class Count(NamedTuple):
    """So many, in a window that ends in ``left`` seconds."""

    number: int
    left: float


class Counts(Protocol):
    """Counts of one window's length."""

    async def add(self, names: Sequence[str], amount: int = 1) -> list[Count]:
        """Add ``amount``, negative to give back, to each count at once; return what they are."""


class LocalCounts:
    """Counts of this process. Nothing is awaited: what is added at once is so for all."""

    def __init__(self, window: float) -> None:
        self._window = window
        # the number, and when its window ends
        self._counts: dict[str, tuple[int, float]] = {}
        self._sweep_at = SWEEP_AT_LEAST

    async def add(self, names: Sequence[str], amount: int = 1) -> list[Count]:
        """As ``Counts`` has it."""
        now = time.monotonic()
        found = [self._add(name, amount, now) for name in names]
        if len(self._counts) > self._sweep_at:
            self._counts = {name: kept for name, kept in self._counts.items() if kept[1] > now}
            self._sweep_at = max(SWEEP_AT_LEAST, 2 * len(self._counts))
        return found

    def _add(self, name: str, amount: int, now: float) -> Count:
        number, until = self._counts.pop(name, (0, 0.0))
        if until <= now:
            number, until = 0, now + self._window
        number = max(0, number + amount)
        if number:
            self._counts[name] = number, until
        return Count(number, until - now)


class RedisCounts:
    """Counts of all processes. Raises what ``Line`` raises; a lost answer may have counted."""

    def __init__(self, url: str, *, prefix: str, window: float) -> None:
        self._line = Line(url, REDIS_SECONDS)
        self._prefix = f"{prefix}throttle:"
        self._milliseconds = int(window * 1000)

    async def add(self, names: Sequence[str], amount: int = 1) -> list[Count]:
        """As ``Counts`` has it."""
        keys = [self._prefix + name for name in names]
        found = await self._line.run(ADD, keys, amount, self._milliseconds)
        return [Count(number, left / 1000) for number, left in found]

    async def stop(self) -> None:
        """Close the connection."""
        await self._line.hang_up()
