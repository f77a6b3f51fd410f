"""The blocklist on a Redis of its own that is flushed, stopped, filled, demoted and lied to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError
from sqlalchemy import event

from api.blocklist import Blocklist, Verdict
from api.blocklist.ledger import Entry, Found, Ledger, missed_rows
from api.db import Database
from api.db.snapshot import Snapshot
from api.errors import Unavailable
from api.services import housekeeping
from tests._redis import RedisServer

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def server(short_tmp: Path, request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    """A Redis of this test's own."""
    server = RedisServer(short_tmp / f"own{abs(hash(request.node.name)) % 10**8}")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def workers(server: RedisServer, database: Database) -> AsyncIterator[list[Blocklist]]:
    """Two workers' blocklists on one Redis and one database."""
    found = [Blocklist(database, server.url) for _ in range(2)]
    for blocklist in found:
        await blocklist.start()
    yield found
    for blocklist in found:
        await blocklist.stop()


def claims(name: str, seq: int = 0, kind: str = "access", **more: Any) -> dict[str, Any]:
    """Return the claims of a token of the session and user ``name``."""
    return {
        "jti": f"j{name}", "sid": f"s{name}", "sub": f"u{name}", "type": kind,
        "seq": seq, "opened_seq": seq, "roles": [], **more,
    }  # fmt: skip


def later(seconds: int = 300) -> datetime:
    """Return a moment ahead."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def revoke(blocklist: Blocklist, name: str) -> None:
    """End the session ``name``."""
    async with blocklist.transaction() as tx:
        tx.revoke_session(f"s{name}", later())  # type: ignore[arg-type]


async def warm(blocklist: Blocklist) -> None:
    """Wait until Redis is trusted again."""
    async with asyncio.timeout(5):
        while not blocklist.status().is_warm:
            await asyncio.sleep(0.02)


async def raised(blocklist: Blocklist, kind: str, subject: str, **more: Any) -> int:
    """Raise a floor; return the number."""
    async with blocklist.transaction() as tx:
        return await tx.raise_floor(kind, subject, later(), **more)


async def test_verdicts(workers: list[Blocklist]) -> None:
    """A token, a session, each floor: in both workers at once; REVOKED beats STALE."""
    one, two = workers
    async with one.transaction() as tx:
        tx.revoke_token("jA", later())
        tx.revoke_session("sB", later())  # type: ignore[arg-type]
        floor = await tx.raise_floor("user", "uC", later())
        assert await tx.raise_floor("user", "uA", later()) == floor
    before, after = floor - 1, floor
    for blocklist in (one, two):
        await warm(blocklist)
        assert await blocklist.check(claims("A", before)) is Verdict.REVOKED
        assert await blocklist.check(claims("B", after)) is Verdict.REVOKED
        assert await blocklist.check(claims("C", before)) is Verdict.STALE
        assert await blocklist.check(claims("C", after)) is Verdict.VALID
        assert await blocklist.check(claims("C", before, "refresh")) is Verdict.VALID
        assert await blocklist.check(claims("D", before)) is Verdict.VALID


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_each_floor_refuses_what_it_concerns(
    workers: list[Blocklist], server: RedisServer, is_trusted: bool
) -> None:
    """Of a client app, a role, narrowed tokens: by Redis and by the database alike."""
    one, two = workers
    floors = {
        "client": ({"client_id": "cX"}, await raised(one, "client", "cX")),
        "role": ({"roles": ["other", "writer"]}, await raised(one, "role", "writer")),
        "scope": ({"scope": "a:read"}, await raised(one, "scope", "narrowed")),
    }
    ended = await raised(one, "client_ended", "cY")
    if not is_trusted:
        await kill(server)
    for kind, (more, floor) in floors.items():
        for blocklist in (one, two):
            assert await blocklist.check(claims("L", floor - 1, **more)) is Verdict.STALE, kind
            assert await blocklist.check(claims("L", floor, **more)) is Verdict.VALID, kind
    assert await two.check(claims("L")) is Verdict.VALID
    assert await two.check(claims("L", ended - 1, client_id="cY")) is Verdict.REVOKED
    assert await two.check(claims("L", ended - 1, "refresh", client_id="cY")) is Verdict.REVOKED
    assert await two.check(claims("L", ended, client_id="cY")) is Verdict.VALID


async def test_a_token_without_numbers_counts_as_the_oldest(workers: list[Blocklist]) -> None:
    """The version before made tokens without ``seq`` and ``opened_seq``."""
    old = {name: value for name, value in claims("O").items() if not name.endswith("seq")}
    assert await workers[0].check(old) is Verdict.VALID
    await raised(workers[0], "user", "uO")
    assert await workers[0].check(old) is Verdict.STALE
    await raised(workers[0], "user_ended", "uO")
    assert await workers[0].check(old) is Verdict.REVOKED


async def test_of_all_sessions_that_end_one_is_spared(workers: list[Blocklist]) -> None:
    """The session exempt goes on with its older tokens, until the floor is raised again."""
    one, two = workers
    first = await raised(one, "user_ended", "uS", exempt="sS")
    assert await two.check(claims("S", first - 1)) is Verdict.VALID
    other = claims("S", first - 1) | {"sid": "sOther"}
    assert await two.check(other) is Verdict.REVOKED
    await raised(one, "user_ended", "uS")
    assert await two.check(claims("S", first - 1)) is Verdict.REVOKED


async def test_a_floor_is_never_lowered(
    workers: list[Blocklist], server: RedisServer, database: Database
) -> None:
    """Published out of order, the highest floor stands with its exemption, in both places."""
    one, two = workers
    high = await raised(one, "user_ended", "uF", exempt="sF")
    low = Entry("user_ended", "uF", high - 10, later(900).timestamp())
    await one._index.publish([low])
    async with database.write() as session:
        await one._ledger.record(session, [low], 1)
    for _ in range(2):
        assert await two.check(claims("F", high - 1)) is Verdict.VALID
        assert await two.check(claims("F", high - 1) | {"sid": "s2"}) is Verdict.REVOKED
        await flush(server)
    value = await one._ledger.look_up(["user_ended:uF"])
    assert value == {"user_ended:uF": Found(high, "sF")}


async def test_no_entry_is_ever_shortened(workers: list[Blocklist], server: RedisServer) -> None:
    """Revoked again with an earlier expiry, it stays as long as it would have (41)."""
    one, _ = workers
    for seconds in (300, -1000):
        async with one.transaction() as tx:
            tx.revoke_token("jL", later(seconds))
            await tx.raise_floor("user", "uL", later(seconds))
    for field in ("jti:jL", "user:uL"):
        value = await server.command("HGET", "rolecall:revocations", field)
        assert int(value.split()[1]) > later(300).timestamp()
    assert await one.check(claims("L")) is Verdict.REVOKED


async def test_expired_entries_are_swept_out_of_redis(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """In bounded steps; what is good for longer stays, and so does what vouches for the hash."""
    one, _ = workers
    old = [Entry("jti", f"old{n}", 0, later(-500).timestamp()) for n in range(700)]
    await one._index.load([*old, Entry("jti", "new", 0, later().timestamp())])
    assert await housekeeping.in_batches(one.sweep) >= 0
    left = await server.command("HKEYS", "rolecall:revocations")
    assert {b"jti:new", b"epoch", b"build"} <= set(left)
    assert b"jti:old0" not in left
    assert one.status().is_warm


async def test_checks_that_arrive_together_share_one_lookup(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """Fifty checks at once cost a few scripts, not fifty."""
    await server.command("CONFIG", "RESETSTAT")
    await asyncio.gather(*(workers[0].check(claims(str(n))) for n in range(50)))
    stats = await server.command("INFO", "commandstats")
    assert 1 <= stats["cmdstat_evalsha"]["calls"] <= 12


async def flush(server: RedisServer) -> None:
    await server.command("FLUSHALL")


async def restart_empty(server: RedisServer) -> None:
    server.restart_empty()


async def hang(server: RedisServer) -> None:
    server.signal(signal.SIGSTOP)


async def kill(server: RedisServer) -> None:
    server.stop()


async def read_only(server: RedisServer) -> None:
    await server.command("REPLICAOF", "127.0.0.1", "1")


async def fill(server: RedisServer) -> None:
    await server.command("CONFIG", "SET", "maxmemory", "1")


async def evict(server: RedisServer) -> None:
    await server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    await server.command("CONFIG", "SET", "maxmemory", "100mb")


async def evicted(server: RedisServer) -> None:
    """Fill the memory with other keys until ours are gone."""
    used = (await server.command("INFO", "memory"))["used_memory"]
    await server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
    await server.command("CONFIG", "SET", "maxmemory", str(used + 300_000))
    fill = "for n = 1, 3000 do redis.call('SET', 'other' .. n, string.rep('x', 1000)) end"
    with contextlib.suppress(ResponseError):
        await server.command("EVAL", fill, "0")
    assert (await server.command("INFO", "stats"))["evicted_keys"] > 0


async def deleted(server: RedisServer) -> None:
    await server.command("DEL", "rolecall:revocations")


async def wrong_type(server: RedisServer) -> None:
    await server.swap_for_a_list("rolecall:revocations")


async def wrong_types(server: RedisServer) -> None:
    await server.swap_for_a_list("rolecall:revocations", "rolecall:rebuild")


async def garbage(server: RedisServer) -> None:
    await server.command("SET", "rolecall:revocations", "garbage")


async def garbage_within(server: RedisServer) -> None:
    fields = ("sid:sold", "sid:slive", "user:ulive", "epoch")
    await server.command(
        "HSET", "rolecall:revocations", *(word for f in fields for word in (f, "garbage"))
    )


async def reset(server: RedisServer) -> None:
    await server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


FAULTS = [
    flush, restart_empty, hang, kill, read_only, fill, evict, evicted, deleted, wrong_type,
    wrong_types, garbage, garbage_within, reset,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
async def test_a_fault_lets_nothing_in_and_shuts_nobody_out(
    workers: list[Blocklist], server: RedisServer, fault: Callable[[RedisServer], Any]
) -> None:
    """Before, during and right after: revoked is refused, live is let in, in both workers (42)."""
    one, two = workers
    await revoke(one, "old")
    await fault(server)

    async def truth(*ended: str) -> None:
        for blocklist in workers:
            for name in ended:
                assert await blocklist.check(claims(name)) is Verdict.REVOKED
            assert await blocklist.check(claims("live")) is Verdict.VALID

    await truth("old")
    await revoke(two, "new")
    await truth("old", "new")
    if fault is hang:
        server.signal(signal.SIGCONT)
    for _ in range(12):
        await truth("old", "new")
        await asyncio.sleep(0.1)


async def test_a_lease_that_arrives_late_is_none(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """A server that hung runs the command when it goes on: by its clock the lease is over."""
    for worker in workers:
        await worker._reconciler.stop()
    index = workers[0]._index
    state = await index.state()
    assert state.build is not None
    assert not await index.lease(replace(state, now=state.now - 1500), "1:")
    assert not await index.lease(replace(state, build="another build"), "1:")
    assert not await index.lease(replace(state, mark="another pass"), "1:")
    await asyncio.sleep(1.6)
    assert await index.lease_left() == 0
    state = await index.state()
    assert await index.lease(state, "1:")
    assert 0 < await index.lease_left() <= 1.5


async def test_a_hung_redis_costs_one_limit_then_nothing(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """The first check waits for the limit, those behind the open breaker do not ask (47)."""
    await hang(server)
    began = time.monotonic()
    await workers[0].check(claims("a"))
    first = time.monotonic() - began
    began = time.monotonic()
    for _ in range(20):
        await workers[0].check(claims("a"))
    assert (time.monotonic() - began) / 20 < first
    assert not workers[0].status().is_warm
    server.signal(signal.SIGCONT)
    await warm(workers[0])


async def test_a_restart_from_a_stale_file_is_noticed(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """A file from before the revocation has an epoch too, but not this server's (42)."""
    await server.command("SAVE")
    await revoke(workers[0], "late")
    server.stop()
    server.start()
    assert await server.command("HEXISTS", "rolecall:revocations", "epoch") == 1
    assert await server.command("HEXISTS", "rolecall:revocations", "sid:slate") == 0
    for blocklist in workers:
        assert await blocklist.check(claims("late")) is Verdict.REVOKED


async def test_without_the_database_a_warm_redis_answers(
    workers: list[Blocklist], server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database down: warm Redis answers beyond the lease (44); both down: Unavailable (45)."""
    one, _ = workers
    await revoke(one, "old")
    await warm(one)

    def down(*_: Any, **__: Any) -> Any:
        raise Unavailable

    for every in ("begun", "look"):
        monkeypatch.setattr(Database, every, down)
    for _ in range(5):
        assert await one.check(claims("live")) is Verdict.VALID
        assert await one.check(claims("old")) is Verdict.REVOKED
        await asyncio.sleep(0.5)
    await flush(server)
    with pytest.raises(Unavailable):
        await one.check(claims("live"))
    monkeypatch.undo()
    await warm(one)
    assert await one.check(claims("old")) is Verdict.REVOKED


async def test_cancelled_checks_mix_up_no_answers(workers: list[Blocklist]) -> None:
    """500 checks cancelled midway: every later answer belongs to its question (46)."""
    one, _ = workers
    await revoke(one, "old")
    await warm(one)
    for _ in range(50):
        tasks = [asyncio.create_task(one.check(claims("old"))) for _ in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await one.check(claims("live")) is Verdict.VALID
        assert await one.check(claims("old")) is Verdict.REVOKED


async def test_a_rolled_back_transaction_takes_nothing_back(workers: list[Blocklist]) -> None:
    """What raises inside is in neither the ledger nor Redis."""
    with pytest.raises(ZeroDivisionError):
        async with workers[0].transaction() as tx:
            tx.revoke_session("sX", later())  # type: ignore[arg-type]
            raise ZeroDivisionError
    for blocklist in workers:
        assert await blocklist.check(claims("X")) is Verdict.VALID


async def test_expired_rows_are_pruned_and_no_others(database: Database) -> None:
    """A row is deleted once all its tokens have expired, in small batches."""
    ledger = Ledger(database)
    old = [Entry("jti", f"old{number}", 0, later(-500).timestamp()) for number in range(3)]
    async with database.write() as session:
        await ledger.record(session, [*old, Entry("jti", "new", 0, later().timestamp())], 1)
    assert [await ledger.prune(2) for _ in range(3)] == [2, 1, 0]
    found = await ledger.look_up(["jti:new", "jti:old0"])
    assert found == {"jti:new": Found(0)}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (hang, {"timeout"}),
        (kill, {"no connection"}),
        (read_only, {"read-only"}),
        (fill, {"out of memory"}),
        # Redis itself is well: whoever comes first finds no epoch, or has mended it already
        (flush, {"no epoch", "being rebuilt", None}),
        (evict, {"may evict"}),
    ],
)
async def test_why_redis_is_cold_is_told_in_words_of_ours(
    workers: list[Blocklist],
    server: RedisServer,
    fault: Callable[[RedisServer], Any],
    words: set[str | None],
) -> None:
    """What /health/ready shows anybody names no class, no library and no address."""
    await warm(workers[0])
    await fault(server)
    await revoke(workers[0], "x")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(3):
            while workers[0].status().reason not in words:
                await asyncio.sleep(0.02)
    assert workers[0].status().reason in words
    if fault is hang:
        server.signal(signal.SIGCONT)


async def test_a_report_tells_how_it_stands(workers: list[Blocklist], server: RedisServer) -> None:
    """Entries by kind, the server that is trusted, for how long; and that Redis is away."""
    one, _ = workers
    await revoke(one, "A")
    async with one.transaction() as tx:
        tx.revoke_token("jB", later())
        await tx.raise_floor("user", "uC", later())
    await warm(one)
    report = await one.report()
    assert report.entries == {"sid": 1, "jti": 1, "user": 1}
    info = await server.command("INFO", "server")
    assert report.server == info["run_id"]
    assert report.trusted == {info["run_id"]}
    assert not report.is_other_index
    assert 0 < report.lease_seconds <= 1.5
    assert report.fault is None
    server.stop()
    report = await one.report()
    assert report.entries == {"sid": 1, "jti": 1, "user": 1}
    assert (report.server, report.lease_seconds) == (None, 0.0)
    assert report.fault


async def test_a_rebuild_on_demand_puts_right_what_is_wrong(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """What is missing is written, what is not in the ledger goes, and live stays live."""
    one, two = workers
    await revoke(one, "old")
    await server.command("HDEL", "rolecall:revocations", "sid:sold")
    await server.command("HSET", "rolecall:revocations", "sid:slive", "0 9999999999")
    await server.command("SET", "other", "1")
    assert await two.check(claims("old")) is Verdict.VALID
    await one.rebuild()
    for blocklist in workers:
        await warm(blocklist)
        assert await blocklist.check(claims("old")) is Verdict.REVOKED
        assert await blocklist.check(claims("live")) is Verdict.VALID
    assert await server.command("EXISTS", "other") == 1
    assert await server.command("HEXISTS", "rolecall:revocations", "sid:slive") == 0


async def test_no_lookup_walks_the_whole_ledger(database: Database) -> None:
    """While Redis is cold each check asks the ledger, however many rows there are."""
    plans: list[str] = []

    def explained(connection: Any, _cursor: Any, statement: str, asked: Any, *_: Any) -> None:
        if "revocations" in statement and not statement.startswith("EXPLAIN"):
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", asked)
            plans.extend(row[3] for row in rows)

    ledger = Ledger(database)
    row = Entry("sid", "s", 0, later(-86_400).timestamp())
    async with database.write() as session:
        await ledger.record(session, [row], 1)
    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", explained)
    found = await ledger.look_up(["jti:j", "sid:s", "user:u", "jti:s"])
    assert found == {"sid:s": Found(0)}
    await ledger.batch(None, 10, missed_rows(Snapshot(1, (0,)), Snapshot(9)))
    assert await ledger.prune(10) == 1
    assert plans
    assert not [plan for plan in plans if plan.startswith("SCAN revocations")]
