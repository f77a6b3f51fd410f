"""Workers that keep Redis complete, whatever transactions, servers and other workers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from api.blocklist import OTHER_INDEX, Blocklist, Verdict
from api.blocklist.ledger import Entry
from api.blocklist.registry import TIMEOUT_SECONDS
from api.db import Database, db_now, sequence, snapshot
from api.db.models import IndexWorker
from api.errors import Unavailable
from tests._redis import RedisServer
from tests.unit.test_blocklist import claims, later, revoke, warm

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def servers(
    short_tmp: Path, request: pytest.FixtureRequest
) -> AsyncIterator[list[RedisServer]]:
    """Two Redis servers of this test's own."""
    number = abs(hash(request.node.name)) % 10**8
    found = [RedisServer(short_tmp / f"r{number}-{which}") for which in range(2)]
    for server in found:
        server.start()
    yield found
    for server in found:
        server.stop()


@asynccontextmanager
async def worker(database: Database, server: RedisServer) -> AsyncIterator[Blocklist]:
    """A started blocklist, with a pool of its own as another process has."""
    blocklist = Blocklist(Database(database.url), server.url)
    await blocklist.start()
    try:
        yield blocklist
    finally:
        await blocklist.stop()
        await blocklist._database.close()


async def ticks(*blocklists: Blocklist, number: int = 2) -> None:
    """Let each worker do some passes."""
    for _ in range(number):
        for blocklist in blocklists:
            await blocklist._reconciler.tick()


async def test_a_floor_that_commits_late_reaches_every_worker(
    database: Database, servers: list[RedisServer]
) -> None:
    """Its transaction takes many passes, and its worker dies before Redis is told (80)."""
    server, _ = servers
    async with worker(database, server) as one, worker(database, server) as two:
        async with database.write() as slow:
            number = await slow.run_sync(snapshot.transaction_id)
            if database.dialect == "postgresql":
                # others commit meanwhile, and each pass sees more than this one's start
                await revoke(one, "other")
                await ticks(one, two, number=3)
            floor = await sequence.advance(slow)
            entry = one_entry("role", "late", floor)
            await one._ledger.record(slow, [entry], number)
        await ticks(one, two, number=1)
        for blocklist in (one, two):
            assert blocklist.status().is_warm
            stale = claims("L", floor - 1, roles=["late"])
            assert await blocklist.check(stale) is Verdict.STALE
            assert await blocklist.check(stale | {"seq": floor}) is Verdict.VALID


def one_entry(kind: str, subject: str, floor: int) -> Entry:
    """Return an entry that is good for a while."""
    return Entry(kind, subject, floor, later().timestamp())


async def test_two_workers_with_two_servers_agree_on_one(
    database: Database, servers: list[RedisServer]
) -> None:
    """The first server stays the index; the other worker asks the database, and says why (84)."""
    async with worker(database, servers[0]) as one, worker(database, servers[1]) as two:
        assert one.status().is_warm
        assert (two.status().is_warm, two.status().reason) == (False, OTHER_INDEX)
        assert (await two.report()).is_other_index
        assert not (await one.report()).is_other_index
        for revoking, checking in ((one, two), (two, one)):
            name = f"by{id(revoking)}"
            assert await checking.check(claims(name)) is Verdict.VALID
            await revoke(revoking, name)
            # from the answer on, with no pass in between
            assert await checking.check(claims(name)) is Verdict.REVOKED
            assert await revoking.check(claims(name)) is Verdict.REVOKED
        assert one.status().is_warm


async def test_when_nobody_trusts_the_index_another_server_becomes_it(
    database: Database, servers: list[RedisServer]
) -> None:
    """The other server is filled from the ledger and trusted, once the last worker has left."""
    one = Blocklist(Database(database.url), servers[0].url)
    await one.start()
    async with worker(database, servers[1]) as two:
        await revoke(one, "old")
        await ticks(two)
        assert two.status().reason == OTHER_INDEX
        await one.stop()
        await one._database.close()
        await ticks(two, number=1)
        assert two.status().is_warm
        assert await two.check(claims("old")) is Verdict.REVOKED


@ON_SQLITE
async def test_a_revocation_waits_for_a_worker_that_cannot_be_asked(
    database: Database, servers: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker has lost the database, and this one reaches another Redis: 503, never 2xx.

    Once the other worker has gone for good, or reads the database again, it is 2xx.
    """
    monkeypatch.setattr("api.blocklist.PUBLISH_SECONDS", 2.0)
    async with worker(database, servers[0]) as blind, worker(database, servers[1]) as one:
        await blind._reconciler._background.stop()
        assert blind.status().is_warm
        with pytest.raises(Unavailable, match="Repeat"):
            await revoke(one, "X")
        # committed all the same, and refused where the database answers
        assert await one.check(claims("X")) is Verdict.REVOKED
        blind._reconciler.start()
        await revoke(one, "Y")
        for name in ("X", "Y"):
            assert await blind.check(claims(name)) is Verdict.REVOKED


@ON_SQLITE
async def test_a_worker_that_is_silent_for_long_counts_no_more(
    database: Database, servers: list[RedisServer]
) -> None:
    """After the time for which it may trust Redis without the database."""
    async with worker(database, servers[0]) as silent, worker(database, servers[1]) as one:
        await silent._reconciler._background.stop()
        async with database.write() as session:
            await session.execute(
                update(IndexWorker)
                .where(IndexWorker.run_id.is_not(None))
                .values(last_heartbeat_at=db_now(-TIMEOUT_SECONDS - 1))
            )
        await revoke(one, "X")
        await ticks(one)
        assert one.status().is_warm
        # it learns that it was given up, and asks the database from then on
        await ticks(silent)
        assert silent.status().reason == OTHER_INDEX
        assert await silent.check(claims("X")) is Verdict.REVOKED


@ON_SQLITE
async def test_a_worker_without_the_database_gives_up_in_time(
    database: Database, servers: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trusts Redis for less long than the others count it (44)."""
    async with worker(database, servers[0]) as one:
        _without_database(one, monkeypatch)
        await ticks(one)
        assert one.status().is_warm
        monkeypatch.setattr(one._reconciler, "_heartbeat_at", one._reconciler._heartbeat_at - 295)
        await ticks(one)
        assert not one.status().is_warm
        with pytest.raises(Unavailable):
            await one.check(claims("X"))
        monkeypatch.undo()
        await ticks(one)
        assert one.status().is_warm


@ON_SQLITE
async def test_the_row_of_a_worker_that_was_killed_hinders_nobody(
    database: Database, servers: list[RedisServer]
) -> None:
    """Its process is no more, on this machine: its server need not be waited for."""
    async with worker(database, servers[0]) as one:
        async with database.write() as session:
            await session.execute(update(IndexWorker).values(pid=2**22 + 1))
        await one._reconciler._background.stop()
        async with worker(database, servers[1]) as two:
            assert two.status().is_warm
            async with database.read() as session:
                ids = list(await session.scalars(select(IndexWorker.id)))
            assert ids == [two._registry._id]


@ON_SQLITE
@pytest.mark.parametrize("how", ["row is gone", "row is older"])
async def test_a_database_that_went_back_in_time_is_noticed(
    database: Database, servers: list[RedisServer], how: str
) -> None:
    """A restore, or a failover that lost the last commits: Redis is built anew."""
    async with worker(database, servers[0]) as one:
        build = (await one._index.state()).build
        async with database.write() as session:
            change: Any = delete(IndexWorker)
            if how == "row is older":
                change = update(IndexWorker).values(heartbeats=IndexWorker.heartbeats - 1)
            await session.execute(change)
        # on SQLite it is not asked in every pass
        one._reconciler._heartbeat_at = 0.0
        await ticks(one, number=1)
        await warm(one)
        await ticks(one, number=1)
        assert (await one._index.state()).build != build
        await revoke(one, "X")
        assert await one.check(claims("X")) is Verdict.REVOKED


@ON_SQLITE
async def test_an_older_copy_of_the_hash_is_noticed(
    database: Database, servers: list[RedisServer]
) -> None:
    """Under the same run id: a replica that took over and back, a RESTORE; also within a lease."""
    key = "rolecall:revocations"
    async with worker(database, servers[0]) as one, worker(database, servers[0]) as two:
        copy = await servers[0].command("DUMP", key)
        await revoke(one, "X")
        await ticks(one, two)
        await servers[0].command("RESTORE", key, "0", copy, "REPLACE")
        for blocklist in (one, two):
            assert await blocklist.check(claims("X")) is Verdict.REVOKED
        await ticks(one, two)
        assert await servers[0].command("HEXISTS", key, "sid:sX") == 1
        # in the midst of a pass: the lease is not extended for it
        state = await one._index.state()
        await servers[0].command("RESTORE", key, "0", copy, "REPLACE")
        assert not await one._index.lease(state, "9:")


@ON_SQLITE
async def test_a_server_that_changes_while_a_worker_registers_is_not_trusted(
    database: Database, servers: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica without the last writes has a hash of the same name."""
    key = "rolecall:revocations"
    async with worker(database, servers[0]) as one:
        await one._reconciler._background.stop()
        copy = await servers[0].command("DUMP", key)
        await revoke(one, "X")
        await servers[1].command("RESTORE", key, "0", copy)
        register = one._registry.register
        one._index.close("a moment's trouble")
        await one._reconciler.tell_others()

        async def then_another(run_id: str) -> Any:
            found = await register(run_id)
            await one._index._line.hang_up()
            one._index._line._connection.path = str(servers[1].socket)  # type: ignore[attr-defined]
            return found

        monkeypatch.setattr(one._registry, "register", then_another)
        await ticks(one, number=1)
        assert not one.status().is_warm
        monkeypatch.undo()
        await ticks(one)
        assert one.status().is_warm
        assert await one.check(claims("X")) is Verdict.REVOKED
        assert await servers[1].command("HEXISTS", key, "sid:sX") == 1


@ON_SQLITE
async def test_a_database_that_was_replaced_is_noticed_by_whoever_revokes(
    database: Database, servers: list[RedisServer]
) -> None:
    """By an old copy, in which no worker is alive: nobody trusts Redis when it is answered."""
    async with worker(database, servers[0]) as one, worker(database, servers[0]) as two:
        for blocklist in (one, two):
            await blocklist._reconciler._background.stop()
        async with database.write() as session:
            await session.execute(
                update(IndexWorker).values(last_heartbeat_at=db_now(-TIMEOUT_SECONDS - 1))
            )
        await revoke(one, "X")
        for blocklist in (one, two):
            assert await blocklist.check(claims("X")) is Verdict.REVOKED
        await ticks(one, two)
        for blocklist in (one, two):
            assert blocklist.status().is_warm
            assert await blocklist.check(claims("X")) is Verdict.REVOKED


@ON_SQLITE
async def test_floors_that_the_database_lost_make_no_new_token_stale(
    database: Database, servers: list[RedisServer]
) -> None:
    """The sequence goes on from the highest number in Redis, unless that is none of ours."""
    async with worker(database, servers[0]) as one:
        before = await database.look(sequence.current)
        key = "rolecall:revocations"
        for junk in ("9" * 18, "9" * 40, "junk", str(before + 10**9)):
            await servers[0].command("HSET", key, "highest", junk)
            await ticks(one, number=2)
            assert await database.look(sequence.current) == before
        await servers[0].command("HSET", key, "highest", "0")
        highest = before + 10**7
        await one._index.publish([one_entry("user", "uX", highest)])
        await ticks(one, number=2)
        assert await database.look(sequence.current) == highest
        assert await one.check(claims("X", highest)) is Verdict.VALID


@ON_SQLITE
async def test_a_worker_joins_a_hash_that_another_keeps(
    database: Database, servers: list[RedisServer]
) -> None:
    """It reads what is missing, not the whole ledger; the first alone builds."""
    async with worker(database, servers[0]) as one:
        await revoke(one, "old")
        build = (await one._index.state()).build
        async with worker(database, servers[0]) as two:
            assert two.status().is_warm
            assert (await two._index.state()).build == build
            assert await two.check(claims("old")) is Verdict.REVOKED
    async with worker(database, servers[0]) as three:
        # nobody vouched for it meanwhile
        assert (await three._index.state()).build != build
        assert await three.check(claims("old")) is Verdict.REVOKED


@ON_SQLITE
async def test_what_is_lost_while_it_is_built_is_not_trusted(
    database: Database, servers: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FLUSHALL in the midst of a rebuild: the hash that is left never gets its name."""
    async with worker(database, servers[0]) as one:
        await revoke(one, "old")
        batch = one._ledger.batch

        async def flushing(*args: Any) -> Any:
            found = await batch(*args)
            if args[0] is not None:
                monkeypatch.undo()
                await servers[0].command("FLUSHALL")
            return found

        monkeypatch.setattr(one._ledger, "batch", flushing)
        await one._index.forget()
        await ticks(one, number=1)
        assert await one.check(claims("old")) is Verdict.REVOKED
        await warm(one)
        assert await one.check(claims("old")) is Verdict.REVOKED


@ON_SQLITE
async def test_passes_do_not_mix_with_a_worker_that_steps_down(
    database: Database, servers: list[RedisServer]
) -> None:
    """Fifty revocations while Redis comes and goes: none is accepted after its answer."""
    async with worker(database, servers[0]) as one, worker(database, servers[0]) as two:
        for number in range(12):
            if number % 4 == 1:
                servers[0].stop()
            if number % 4 == 3:
                servers[0].start()
            await revoke(one, f"n{number}")
            for blocklist in (one, two):
                assert await blocklist.check(claims(f"n{number}")) is Verdict.REVOKED
            await asyncio.sleep(0.1)


def _without_database(blocklist: Blocklist, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> Any:
        raise Unavailable

    for name in ("begun", "look"):
        monkeypatch.setattr(blocklist._database, name, down)


@ON_SQLITE
async def test_an_older_copy_of_the_hash_is_noticed_without_the_database(
    database: Database, servers: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can replay what it lacks: it is not trusted."""
    key = "rolecall:revocations"
    async with worker(database, servers[0]) as one, worker(database, servers[0]) as two:
        copy = await servers[0].command("DUMP", key)
        await revoke(one, "X")
        await asyncio.sleep(0.01)
        await ticks(one, two)
        for blocklist in (one, two):
            await blocklist._reconciler._background.stop()
            _without_database(blocklist, monkeypatch)
        await ticks(one, two)
        assert one.status().is_warm
        assert two.status().is_warm
        await servers[0].command("RESTORE", key, "0", copy, "REPLACE")
        await ticks(one, two)
        for blocklist in (one, two):
            assert not blocklist.status().is_warm
            with pytest.raises(Unavailable):
                await blocklist.check(claims("X"))


@ON_SQLITE
async def test_a_database_that_hangs_does_not_cost_the_index(
    database: Database, servers: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing a connection to it takes seconds: the lease is extended meanwhile."""

    async def hangs(*_: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            # as the driver does it
            await asyncio.sleep(2)

    async with worker(database, servers[0]) as one:
        await one._reconciler._background.stop()
        await ticks(one)
        monkeypatch.setattr(one._database, "look", hangs)
        passes = asyncio.create_task(ticks(one, number=3))
        checks = 0
        while not passes.done():
            assert await one.check(claims("X")) is Verdict.VALID
            assert one.status().is_warm
            checks += 1
            await asyncio.sleep(0.02)
        assert checks > 20


@ON_SQLITE
async def test_an_empty_redis_is_filled_once(
    database: Database, servers: list[RedisServer]
) -> None:
    """Whoever has filled it says so at once: the other worker does not fill it again."""
    async with worker(database, servers[0]) as one, worker(database, servers[0]) as two:
        for blocklist in (one, two):
            await blocklist._reconciler._background.stop()
        await ticks(one, two)
        await servers[0].command("FLUSHALL")
        builds = set()
        for _ in range(3):
            for blocklist in (one, two):
                await ticks(blocklist, number=1)
                builds.add((await blocklist._index.state()).build)
        assert one.status().is_warm
        assert two.status().is_warm
        assert len(builds - {None}) == 1


@ON_SQLITE
async def test_a_lease_from_before_the_clock_was_set_back_is_replaced(
    database: Database, servers: list[RedisServer]
) -> None:
    """An hour ahead it would have an older copy of the hash trusted for as long."""
    async with worker(database, servers[0]) as one:
        await one._reconciler._background.stop()
        await ticks(one)
        ahead = (await one._index.state()).now + 3_600_000
        epoch = f"{one._index.run_id} {ahead}"
        await servers[0].command("HSET", "rolecall:revocations", "epoch", epoch)
        assert await one.check(claims("X")) is Verdict.VALID
        assert await one._index.lease_left() > 3_500
        await ticks(one, number=1)
        assert 0 < await one._index.lease_left() < 2
        assert one.status().is_warm
        assert await one.check(claims("X")) is Verdict.VALID


@ON_SQLITE
@pytest.mark.parametrize("garbage", ["\u00b2", "9" * 30, "9" * 5000])
@pytest.mark.parametrize("where", ["entry", "epoch", "highest"])
async def test_numbers_of_others_are_none(
    database: Database, servers: list[RedisServer], where: str, garbage: str
) -> None:
    """Digits that are not ASCII, or too many: the database answers, and Redis is mended."""
    async with worker(database, servers[0]) as one:
        await revoke(one, "X")
        field, value = {
            "entry": ("sid:sX", f"{garbage} {garbage}"),
            "epoch": ("epoch", f"{one._index.run_id} {garbage}"),
            "highest": ("highest", garbage),
        }[where]
        await servers[0].command("HSET", "rolecall:revocations", field, value)
        assert await one.check(claims("X")) is Verdict.REVOKED
        assert await one.check(claims("Y")) is Verdict.VALID
        await ticks(one)
        await warm(one)
        assert await one.check(claims("X")) is Verdict.REVOKED
        assert (await one._index.lease_left()) < 60
