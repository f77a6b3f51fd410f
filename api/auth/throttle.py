"""Failed sign-ins are counted in memory and in Redis: both must agree to an attempt.

An attempt takes its place in every count *before* the password is looked at, and gives it back
if the password was right: so attempts made in parallel count one by one, and only failures stay.
Where the places are taken by attempts that are being looked at, the next one waits for them.
A fixed window is used for that (a moving one cannot give back); it begins with the first failure.
Redis counts for all workers. Memory counts along, so that a Redis that goes away in the midst of
an attack does not hand the attacker a fresh count.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from redis import asyncio as aioredis

from api.auth.counts import LocalCounts
from api.errors import TooManyRequests, Unavailable

log = structlog.get_logger("rolecall.throttle")

# The socket waits 100 ms at most; the rest is for a burst of sign-ins to share its connections.
REDIS_SECONDS = 0.5
# While Redis fails, memory counts for this long before Redis is asked again.
AWAY_SECONDS = 5.0
# How long an attempt waits for those before it, here and (asking again) in other workers.
WAIT_SECONDS = 10.0
ELSEWHERE_SECONDS = 0.1
ELSEWHERE_TIMES = 5

Place = tuple[RateLimitItem, tuple[str, str]]


@dataclass(slots=True)
class Attempt:
    """One attempt, and the places that it took. It counts as failed unless ``right`` is set."""

    right: bool = False
    places: list[tuple[FixedWindowRateLimiter, Place]] = field(default_factory=list)


class _Full(Exception):
    """There is no place left in one count."""

    def __init__(self, place: Place, *, in_redis: bool, wait: float) -> None:
        self.place, self.in_redis, self.wait = place, in_redis, wait


class LoginThrottle:
    """Per account and address together, per account, and per address (IPv6 by /64).

    When an account has too many failures in all, an address that failed on it less than half as
    often as it may still has its tries: strangers elsewhere do not lock the owner out.
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
        namespace: str = "login",
    ) -> None:
        self._memory = FixedWindowRateLimiter(LocalCounts())
        self._redis = (
            FixedWindowRateLimiter(_redis_storage(client, prefix)) if client is not None else None
        )
        self._away_until = 0.0
        self._pair = RateLimitItemPerSecond(pair, window, namespace=namespace)
        self._account = RateLimitItemPerSecond(account, window, namespace=namespace)
        self._address = RateLimitItemPerSecond(address, window, namespace=namespace)
        self._turns = _Turns()

    @asynccontextmanager
    async def attempt(self, account: str, address: str | None) -> AsyncIterator[Attempt]:
        """Hold a place for one attempt while its password is looked at. Set ``right`` if it is.

        Raises ``TooManyRequests``. What ends in ``Unavailable`` was not looked at, nor counts.
        """
        places = self._places(*_names(account, address))
        attempt = await self._begin(places)
        try:
            yield attempt
        except Unavailable:
            attempt.right = True
            raise
        finally:
            try:
                if attempt.right:
                    await self._give_back(attempt)
            finally:
                self._turns.leave(places, settled=True)

    async def _begin(self, places: Sequence[Place]) -> Attempt:
        elsewhere = ELSEWHERE_TIMES
        until = time.monotonic() + WAIT_SECONDS
        while True:
            attempt = Attempt()
            self._turns.enter(places)
            try:
                await self._take(attempt, places)
            except BaseException as refusal:
                # it was not looked at: it tells nothing, so it counts nowhere
                await self._give_back(attempt)
                self._turns.leave(places, settled=False)
                if not isinstance(refusal, _Full):
                    raise
                full = refusal
            else:
                return attempt
            if await self._turns.another_ends(full.place, until - time.monotonic()):
                continue
            if not full.in_redis or not elsewhere:
                raise TooManyRequests(full.wait)
            # by what was counted here there is room: another worker may be looking at an attempt
            elsewhere -= 1
            await asyncio.sleep(ELSEWHERE_SECONDS)

    async def _take(self, attempt: Attempt, places: Sequence[Place]) -> None:
        await self._take_from(self._memory, attempt, places)
        if self._redis is None or time.monotonic() < self._away_until:
            return
        try:
            await self._take_from(self._redis, attempt, places)
        except _Full:
            raise
        except Exception as error:  # noqa: BLE001  whatever ails Redis, memory has counted
            self._away_until = time.monotonic() + AWAY_SECONDS
            log.warning("throttle_in_memory", error=type(error).__name__)

    async def _take_from(
        self, limiter: FixedWindowRateLimiter, attempt: Attempt, places: Sequence[Place]
    ) -> None:
        for place in places:
            item, names = place
            async with asyncio.timeout(REDIS_SECONDS):
                within = await limiter.hit(item, *names)
            if not within and names[0] == "account":
                within = await self._few_from_here(limiter, places[0])
            attempt.places.append((limiter, place))
            if not within:
                raise _Full(
                    place, in_redis=limiter is self._redis, wait=await _wait(limiter, place)
                )

    async def _few_from_here(self, limiter: FixedWindowRateLimiter, pair: Place) -> bool:
        # this attempt has its place in the pair's count already
        item, names = pair
        async with asyncio.timeout(REDIS_SECONDS):
            stats = await limiter.get_window_stats(item, *names)
        return item.amount - stats.remaining <= max(1, item.amount // 2)

    async def _give_back(self, attempt: Attempt) -> None:
        for limiter, (item, names) in attempt.places:
            try:
                async with asyncio.timeout(REDIS_SECONDS):
                    await limiter.hit(item, *names, cost=-1)
            except Exception as error:  # noqa: BLE001  a lost give-back only errs to caution
                log.warning("throttle_give_back_lost", error=type(error).__name__)

    def _places(self, account: str, address: str) -> list[Place]:
        return [
            (self._pair, ("pair", f"{account}/{address}")),
            (self._address, ("address", address)),
            (self._account, ("account", account)),
        ]


class _Turns:
    """Who is being looked at in this process, by the counts they take a place in."""

    def __init__(self) -> None:
        self._inside: Counter[Place] = Counter()
        self._waiting: dict[Place, deque[asyncio.Future[None]]] = {}

    def enter(self, places: Sequence[Place]) -> None:
        self._inside.update(places)

    def leave(self, places: Sequence[Place], *, settled: bool) -> None:
        """``settled``: its places are free, or count a failure. Let the next one try."""
        for place in places:
            self._inside[place] -= 1
            if not self._inside[place]:
                del self._inside[place]
            if settled or place not in self._inside:
                self._wake(place)

    async def another_ends(self, place: Place, seconds: float) -> bool:
        """Wait until somebody inside has left; False where nobody is, or it takes too long."""
        if place not in self._inside:
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(place, deque()).append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._wake(place)  # its turn came when it was not there any more
            if isinstance(error, TimeoutError):
                return False
            raise
        return True

    def _wake(self, place: Place) -> None:
        waiting = self._waiting.get(place)
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        if not waiting:
            self._waiting.pop(place, None)


async def _wait(limiter: FixedWindowRateLimiter, place: Place) -> float:
    """Return how long until the window ends, in seconds."""
    item, names = place
    with contextlib.suppress(Exception):  # whatever ails Redis: it is full all the same
        async with asyncio.timeout(REDIS_SECONDS):
            stats = await limiter.get_window_stats(item, *names)
            return stats.reset_time - time.time()
    return float(item.get_expiry())


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
