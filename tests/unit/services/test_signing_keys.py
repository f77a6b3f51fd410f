"""The life of a signing key, on both databases: each state, each race, each refusal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import delete, insert, select, text

from api.auth.keys import KeyRing
from api.db import Database, db_now, migrate
from api.db.models import AuditEvent, Session, SigningKey, User, new_id
from api.errors import Conflict, NotFound
from api.services.audit import Origin
from tests._keys import LIFETIMES, age, expire, ring_on, ripen, states, store_on

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
CONSOLE = Origin(actor="console")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database with a current and a next key of its own."""
    database = Database(database_url)
    async with database.write() as session:
        await session.execute(delete(SigningKey))
    await store_on(database).keep()
    yield database
    await database.close()


async def audited(database: Database) -> list[tuple[str, str | None, str | None, object]]:
    """Return what the log says of keys: action, actor, target, reason."""
    async with database.read() as session:
        query = select(AuditEvent).where(AuditEvent.action.startswith("key"))
        rows = (await session.scalars(query.order_by(AuditEvent.id))).all()
    return [(row.action, row.actor, row.target, row.detail.get("reason")) for row in rows]


async def test_from_next_to_current_to_old_to_retired(database: Database) -> None:
    """Each key goes its way, and is destroyed at its end; every step is in the audit log."""
    store = store_on(database)
    before = await states(store)
    (first,), (second,) = before["current"], before["next"]
    await ripen(database)
    assert (await store.rotate(CONSOLE)).kid == second
    after = await states(store)
    assert (after["current"], after["old"]) == ([second], [first])
    assert len(after["next"]) == 1
    assert after["next"] != [second]
    await store.keep()
    assert await states(store) == after, "an old key goes on verifying"
    await expire(database)
    await store.keep()
    assert (await states(store))["retired"] == [first]
    async with database.read() as session:
        row = await session.get(SigningKey, first)
    assert row is not None
    assert row.private is None
    assert await audited(database) == [
        ("key.rotated", "console", second, "asked"),
        ("key.retired", None, first, "expired"),
    ]


async def test_a_key_that_is_not_known_everywhere_does_not_sign(database: Database) -> None:
    """Before it was published for long enough a rotation is refused, and changes nothing."""
    store = store_on(database, days=1)
    before = await states(store)
    await age(database, 2)
    await store.keep()
    with pytest.raises(Conflict, match="may not know the next key yet"):
        await store.rotate(CONSOLE)
    assert await states(store) == before
    assert await audited(database) == []


async def test_an_old_key_verifies_until_its_last_token_has_expired(database: Database) -> None:
    """Through the longest lifetime of today, and that of sessions opened under a longer one."""
    await ripen(database)
    await store_on(database).rotate(CONSOLE)

    async def kept() -> float:
        async with database.read() as session:
            query = select(SigningKey).where(SigningKey.replaced_at.is_not(None))
            key = (await session.scalars(query.order_by(SigningKey.replaced_at.desc()))).first()
        assert key is not None
        assert key.verifies_until is not None
        assert key.replaced_at is not None
        return (key.verifies_until - key.replaced_at).total_seconds()

    assert await kept() == LIFETIMES.absolute + LIFETIMES.leeway + 60
    async with database.write() as session:
        user_id = await session.scalar(select(User.id).limit(1))
        await session.execute(
            insert(Session).values(
                id=new_id(), user_id=user_id, current_jti="x", ip=None, user_agent=None,
                idle_expires_at=db_now(9_000), expires_at=db_now(9_000),
            )
        )  # fmt: skip
    await ripen(database)
    await store_on(database).rotate(CONSOLE)
    assert 9_060 <= await kept() <= 9_070


async def test_by_age_once_whoever_asks(database: Database) -> None:
    """Ten workers find it due at once: one rotation, by nobody in particular."""
    await ripen(database)
    await age(database, 29)
    stores = [store_on(database, days=30) for _ in range(10)]
    before = await states(stores[0])
    await asyncio.gather(*(store.keep() for store in stores))
    assert await states(stores[0]) == before, "a day too early"
    await age(database, 30)
    await store_on(database).keep()
    assert await states(stores[0]) == before, "it is off by default"
    await asyncio.gather(*(store.keep() for store in stores))
    after = await states(stores[0])
    assert (after["current"], after["old"]) == (before["next"], before["current"])
    assert len(after["next"]) == 1
    assert [row[:2] + row[3:] for row in await audited(database)] == [("key.rotated", None, "age")]


async def test_of_rotations_asked_for_at_once_one_is_made(database: Database) -> None:
    """Two operators: the second is told that the next key is too young."""
    await ripen(database)
    asked = [store_on(database).rotate(CONSOLE) for _ in range(4)]
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert sorted(type(result).__name__ for result in done) == ["Conflict"] * 3 + ["SigningKey"]
    assert len(await audited(database)) == 1


async def test_a_compromise_leaves_nothing_that_verifies(database: Database) -> None:
    """Every key is destroyed at once, the next one too; a new one signs."""
    await ripen(database)
    store = store_on(database)
    await store.rotate(CONSOLE)
    ring = KeyRing(store)
    await ring.load()
    former = {key["kid"] for key in ring.jwks()["keys"]}
    fresh = await store.replace(CONSOLE)
    await ring.load()
    found = await states(store)
    assert set(found["retired"]) == former
    assert (found["current"], found["old"], len(found["next"])) == ([fresh.kid], [], 1)
    assert not any(ring.find(kid) for kid in former)
    async with database.read() as session:
        gone = await session.scalars(select(SigningKey).where(SigningKey.kid.in_(former)))
    assert all(row.private is None for row in gone)


async def test_what_may_be_retired(database: Database) -> None:
    """An old key, and a next one, which has a successor at once; never the one that signs."""
    store = store_on(database)
    await ripen(database)
    await store.rotate(CONSOLE)
    found = await states(store)
    (current,), (following,), (old,) = found["current"], found["next"], found["old"]
    with pytest.raises(Conflict, match="the only one that signs"):
        await store.retire(current, CONSOLE)
    with pytest.raises(NotFound):
        await store.retire("nobody", CONSOLE)
    await store.retire(old, CONSOLE)
    await store.retire(following, CONSOLE)
    with pytest.raises(Conflict, match="retired already"):
        await store.retire(old, CONSOLE)
    after = await states(store)
    assert (after["current"], set(after["retired"])) == ([current], {old, following})
    assert len(after["next"]) == 1
    assert [row[0] for row in await audited(database)][1:] == ["key.retired"] * 2


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
async def test_a_changed_algorithm_takes_over_once_it_is_known(
    database: Database, algorithm: str
) -> None:
    """At the next start a key of it is made; it signs when it may, and the old one verifies on."""
    ring = ring_on(database, algorithm=algorithm)
    await ring.load()
    (first,) = (await states(store_on(database)))["current"]
    assert [key["alg"] for key in ring.jwks()["keys"]] == ["EdDSA"] * 2, "to load is not to serve"
    await ring.start()
    await ring.stop()
    assert ring.current.kid == first
    assert [key["alg"] for key in ring.jwks()["keys"]] == ["EdDSA", algorithm]
    await ripen(database)
    # whoever finds it due does it, and the setting of a worker not yet replaced undoes nothing
    await store_on(database).keep()
    await ring.load()
    assert ring.current.algorithm == algorithm
    assert [key["alg"] for key in ring.jwks()["keys"]] == [algorithm, algorithm, "EdDSA"]
    assert ring.find(first) is not None
    await ripen(database)
    await store_on(database).keep()
    assert (await states(store_on(database)))["current"] == [ring.current.kid]


async def test_processes_whose_clocks_differ_never_sign_what_the_other_refuses(
    database: Database, database_url: str
) -> None:
    """Two processes, one a day ahead, one a day behind: at every step each has the other's key.

    Neither is told of the rotation; each signs at once with what it has.
    """
    rings = [await _Process.start(database_url, skew) for skew in (86_400, -86_400)]
    try:
        for turn in range(4):
            for ring in rings:
                assert await ring.ask("rotate") == "refused", "the next key is young by any clock"
            await ripen(database)
            assert await rings[turn % 2].ask("rotate") == "rotated"
            for one, other in (rings, rings[::-1]):
                # before either has looked, and after one has
                assert await other.ask(f"find {await one.ask('signs')}") == "found"
            await rings[turn % 2].ask("look")
            for one, other in (rings, rings[::-1]):
                assert await other.ask(f"find {await one.ask('signs')}") == "found"
            await rings[1 - turn % 2].ask("look")
        assert await rings[0].ask("signs") == await rings[1].ask("signs")
        await expire(database, timedelta(hours=1))
        for ring in rings:
            await ring.ask("keep")
        assert (await states(store_on(database)))["retired"] == [], "an hour by the database's"
    finally:
        for ring in rings:
            await ring.stop()


class _Process:
    """A ring in a process of its own, by a clock of its own; answers line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, database_url: str, skew: int) -> _Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests._ring_process", database_url, str(skew),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        started = cls(process)
        assert await started.ask("look") == "ok"
        return started

    async def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        return (await asyncio.wait_for(self._process.stdout.readline(), 30)).decode().strip()

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def test_the_key_of_an_older_version_becomes_the_current_one(database: Database) -> None:
    """The migration keeps it, and what it signed goes on verifying; back again as well."""
    ring = ring_on(database)
    await ring.load()
    kid = ring.current.kid
    await migrate.downgrade(database, "0002")
    async with database.write() as session:
        assert list(await session.scalars(text("SELECT kid FROM signing_keys"))) == [kid]
    await migrate.upgrade(database)
    assert await states(store_on(database)) == {
        "next": [], "current": [kid], "old": [], "retired": []
    }  # fmt: skip
    again = ring_on(database)
    await again.load()
    assert again.current.kid == kid
    assert len(again.jwks()["keys"]) == 2
