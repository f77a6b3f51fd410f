"""Failed sign-ins are counted in memory and in Redis: both must agree to an attempt.

An attempt holds a place in every count *while* its password is looked at, and leaves a failure
there if it was wrong: so attempts made in parallel count one by one, and only failures stay.
Where the places are held by attempts that are being looked at, the next one waits for them.
Redis counts for all workers. Memory counts along, so that a Redis that goes away in the midst of
an attack hands out no fresh count here, and is told what it missed when it is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import structlog

from api.auth.counts import Count, Counts, LocalCounts
from api.errors import TooManyRequests, Unavailable

log = structlog.get_logger("rolecall.throttle")

# While Redis fails, memory counts for this long before Redis is asked again.
AWAY_SECONDS = 5.0
# How long an attempt waits for those before it, and how many may wait for one place.
WAIT_SECONDS = 10.0
WAITING_AT_MOST = 1_000
# Those in other workers tell nobody that they are done: one of those who wait asks so often.
ASK_SECONDS = 0.05
CROWDED = "Too many sign-ins are being looked at."

# Of IPv6, a home or a machine has a /64, a /56 or a /48 to itself, and any address within it.
IPV6_PREFIXES = (64, 56, 48)
# The well-known prefix of translated IPv4 (RFC 6052 section 2.1).
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(slots=True)
class Attempt:
    """One attempt. It counts as failed unless ``right`` is set."""

    right: bool = False
    in_redis: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class NetworkLimits(NamedTuple):
    """The most failures of an IPv4 address or an IPv6 /64, of a /56 and of a /48."""

    own: int
    by_56: int
    by_48: int

    @classmethod
    def of(cls, own: int, by_56: int | None = None, by_48: int | None = None) -> NetworkLimits:
        """Return limits of which the wider ones are twice and four times ``own``, if not given."""
        return cls(own, by_56 or 2 * own, by_48 or 4 * own)


class _Place(NamedTuple):
    """A count that an attempt has a place in, and the most failures that it may have."""

    name: str
    most: int
    kind: Literal["pair", "address", "account"]


class _Full(NamedTuple):
    """There is no place left in one count; ``settled``: nor will there be for ``left`` seconds."""

    place: str
    settled: bool
    left: float


class LoginThrottle:
    """Per account and network together, per network, and per account.

    The networks of an attempt are its IPv4 address alone, or its IPv6 /64, /56 and /48, each with
    a limit of its own. When an account has too many failures in all, an address still has its
    tries if each of its networks failed on the account less than half as often as it may:
    strangers elsewhere do not lock the owner out. ``window`` is in seconds; ``in_redis`` counts
    for all workers, None where there is no Redis.
    """

    def __init__(
        self,
        in_redis: Counts | None,
        *,
        window: float,
        pair: NetworkLimits,
        account: int,
        address: NetworkLimits,
        namespace: str = "login",
    ) -> None:
        self._memory = LocalCounts(window)
        self._redis = in_redis
        self._away_until = 0.0
        self._pair, self._address, self._account = pair, address, account
        self._namespace = namespace
        self._turns = _Turns()

    @asynccontextmanager
    async def attempt(self, account: str, address: str | None) -> AsyncIterator[Attempt]:
        """Hold a place for one attempt while its password is looked at. Set ``right`` if it is.

        Raises ``TooManyRequests``, and ``Unavailable`` where too many are being looked at. What
        ends in ``Unavailable`` was not looked at, nor counts; nor does what is cut off, of which
        nobody learns how it would have ended.
        """
        places = self._places(account, address)
        attempt = await self._begin(places)
        try:
            yield attempt
        except (Unavailable, asyncio.CancelledError):
            attempt.right = True
            raise
        finally:
            try:
                await self._end(attempt, places)
            finally:
                for place in places:
                    self._turns.call(place.name)

    async def _begin(self, places: Sequence[_Place]) -> Attempt:
        until = time.monotonic() + WAIT_SECONDS
        waited = None
        try:
            while isinstance(found := await self._try(places), _Full):
                if found.settled:
                    raise TooManyRequests(found.left)
                if waited is not None and waited != found.place:
                    self._turns.call(waited)
                again, waited = waited == found.place, found.place
                await self._turns.come(found.place, until, again=again)
            return found
        finally:
            if waited is not None:
                # whether it got in or not: the next may
                self._turns.call(waited)

    async def _try(self, places: Sequence[_Place]) -> Attempt | _Full:
        # right, as long as it is not looked at: it tells nothing, so it counts nowhere
        attempt, full = Attempt(right=True), None
        try:
            full = await self._take(attempt, places)
        except BaseException:
            await self._end(attempt, places)
            raise
        if full is not None:
            await self._end(attempt, places)
            return full
        attempt.right = False
        return attempt

    async def _take(self, attempt: Attempt, places: Sequence[_Place]) -> _Full | None:
        names = [place.name for place in places]
        full = self._full(await self._memory.enter(names, attempt.id), places)
        if full is not None or self._redis is None or time.monotonic() < self._away_until:
            return full
        attempt.in_redis = True  # first: an answer that is lost may have counted
        try:
            return self._full(await self._redis.enter(names, attempt.id), places)
        except Exception as error:  # noqa: BLE001  whatever ails Redis, memory counts
            self._away_until = time.monotonic() + AWAY_SECONDS
            log.warning("throttle_in_memory", error=type(error).__name__)
            return None

    async def _end(self, attempt: Attempt, places: Sequence[_Place]) -> None:
        failed = not attempt.right
        names = [place.name for place in places]
        await self._memory.leave(names, attempt.id, failed=failed)
        if self._redis is not None and (attempt.in_redis or failed):
            await self._redis.leave(names, attempt.id, failed=failed)

    def _full(self, found: Sequence[Count], places: Sequence[_Place]) -> _Full | None:
        # by the failures alone first: for those that are being looked at one can wait
        for settled in (True, False):
            numbers = [count.failed + (1 if settled else count.held) for count in found]
            few_from_here = all(
                number <= max(1, place.most // 2)
                for number, place in zip(numbers, places, strict=True)
                if place.kind == "pair"
            )
            for number, count, place in zip(numbers, found, places, strict=True):
                if number > place.most and not (place.kind == "account" and few_from_here):
                    return _Full(place.name, settled, count.left)
        return None

    def _places(self, account: str, address: str | None) -> list[_Place]:
        # hashed: what somebody typed as a username may be a password, and must not lie in Redis
        who = hashlib.sha256(account.encode()).hexdigest()[:32]
        begin, where = self._namespace, networks(address)
        # IPv4 has one network: the wider limits are for IPv6
        pairs, addresses = zip(where, self._pair), zip(where, self._address)  # noqa: B905
        return [
            *(_Place(f"{begin}:pair:{who}/{network}", most, "pair") for network, most in pairs),
            *(_Place(f"{begin}:address:{network}", most, "address") for network, most in addresses),
            _Place(f"{begin}:account:{who}", self._account, "account"),
        ]


class _Turns:
    """Who waits in this process for a place in a count, in the order they came."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._asking: set[str] = set()

    async def come(self, place: str, until: float, *, again: bool) -> None:
        """Wait to be called; the one who asks for all of them, not long.

        Who comes ``again`` is before the others. Raises ``Unavailable`` when its time is over, or
        too many wait.
        """
        seconds = until - time.monotonic()
        waiting = self._waiting.get(place) or deque()
        if seconds <= 0 or len(waiting) >= WAITING_AT_MOST:
            raise Unavailable(CROWDED, retry_after=2)
        self._waiting[place] = waiting
        asks = place not in self._asking
        if asks:
            self._asking.add(place)
            seconds = min(seconds, ASK_SECONDS)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (waiting.appendleft if again else waiting.append)(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.call(place)  # its turn came when it was not there any more
            if not isinstance(error, TimeoutError):
                raise
            if not asks:
                raise Unavailable(CROWDED, retry_after=2) from None
        finally:
            if asks:
                self._asking.discard(place)
            self._forget(place, turn)

    def call(self, place: str) -> None:
        """Let the next one try."""
        while waiting := self._waiting.get(place):
            turn = waiting[0]
            self._forget(place, turn)
            if not turn.done():
                turn.set_result(None)
                break

    def _forget(self, place: str, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(place)
        if waiting and turn in waiting:
            waiting.remove(turn)
            if not waiting:
                del self._waiting[place]


def networks(address: str | None) -> list[str]:
    """Return whose failures are counted together with those of an address, the narrowest first.

    An IPv4 address is alone, however it is written in IPv6. Of IPv6 it is the /64, the /56 and the
    /48, and a zone (RFC 4007) is left out. What is no address is ``unknown``.
    """
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return ["unknown"]
    if isinstance(parsed, ipaddress.IPv4Address):
        return [str(parsed)]
    if (embedded := _embedded(parsed)) is not None:
        return [str(embedded)]
    return [str(ipaddress.ip_network((int(parsed), p), strict=False)) for p in IPV6_PREFIXES]


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that has all of the IPv6 addresses like this one to itself.

    Whoever has one IPv4 address has by it a whole /48 of 6to4 (RFC 3056), and as many /64s of
    Teredo (RFC 4380) as there are servers.
    """
    if address.teredo is not None:
        return address.teredo[1]
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour
