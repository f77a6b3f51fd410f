"""Failed sign-ins are counted in memory and in Redis: both must agree to an attempt.

An attempt takes its place in every count *before* the password is looked at, and gives it back
if the password was right: so attempts made in parallel count one by one, and only failures stay.
A fixed window is used for that (a moving one cannot give back); it begins with the first failure.
Redis counts for all workers. Memory counts along, so that a Redis that goes away in the midst of
an attack does not hand the attacker a fresh count.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import time
from dataclasses import dataclass, field

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from redis import asyncio as aioredis

from api.errors import TooManyRequests

log = structlog.get_logger("rolecall.throttle")

# The socket waits 100 ms at most; the rest is for a burst of sign-ins to share its connections.
REDIS_SECONDS = 0.5
# While Redis fails, memory counts for this long before Redis is asked again.
AWAY_SECONDS = 5.0
# Expired counts are swept out when there are twice as many as the last sweep left, or this many.
SWEEP_AT_LEAST = 10_000


Place = tuple[FixedWindowRateLimiter, RateLimitItem, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Attempt:
    """The places that one attempt took; ``give_back`` when the password was right."""

    places: list[Place] = field(default_factory=list)


class LocalCounts(Storage):
    """Counts of this process. A count that is given back is forgotten; so is one that expired.

    ``limits.aio.storage.MemoryStorage`` walks over all its keys at every hit, on the loop.
    """

    STORAGE_SCHEME = None

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, tuple[int, float]] = {}
        self._sweep_at = SWEEP_AT_LEAST

    @property
    def base_exceptions(self) -> type[Exception]:
        """Nothing here raises."""
        return ValueError

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add ``amount``, which may be negative; the first begins a window of ``expiry``."""
        count, until = self._live(key) or (0, time.time() + expiry)
        self._counts[key] = (count := max(0, count + amount), until)
        if count == 0:
            del self._counts[key]
        if len(self._counts) > self._sweep_at:
            self._counts = {key: kept for key in self._counts if (kept := self._live(key))}
            self._sweep_at = max(SWEEP_AT_LEAST, 2 * len(self._counts))
        return count

    async def get(self, key: str) -> int:
        """Return the count, 0 where there is none."""
        return (self._live(key) or (0,))[0]

    async def get_expiry(self, key: str) -> float:
        """Return when the window ends, in seconds since the epoch."""
        return (self._live(key) or (0, time.time()))[1]

    async def check(self) -> bool:
        """Memory is always there."""
        return True

    async def reset(self) -> int | None:
        """Forget everything."""
        self._counts.clear()
        return None

    async def clear(self, key: str) -> None:
        """Forget one count."""
        self._counts.pop(key, None)

    def _live(self, key: str) -> tuple[int, float] | None:
        found = self._counts.get(key)
        return found if found is not None and found[1] > time.time() else None


class LoginThrottle:
    """Per account and address together, per account, and per address (IPv6 by /64).

    When an account has too many failures in all, only addresses that failed on it are refused:
    strangers elsewhere do not lock the owner out.
    """

    def __init__(
        self,
        client: aioredis.Redis | None,
        *,
        window: int,
        pair: int,
        account: int,
        address: int,
        prefix: str = "rolecall:",
    ) -> None:
        self._memory = FixedWindowRateLimiter(LocalCounts())
        self._redis = (
            FixedWindowRateLimiter(_redis_storage(client, prefix)) if client is not None else None
        )
        self._away_until = 0.0
        self._pair = RateLimitItemPerSecond(pair, window, namespace="login")
        self._account = RateLimitItemPerSecond(account, window, namespace="login")
        self._address = RateLimitItemPerSecond(address, window, namespace="login")

    async def begin(self, account: str, address: str | None) -> Attempt:
        """Take a place for one attempt. Raises ``TooManyRequests``."""
        names = _names(account, address)
        attempt = Attempt()
        await self._take(attempt, self._memory, *names)
        if self._redis is not None and time.monotonic() >= self._away_until:
            try:
                await self._take(attempt, self._redis, *names)
            except TooManyRequests:
                raise
            except Exception as error:  # noqa: BLE001  whatever ails Redis, memory has counted
                self._away_until = time.monotonic() + AWAY_SECONDS
                log.warning("throttle_in_memory", error=type(error).__name__)
        return attempt

    async def give_back(self, attempt: Attempt) -> None:
        """Undo an attempt that turned out to be right."""
        for limiter, item, names in attempt.places:
            try:
                async with asyncio.timeout(REDIS_SECONDS):
                    await limiter.hit(item, *names, cost=-1)
            except Exception as error:  # noqa: BLE001  a lost give-back only errs to caution
                log.warning("throttle_give_back_lost", error=type(error).__name__)

    async def _take(
        self, attempt: Attempt, limiter: FixedWindowRateLimiter, account: str, address: str
    ) -> None:
        pair = f"{account}/{address}"
        wanted = [
            (self._pair, ("pair", pair)),
            (self._address, ("address", address)),
            (self._account, ("account", account)),
        ]
        for item, names in wanted:
            async with asyncio.timeout(REDIS_SECONDS):
                within = await limiter.hit(item, *names)
            if not within and item is self._account and names[0] == "account":
                within = await self._first_from_here(limiter, pair)
            attempt.places.append((limiter, item, names))
            if not within:
                await self._refuse(attempt)

    async def _first_from_here(self, limiter: FixedWindowRateLimiter, pair: str) -> bool:
        # this attempt has its place in the pair's count already: one means it is the first
        async with asyncio.timeout(REDIS_SECONDS):
            stats = await limiter.get_window_stats(self._pair, "pair", pair)
        return stats.remaining >= self._pair.amount - 1

    async def _refuse(self, attempt: Attempt) -> None:
        # refused before the password was looked at: it tells nothing, so it counts nowhere
        await self.give_back(attempt)
        limiter, item, names = attempt.places[-1]
        async with asyncio.timeout(REDIS_SECONDS):
            stats = await limiter.get_window_stats(item, *names)
        raise TooManyRequests(stats.reset_time - time.time())


def _redis_storage(client: aioredis.Redis, prefix: str) -> Storage:
    return RedisStorage(
        "async+redis://",
        connection_pool=client.connection_pool,  # type: ignore[arg-type]
        implementation="redispy",
        key_prefix=f"{prefix}throttle",
    )


def _names(account: str, address: str | None) -> tuple[str, str]:
    # hashed: what somebody typed as a username may be a password, and must not lie in Redis
    return hashlib.sha256(account.encode()).hexdigest()[:32], _network(address)


def _network(address: str | None) -> str:
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network(f"{parsed}/64", strict=False).network_address)
    return str(parsed)
