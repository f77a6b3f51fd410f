"""The blocklist on a Redis of its own that is flushed, stopped, filled, demoted and lied to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from api.blocklist import Blocklist, Verdict
from api.blocklist.ledger import Ledger, Row
from api.db import Database
from api.errors import Unavailable
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


def claims(name: str, version: int = 1, kind: str = "access") -> dict[str, Any]:
    """Return the claims of a token of the session and user ``name``."""
    return {"jti": f"j{name}", "sid": f"s{name}", "sub": f"u{name}", "ver": version, "type": kind}


def later(seconds: int = 300) -> datetime:
    """Return a moment ahead."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def revoke(blocklist: Blocklist, name: str) -> None:
    """End the session ``name``."""
    async with blocklist.transaction() as tx:
        await tx.revoke_session(f"s{name}", later())


async def warm(blocklist: Blocklist) -> None:
    """Wait until Redis is trusted again."""
    async with asyncio.timeout(5):
        while not blocklist.status().is_warm:
            await asyncio.sleep(0.02)


async def test_verdicts(workers: list[Blocklist]) -> None:
    """A token, a session, a floor: each in both workers at once; REVOKED beats STALE."""
    one, two = workers
    async with one.transaction() as tx:
        await tx.revoke_token("jA", later())
        await tx.revoke_session("sB", later())
        await tx.raise_floor("uC", 3, later())
        await tx.raise_floor("uA", 3, later())
    for blocklist in (one, two):
        await warm(blocklist)
        assert await blocklist.check(claims("A")) is Verdict.REVOKED
        assert await blocklist.check(claims("B")) is Verdict.REVOKED
        assert await blocklist.check(claims("C", 2)) is Verdict.STALE
        assert await blocklist.check(claims("C", 3)) is Verdict.VALID
        assert await blocklist.check(claims("C", 2, "refresh")) is Verdict.VALID
        assert await blocklist.check(claims("D")) is Verdict.VALID


async def test_a_floor_is_never_lowered(workers: list[Blocklist], server: RedisServer) -> None:
    """Published out of order, or over garbage, the highest floor stands; in the ledger too."""
    one, two = workers
    for floor in (5, 4):
        async with one.transaction() as tx:
            await tx.raise_floor("uF", floor, later())
    assert await two.check(claims("F", 4)) is Verdict.STALE
    assert await server.command("GET", "rolecall:u:uF") == b"5"
    await server.command("FLUSHALL")
    assert await two.check(claims("F", 4)) is Verdict.STALE


async def test_no_entry_is_ever_shortened(workers: list[Blocklist], server: RedisServer) -> None:
    """Taken back again with an earlier expiry, it stays as long as it would have (41)."""
    one, _ = workers
    for seconds in (300, -1000):
        async with one.transaction() as tx:
            await tx.revoke_token("jL", later(seconds))
            await tx.raise_floor("uL", 7, later(seconds))
    for key in ("rolecall:j:jL", "rolecall:u:uL"):
        assert await server.command("PTTL", key) > 300_000
    assert await one.check(claims("L")) is Verdict.REVOKED


async def test_checks_that_arrive_together_share_one_lookup(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """Fifty checks at once cost a few MGETs, not fifty."""
    await server.command("CONFIG", "RESETSTAT")
    await asyncio.gather(*(workers[0].check(claims(str(n))) for n in range(50)))
    stats = await server.command("INFO", "commandstats")
    assert 1 <= stats["cmdstat_mget"]["calls"] <= 8


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


async def wrong_type(server: RedisServer) -> None:
    await server.swap_for_a_list("rolecall:s:sold")


async def wrong_types(server: RedisServer) -> None:
    await server.swap_for_a_list("rolecall:s:sold", "rolecall:epoch", "rolecall:base")


async def garbage(server: RedisServer) -> None:
    for key in ("rolecall:s:sold", "rolecall:s:slive", "rolecall:u:ulive", "rolecall:epoch"):
        await server.command("SET", key, "garbage")


async def reset(server: RedisServer) -> None:
    await server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


FAULTS = [
    flush, restart_empty, hang, kill, read_only, fill, evict, wrong_type,
    wrong_types, garbage, reset,
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
    """A server that hung finds the command when it goes on: by its clock the lease is over."""
    index = workers[0]._index
    run_id, now = await index.server()
    until = await index.complete_until(run_id)
    assert until is not None
    await workers[0]._reconciler.stop()
    await workers[1]._reconciler.stop()
    await server.command("DEL", "rolecall:epoch")
    assert not await index.lease(run_id, now - 1500, until)
    assert await server.command("GET", "rolecall:epoch") is None
    assert await index.lease(run_id, now, until)
    assert 0 < await server.command("PTTL", "rolecall:epoch") <= 1500


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
    assert await server.command("EXISTS", "rolecall:base") == 1
    assert await server.command("EXISTS", "rolecall:s:slate") == 0
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

    for every in ("begun", "rows"):
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
            await tx.revoke_session("sX", later())
            raise ZeroDivisionError
    for blocklist in workers:
        assert await blocklist.check(claims("X")) is Verdict.VALID


async def test_expired_rows_are_pruned_and_no_others(database: Database) -> None:
    """A row is forgotten once all its tokens have expired, in small batches."""
    from api.blocklist.ledger import Ledger, Row

    ledger = Ledger(database)
    async with database.write() as session:
        for number in range(3):
            await ledger.record(session, [Row("jti", f"old{number}", 0, later(-500))])
        await ledger.record(session, [Row("jti", "new", 0, later())])
    assert [await ledger.prune(2) for _ in range(3)] == [2, 1, 0]
    assert await ledger.look_up([("jti", "new"), ("jti", "old0")]) == {("jti", "new"): 0}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (hang, {"timeout"}),
        (kill, {"no connection"}),
        (read_only, {"read-only"}),
        (fill, {"out of memory"}),
        # Redis itself is well: whoever comes first finds no epoch, or has mended it already
        (flush, {"no epoch", None}),
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
    """Entries by kind, the server that is trusted, how far behind; and that Redis is away."""
    one, _ = workers
    await revoke(one, "A")
    async with one.transaction() as tx:
        await tx.revoke_token("jB", later())
        await tx.raise_floor("uC", 3, later())
    await warm(one)
    report = await one.report()
    assert report.entries == {"sid": 1, "jti": 1, "sub": 1}
    info = await server.command("INFO", "server")
    assert report.epoch == info["run_id"]
    assert 0 < report.lease_seconds <= 1.5
    assert report.lag_seconds is not None
    assert 0 <= report.lag_seconds <= 3
    assert report.fault is None
    server.stop()
    report = await one.report()
    assert report.entries == {"sid": 1, "jti": 1, "sub": 1}
    assert (report.epoch, report.lease_seconds, report.complete_until) == (None, 0.0, None)
    assert report.fault


async def test_a_rebuild_on_demand_puts_right_what_is_wrong(
    workers: list[Blocklist], server: RedisServer
) -> None:
    """What is missing is written, what is not of our making goes, and live stays live."""
    one, two = workers
    await revoke(one, "old")
    await server.command("DEL", "rolecall:s:sold")
    await server.command("SET", "rolecall:s:slive", "1")
    await server.swap_for_a_list("rolecall:u:ulive")
    await server.command("SET", "other", "1")
    assert await two.check(claims("old")) is Verdict.VALID
    await one.rebuild()
    for blocklist in workers:
        await warm(blocklist)
        assert await blocklist.check(claims("old")) is Verdict.REVOKED
        assert await blocklist.check(claims("live")) is Verdict.VALID
    keys = await server.command("KEYS", "*")
    assert b"other" in keys
    assert not {b"rolecall:s:slive", b"rolecall:u:ulive"} & set(keys)


async def test_no_lookup_walks_the_whole_ledger(database: Database) -> None:
    """While Redis is cold each check asks the ledger, however many rows there are."""
    plans: list[str] = []

    def explained(connection: Any, _cursor: Any, statement: str, asked: Any, *_: Any) -> None:
        if "revocations" in statement and not statement.startswith("EXPLAIN"):
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", asked)
            plans.extend(row[3] for row in rows)

    ledger = Ledger(database)
    row = Row("sid", "s", 0, datetime.now(UTC) - timedelta(days=1))
    async with database.write() as session:
        await ledger.record(session, [row])
    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", explained)
    found = await ledger.look_up([("jti", "j"), ("sid", "s"), ("sub", "u"), ("jti", "s")])
    assert found == {("sid", "s"): 0}
    assert await ledger.prune(10) == 1
    assert plans
    assert not [plan for plan in plans if plan.startswith("SCAN revocations")]
