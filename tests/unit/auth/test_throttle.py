"""Failed sign-ins: counted one by one, in parallel, with Redis, without it, and in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from redis import asyncio as aioredis

from api.auth import counts, throttle
from api.auth.counts import Count, Counts, LocalCounts, RedisCounts
from api.auth.throttle import LoginThrottle, NetworkLimits, networks
from api.errors import TooManyRequests, Unavailable
from tests._redis import RedisServer

WINDOW = 60


@pytest.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[aioredis.Redis]:
    """A client of the tests' Redis, with no counts in it."""
    async with aioredis.Redis.from_url(redis_server.url) as client:
        await client.delete(*[b"none", *[key async for key in client.scan_iter("thr:*")]])
        yield client


@pytest.fixture
async def in_redis(
    redis_server: RedisServer, client: aioredis.Redis
) -> AsyncIterator[Callable[[], RedisCounts]]:
    """Make the counts of another worker, none in them yet."""
    made: list[RedisCounts] = []

    def make() -> RedisCounts:
        made.append(RedisCounts(redis_server.url, prefix="thr:", window=WINDOW))
        return made[-1]

    yield make
    for one in made:
        await one.stop()


InRedis = Callable[[], RedisCounts]


def throttle_of(counts: Counts | None, window: float = WINDOW) -> LoginThrottle:
    """Return a throttle: 3 a pair, 6 an account, 9 an address; IPv6 by its /64, /56 and /48."""
    pair, address = NetworkLimits.of(3), NetworkLimits.of(9)
    return LoginThrottle(counts, window=window, pair=pair, account=6, address=address)


def names_of(one: LoginThrottle, account: str, address: str) -> list[str]:
    """Return the names of the counts that an attempt has a place in."""
    return [place.name for place in one._places(account, address)]


async def attempts(one: LoginThrottle, number: int, account: str, address: str) -> int:
    """Make ``number`` attempts at once that all fail; return how many were let through."""

    async def wrong() -> None:
        async with one.attempt(account, address):
            await asyncio.sleep(0.01)

    answers = await asyncio.gather(*(wrong() for _ in range(number)), return_exceptions=True)
    for answer in answers:
        assert not isinstance(answer, BaseException) or isinstance(answer, TooManyRequests), answer
    return sum(not isinstance(answer, TooManyRequests) for answer in answers)


@pytest.fixture(params=["redis", "memory"])
def limited(request: pytest.FixtureRequest, in_redis: InRedis) -> LoginThrottle:
    """A throttle with Redis and one without."""
    return throttle_of(in_redis() if request.param == "redis" else None)


async def test_parallel_attempts_count_one_by_one(limited: LoginThrottle) -> None:
    """Of 20 at once from one address on one account, as many as the limit (28)."""
    assert await attempts(limited, 20, "ann", "10.0.0.1") == 3
    with pytest.raises(TooManyRequests) as refused:
        async with limited.attempt("ann", "10.0.0.1"):
            pass
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 61


async def test_only_failures_stay(limited: LoginThrottle) -> None:
    """What is given back, however often, leaves every count where it was."""
    for _ in range(30):
        await right(limited, "ann", "10.0.0.1")
    assert await attempts(limited, 5, "ann", "10.0.0.1") == 3


async def test_what_is_cut_off_counts_nowhere(limited: LoginThrottle) -> None:
    """Nobody learns how it would have ended: a stop must lock no one out."""
    cut_off = [asyncio.create_task(slow(limited, 60, is_right=False)) for _ in range(3)]
    await asyncio.sleep(0.05)
    for task in cut_off:
        task.cancel()
    await asyncio.wait(cut_off, timeout=5)
    assert all(task.cancelled() for task in cut_off)
    assert await attempts(limited, 5, "ann", "10.0.0.1") == 3


async def right(one: LoginThrottle, account: str, address: str) -> None:
    """Make an attempt with the right password."""
    async with one.attempt(account, address) as attempt:
        await asyncio.sleep(0.01)
        attempt.right = True


async def test_right_attempts_at_once_all_get_in(
    limited: LoginThrottle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty at once, more than there are places: each is called in its turn; none counts."""
    monkeypatch.setattr(throttle, "ASK_SECONDS", 60)
    coming = asyncio.gather(*(right(limited, "ann", "10.0.0.1") for _ in range(20)))
    await asyncio.wait_for(coming, 5)
    assert await attempts(limited, 5, "ann", "10.0.0.1") == 3


async def slow(one: LoginThrottle, seconds: float, *, is_right: bool) -> None:
    """Make an attempt that is looked at for so long."""
    async with one.attempt("ann", "10.0.0.1") as attempt:
        await asyncio.sleep(seconds)
        attempt.right = is_right


async def test_places_held_in_another_worker_are_waited_for(in_redis: InRedis) -> None:
    """By all that come, however few places failures have left: who is right gets in."""
    here, elsewhere = throttle_of(in_redis()), throttle_of(in_redis())
    assert await attempts(elsewhere, 2, "ann", "10.0.0.1") == 2
    held = asyncio.create_task(slow(elsewhere, 1, is_right=True))
    await asyncio.sleep(0.05)
    await asyncio.gather(*(right(here, "ann", "10.0.0.1") for _ in range(10)))
    assert held.done()
    assert await attempts(here, 5, "ann", "10.0.0.1") == 1


async def test_a_failure_in_another_worker_is_told_at_once(in_redis: InRedis) -> None:
    """Those who waited for an attempt there that was wrong are refused; 429 is for failures."""
    here, elsewhere = throttle_of(in_redis()), throttle_of(in_redis())
    assert await attempts(elsewhere, 2, "ann", "10.0.0.1") == 2
    held = asyncio.create_task(slow(elsewhere, 0.1, is_right=False))
    await asyncio.sleep(0.05)
    with pytest.raises(TooManyRequests) as refused:
        await asyncio.wait_for(right(here, "ann", "10.0.0.1"), 5)
    assert 50 < int(refused.value.headers["Retry-After"]) <= WINDOW + 1
    assert held.done()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_too_many_at_once_are_no_failures(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whose turn does not come in time is told that it is crowded, and may come again soon."""
    monkeypatch.setattr(throttle, "WAIT_SECONDS", 0.2)
    here, elsewhere = throttle_of(in_redis()), throttle_of(in_redis())
    holding = here if where == "here" else elsewhere
    held = [asyncio.create_task(slow(holding, 0.6, is_right=True)) for _ in range(3)]
    await asyncio.sleep(0.05)
    coming = [right(here, "ann", "10.0.0.1") for _ in range(5)]
    answers = await asyncio.gather(*coming, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 5
    assert {answer.headers["Retry-After"] for answer in answers} == {"2"}  # type: ignore[union-attr]
    await asyncio.gather(*held)
    assert await attempts(here, 5, "ann", "10.0.0.1") == 3


async def test_a_place_that_nobody_let_go_of_is_free_in_time(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that died with it, an answer of Redis that was lost: it is no failure either.

    However many hold places of the same names meanwhile.
    """
    monkeypatch.setattr(counts, "HELD_SECONDS", 0.4)
    one = in_redis()
    places = names_of(throttle_of(one), "ann", "10.0.0.1")
    for who in ("dead", "gone"):
        await one.enter(places, who)
    monkeypatch.setattr(counts, "HELD_SECONDS", 60)
    monkeypatch.setattr(throttle, "WAIT_SECONDS", 5)
    here = throttle_of(in_redis())
    held = asyncio.create_task(slow(here, 3, is_right=True))
    await asyncio.sleep(0.05)
    await right(throttle_of(in_redis()), "ann", "10.0.0.1")
    assert not held.done()
    assert [count.held for count in await one.enter(places, "me")] == [2, 2, 2]
    held.cancel()


@pytest.mark.parametrize("failing", ["answers", "is cancelled"])
async def test_what_redis_did_not_hear_is_told_later(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A moment's trouble, or who is cancelled as it leaves: no place is kept, no failure lost."""
    monkeypatch.setattr(counts, "LATER_SECONDS", 0.05)
    one = in_redis()
    run, down = one._line.run, True

    async def troubled(*asked: Any) -> Any:
        if down:
            await asyncio.sleep(0.05)
            raise TimeoutError
        return await run(*asked)

    here, elsewhere = throttle_of(one), throttle_of(in_redis())
    held = [asyncio.create_task(slow(here, 0.05, is_right=n > 0)) for n in range(3)]
    await asyncio.sleep(0.03)
    one._line.run = troubled  # type: ignore[method-assign]
    if failing == "is cancelled":
        await asyncio.sleep(0.05)
        for task in held:
            task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    places = names_of(here, "ann", "10.0.0.1")
    assert (await elsewhere._redis.enter(places, "me"))[0].held == 4  # type: ignore[union-attr]
    down = False
    await asyncio.sleep(0.2)
    found = await elsewhere._redis.enter(places, "me")  # type: ignore[union-attr]
    assert {(count.failed, count.held) for count in found} == {(1, 1)}
    assert not one._untold


async def test_what_is_untold_at_a_stop_is_told_after_the_next_start(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application may run again, on another loop too: it counts there as before."""
    monkeypatch.setattr(counts, "LATER_SECONDS", 0.05)
    one = in_redis()
    run = one._line.run

    async def down(*_asked: Any) -> Any:
        raise ConnectionError

    one._line.run = down  # type: ignore[method-assign]
    await one.leave(["a"], "x", failed=True)
    await asyncio.sleep(0)
    await one.stop()
    one._line.run = run  # type: ignore[method-assign]
    await one.leave(["a"], "y", failed=True)
    await asyncio.sleep(0.3)
    assert [count.failed for count in await one.enter(["a"], "z")] == [2]


async def test_what_redis_had_no_part_in_it_is_told_later(
    in_redis: InRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures of a time when memory counted alone count in Redis afterwards, for all workers."""
    monkeypatch.setattr(counts, "LATER_SECONDS", 0.05)
    here = throttle_of(in_redis())
    here._away_until = float("inf")
    assert await attempts(here, 2, "ann", "10.0.0.1") == 2
    await right(here, "ann", "10.0.0.1")
    assert await attempts(throttle_of(in_redis()), 3, "ann", "10.0.0.1") == 1


async def test_no_more_wait_than_can_be_kept(
    limited: LoginThrottle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is told so at once."""
    monkeypatch.setattr(throttle, "WAITING_AT_MOST", 4)
    inside = [asyncio.create_task(slow(limited, 0.3, is_right=True)) for _ in range(3)]
    await asyncio.sleep(0.05)
    coming = [asyncio.create_task(right(limited, "ann", "10.0.0.1")) for _ in range(8)]
    await asyncio.sleep(0.15)
    crowded = [task for task in coming if task.done()]
    assert [type(task.exception()) for task in crowded] == [Unavailable] * 4
    await asyncio.gather(*inside, *(task for task in coming if task not in crowded))
    assert not limited._turns._waiting


async def test_one_of_those_who_wait_asks_redis(in_redis: InRedis) -> None:
    """However many wait here for places that are held elsewhere; then all get in."""
    one = in_redis()
    here, elsewhere = throttle_of(one), throttle_of(in_redis())
    enter, asked = one.enter, 0

    async def counting(names: Sequence[str], who: str) -> list[Count]:
        nonlocal asked
        asked += 1
        return await enter(names, who)

    one.enter = counting  # type: ignore[method-assign]
    held = [asyncio.create_task(slow(elsewhere, 1, is_right=True)) for _ in range(3)]
    await asyncio.sleep(0.05)
    coming = [asyncio.create_task(right(here, "ann", "10.0.0.1")) for _ in range(100)]
    await asyncio.sleep(0.8)
    assert 5 < asked < 60
    await asyncio.gather(*held, *coming)
    assert not here._turns._waiting
    assert not here._turns._asking


async def test_what_could_not_be_looked_at_does_not_count(limited: LoginThrottle) -> None:
    """A database that is away, or too many that wait for a hash: no failure of the user's."""
    for _ in range(5):
        with pytest.raises(Unavailable):
            async with limited.attempt("ann", "10.0.0.1"):
                raise Unavailable
    assert await attempts(limited, 5, "ann", "10.0.0.1") == 3


async def test_who_leaves_the_queue_hands_on_its_turn(limited: LoginThrottle) -> None:
    """Waiting attempts that are cancelled leave no gap: those behind them get in."""
    inside = [asyncio.create_task(right(limited, "ann", "10.0.0.1")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(right(limited, "ann", "10.0.0.1")) for _ in range(10)]
    await asyncio.sleep(0.005)
    for task in waiting[::2]:
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*inside, *waiting[1::2]), 5)
    assert not limited._turns._waiting
    assert not limited._turns._asking
    assert not limited._memory._held


async def test_a_turn_that_comes_too_late_is_handed_on() -> None:
    """Who is called and cancelled in one moment calls the next in its stead."""
    turns = throttle_of(None)._turns
    turns._asking.add("it")
    until = time.monotonic() + 5
    waiting = [asyncio.create_task(turns.come("it", until, again=False)) for _ in range(4)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    turns.call("it")
    await asyncio.wait_for(waiting[1], 1)
    turns.call("it")
    waiting[2].cancel()
    await asyncio.wait_for(waiting[3], 1)
    assert not turns._waiting


SIXTY = [f"2001:db8:0:{n:x}::1" for n in range(60)]  # /64s of one /48, in one /56
SPREAD = [f"2001:db8:0:{n:x}00::1" for n in range(60)]  # of one /48, each in a /56 of its own


async def test_sixty_64s_of_a_48_have_the_tries_of_the_48(limited: LoginThrottle) -> None:
    """Six fill the account, and are half of what the /48 may fail on it: no more come (86)."""
    assert sum([await attempts(limited, 3, "ann", address) for address in SPREAD]) == 6
    assert [await attempts(limited, 1, "ann", one) for one in SPREAD] == [0] * 60


async def test_an_account_without_a_limit_is_held_by_the_networks() -> None:
    """What the /56 and the /48 may fail on one account, and on all."""
    pair, address = NetworkLimits.of(3), NetworkLimits.of(9)
    one = LoginThrottle(None, window=WINDOW, pair=pair, account=1_000, address=address)
    assert [await attempts(one, 5, "ann", address) for address in SIXTY[:4]] == [3, 3, 0, 0]
    assert [await attempts(one, 5, "ann", address) for address in SPREAD[1:6]] == [3, 3, 0, 0, 0]
    assert await attempts(one, 5, "ann", "2001:db8:1::1") == 3
    # nine an address: 18 a /56, 36 a /48, over all accounts
    assert sum([await attempts(one, 1, f"u{n}", SIXTY[n]) for n in range(60)]) == 12
    assert sum([await attempts(one, 1, f"v{n}", SPREAD[n]) for n in range(60)]) == 36 - 12 - 12
    assert await attempts(one, 1, "w", "2001:db8:1::1") == 1


async def test_the_exception_of_an_address_is_not_had_once_for_each_64(
    limited: LoginThrottle,
) -> None:
    """The account's count is full: of one /48 come no more tries than half of what it may fail."""
    for n in range(2):
        assert await attempts(limited, 3, "ann", f"10.0.0.{n}") == 3
    assert sum([await attempts(limited, 1, "ann", one) for one in SIXTY]) == 3
    assert sum([await attempts(limited, 1, "ann", one) for one in SPREAD]) == 3
    # who comes from elsewhere has them still, and a right password gets in
    await right(limited, "ann", "2001:db8:1::1")
    assert await attempts(limited, 5, "ann", "2001:db8:1::1") == 1
    assert await attempts(limited, 5, "ann", "10.0.1.1") == 1


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.1", ["192.0.2.1"]),
        ("::ffff:192.0.2.1", ["192.0.2.1"]),
        ("64:ff9b::192.0.2.1", ["192.0.2.1"]),
        ("2002:c000:201:1234::1", ["192.0.2.1"]),
        ("2002:c000:201:ffff::9", ["192.0.2.1"]),
        # the server 198.51.100.1 and another; the client is 192.0.2.1
        ("2001:0:c633:6401:8000:63bf:3fff:fdfe", ["192.0.2.1"]),
        ("2001:0:cb00:7101:0:1:3fff:fdfe", ["192.0.2.1"]),
        (
            "2001:db8:1:23ff:a:b:c:d",
            ["2001:db8:1:23ff::/64", "2001:db8:1:2300::/56", "2001:db8:1::/48"],
        ),
        ("fe80::1%eth0", ["fe80::/64", "fe80::/56", "fe80::/48"]),
        # no translator's well-known prefix: RFC 8215 leaves it to who runs the network
        ("64:ff9b:1::1", ["64:ff9b:1::/64", "64:ff9b:1::/56", "64:ff9b:1::/48"]),
        (None, ["unknown"]),
        ("", ["unknown"]),
        ("unix:", ["unknown"]),
        ("192.0.2.1/24", ["unknown"]),
    ],
)
def test_whose_failures_count_together(address: str | None, expected: list[str]) -> None:
    """An IPv4 address is one however it is written in IPv6; IPv6 counts by three networks."""
    assert networks(address) == expected


async def test_one_address_has_one_count_over_all_accounts(limited: LoginThrottle) -> None:
    """An address that goes from account to account is stopped; its neighbours are not."""
    passed = [await attempts(limited, 1, f"user{n}", "10.0.0.1") for n in range(12)]
    assert sum(passed) == 9
    assert await attempts(limited, 1, "user1", "10.0.0.2") == 1


async def test_an_ipv6_network_is_one_address(limited: LoginThrottle) -> None:
    """A /64 is what one customer has: its addresses count together, mapped IPv4 as IPv4."""
    passed = [await attempts(limited, 1, f"u{n}", f"2001:db8::{n}") for n in range(12)]
    assert sum(passed) == 9
    assert await attempts(limited, 1, "u1", "2001:db8:0:1::1") == 1
    passed = [await attempts(limited, 1, f"v{n}", f"::ffff:10.9.9.{n}") for n in range(12)]
    assert sum(passed) == 12


async def test_strangers_do_not_lock_the_owner_out(limited: LoginThrottle) -> None:
    """Past the account's limit, an address that never failed on it still has a try (28).

    Those that were refused tried no password, so their address is left its other tries.
    """
    for n in range(3):
        assert await attempts(limited, 3, "ann", f"10.0.1.{n}") == (3 if n < 2 else 1)
    assert await attempts(limited, 3, "ann", "10.0.2.1") == 1
    passed = [await attempts(limited, 1, f"user{n}", "10.0.2.1") for n in range(10)]
    assert sum(passed) == 8


class Gone(LocalCounts):
    """A Redis that is not there."""

    async def enter(self, names: Sequence[str], _who: str) -> list[Count]:
        """Fail."""
        raise ConnectionError


async def test_a_redis_that_goes_away_hands_out_no_fresh_count(in_redis: InRedis) -> None:
    """Half of the attempts with Redis, half without: the limit is one limit."""
    limited = throttle_of(in_redis())
    assert await attempts(limited, 2, "ann", "10.0.0.1") == 2
    limited._redis = Gone(WINDOW)
    assert await attempts(limited, 10, "ann", "10.0.0.1") == 1
    assert limited._away_until > 0


async def test_a_redis_that_hung_up_meanwhile_is_called_again(
    client: aioredis.Redis, in_redis: InRedis
) -> None:
    """Between two attempts it closes every connection: the next one counts there all the same."""
    limited = throttle_of(in_redis())
    assert await attempts(limited, 2, "ann", "10.0.0.1") == 2
    await client.client_kill_filter(_type="normal", skipme=True)
    await asyncio.sleep(0.05)
    assert await attempts(limited, 1, "ann", "10.0.0.1") == 1
    assert limited._away_until == 0
    assert await attempts(throttle_of(in_redis()), 1, "ann", "10.0.0.1") == 0


async def test_two_workers_share_one_count(in_redis: InRedis) -> None:
    """What one worker counted the other knows."""
    one, two = throttle_of(in_redis()), throttle_of(in_redis())
    assert await attempts(one, 2, "ann", "10.0.0.1") == 2
    assert await attempts(two, 5, "ann", "10.0.0.1") == 1


async def test_kinds_of_attempts_have_counts_of_their_own(in_redis: InRedis) -> None:
    """A client app's failures are not those of a user of the same name."""
    counts = in_redis()
    users, clients = (
        LoginThrottle(
            counts,
            window=WINDOW,
            pair=NetworkLimits.of(1),
            account=1,
            address=NetworkLimits.of(1),
            namespace=namespace,
        )
        for namespace in ("login", "client")
    )
    assert await attempts(users, 2, "ann", "10.0.0.1") == 1
    assert await attempts(clients, 2, "ann", "10.0.0.1") == 1


async def test_redis_holds_no_typed_name(client: aioredis.Redis, in_redis: InRedis) -> None:
    """A password typed as a username does not lie in Redis, and what does is not there for ever."""
    limited = throttle_of(in_redis())
    assert await attempts(limited, 1, "my secret password", "10.0.0.1") == 1
    keys = [key async for key in client.scan_iter("thr:*")]
    assert len(keys) == 3
    assert not [key for key in keys if b"secret" in key or not key.startswith(b"thr:failed:")]
    for key in keys:
        assert 0 < await client.pttl(key) <= WINDOW * 1000


async def test_the_window_begins_with_the_first(client: aioredis.Redis, in_redis: InRedis) -> None:
    """A later failure does not prolong it; who lets go later takes nothing away."""
    one = in_redis()
    for who, window in (("first", WINDOW), ("second", 20)):
        await one.enter(["a", "b"], who)
        await one.leave(["a", "b"], who, failed=True)
        assert window - 1 < await client.pttl("thr:failed:a") / 1000 <= window
        await client.pexpire("thr:failed:a", 20_000)
    found = await one.enter(["a", "b"], "x")
    assert {(count.failed, count.held) for count in found} == {(2, 1)}
    assert 0 < await client.pttl("thr:held:a") <= counts.HELD_SECONDS * 1000
    await client.delete("thr:failed:a", "thr:held:a")
    await one.leave(["a"], "x", failed=False)
    assert not await client.exists("thr:failed:a", "thr:held:a")


async def test_a_window_ends() -> None:
    """After the window the counts begin anew."""
    limited = throttle_of(None, window=1)
    assert await attempts(limited, 5, "ann", "10.0.0.1") == 3
    await asyncio.sleep(1.05)
    assert await attempts(limited, 5, "ann", "10.0.0.1") == 3


async def test_memory_forgets_what_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that expired are swept out, live ones stay, and nobody holds a place for ever."""
    monkeypatch.setattr(counts, "SWEEP_AT_LEAST", 10)
    tally = LocalCounts(0.05)

    async def fail(*names: str) -> list[Count]:
        found = await tally.enter(names, "it")
        await tally.leave(names, "it", failed=True)
        return found

    await fail(*[f"old{n}" for n in range(10)])
    await asyncio.sleep(0.06)
    tally._window = WINDOW
    new = [f"new{n}" for n in range(5)]
    assert await fail(*new) == [(0, 1, WINDOW)] * 5
    assert tally._failed.keys() == set(new)
    assert not tally._held
    assert [(found.failed, found.held) for found in await fail("new0", "old0")] == [(1, 1), (0, 1)]
