"""The ring of keys in memory: what it learns, when, and at what cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from cryptography.hazmat.primitives import serialization
from sqlalchemy import delete, event, select

from api.auth import keys as ring_module
from api.auth.keypairs import WrongSecret
from api.auth.keys import KeyRing
from api.db import Database
from api.db.models import SigningKey
from api.errors import Unavailable
from api.services import signing_keys
from api.services.audit import Origin
from tests._keys import age, ring_on, ripen, store_on

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database without a key."""
    database = Database(database_url)
    async with database.write() as session:
        await session.execute(delete(SigningKey))
    yield database
    await database.close()


def rewind(ring: KeyRing, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let ``seconds`` pass for this ring."""
    later = ring_module.time.monotonic() + seconds
    monkeypatch.setattr(ring_module.time, "monotonic", lambda: later)


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
async def test_a_key_is_made_once_and_kept_encrypted(database: Database, algorithm: str) -> None:
    """Five processes at once end with one key that signs; at rest it is sealed under the secret."""
    rings = [ring_on(database, algorithm=algorithm) for _ in range(5)]
    await asyncio.gather(*(ring.load() for ring in rings))
    assert len({ring.current.kid for ring in rings}) == 1
    async with database.read() as session:
        rows = (await session.scalars(select(SigningKey))).all()
    assert sorted(row.state for row in rows) == ["current", "next"]
    raw = rings[0].current.private.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    assert not any(raw[-32:] in (row.private or b"") for row in rows)
    jwks = rings[0].jwks()["keys"]
    assert next(jwk["kid"] for jwk in jwks) == rings[0].current.kid
    assert {jwk["kid"] for jwk in jwks} == {row.kid for row in rows}
    for jwk in jwks:
        assert (jwk["alg"], jwk["use"]) == (algorithm, "sig")
        assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & set(jwk)


async def test_another_secret_is_said_and_nothing_is_written(database: Database) -> None:
    """Neither a start nor a rotation, by age or asked for, writes under another SECRET_KEY."""
    ring = ring_on(database)
    await ring.load()
    wrong = store_on(database, "t" * 40, "ES256")
    with pytest.raises(WrongSecret, match="SECRET_KEY is not the one"):
        await KeyRing(wrong).load()
    with pytest.raises(WrongSecret):
        await KeyRing(wrong).start()
    await ripen(database)
    for change in (wrong.rotate(Origin()), wrong.replace(Origin()), wrong.keep(starting=True)):
        with pytest.raises(WrongSecret):
            await change
    assert {key.kid for key in await wrong.all()} == {key["kid"] for key in ring.jwks()["keys"]}
    await ring_on(database).load()


@ON_SQLITE
async def test_keys_under_another_secret_leave_the_ring_as_it_is(database: Database) -> None:
    """Somebody writes under another secret: what is in memory goes on, and signs."""
    ring = ring_on(database)
    await ring.load()
    before = ring.jwks()
    kid, private = store_on(database, "t" * 40).safe.make("EdDSA")
    async with database.write() as session:
        session.add(SigningKey(kid=kid, algorithm="EdDSA", private=private))
    assert not await ring.reload()
    assert ring.jwks() == before


async def test_an_unknown_kid_is_learnt_at_once_at_most_once_a_second(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reload finds another process's key; ``changes`` tells; then it looks no more for a second."""
    ring, other = ring_on(database), store_on(database)
    await ring.load()
    changes = ring.changes
    fresh = await other.replace(Origin())
    assert ring.find(fresh.kid) is None
    assert await ring.reload()
    assert ring.find(fresh.kid) is not None
    assert ring.current.kid == fresh.kid
    assert ring.changes == changes + 1
    await ripen(database)
    again = await other.rotate(Origin())
    (unseen,) = [key for key in await other.all() if key.state == "next"]
    assert ring.find(again.kid) is not None, "it was next when the ring looked"
    assert not await ring.reload()
    assert ring.find(unseen.kid) is None
    rewind(ring, monkeypatch, 1.01)
    assert await ring.reload()
    assert ring.find(unseen.kid) is not None
    assert ring.changes == changes + 2


@ON_SQLITE
async def test_junk_kids_cost_one_look_a_second(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand at once share one read and write nothing; the genuine one among them is learnt."""
    ring = ring_on(database)
    await ring.load()
    fresh = await store_on(database).replace(Origin())
    said: list[str] = []
    event.listen(
        database.engine.sync_engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, *_: said.append(statement),
    )
    assert all(await asyncio.gather(*(ring.reload() for _ in range(1_000))))
    assert ring.find(fresh.kid) is not None
    assert not any([await ring.reload() for _ in range(100)])
    looks = [statement for statement in said if "FROM signing_keys" in statement]
    assert len(looks) == 1
    assert not any("IMMEDIATE" in s or "UPDATE" in s or "INSERT" in s for s in said)


@ON_SQLITE
async def test_where_the_database_is_away_an_unknown_kid_is_not_judged_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While whatever signs must be known, it is refused; afterwards nobody can tell: 503."""
    ring = ring_on(database)
    await ring.load()

    async def away() -> None:
        raise Unavailable

    monkeypatch.setattr(ring._store, "read", away)
    assert not await ring.reload()
    rewind(ring, monkeypatch, signing_keys.PUBLISHED_SECONDS + 1)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await ring.reload()


@ON_SQLITE
async def test_a_look_that_was_overtaken_changes_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow answer from before a key was retired does not bring that key back."""
    ring, other = ring_on(database), store_on(database)
    await ring.load()
    stale, former = await other.read(), ring.current.kid
    await other.replace(Origin())
    held, read = asyncio.Event(), ring._store.read

    async def slow() -> object:
        await held.wait()
        return stale

    monkeypatch.setattr(ring._store, "read", slow)
    looking = asyncio.create_task(ring._look())
    await asyncio.sleep(0)
    monkeypatch.setattr(ring._store, "read", read)
    await ring._look()
    held.set()
    await looking
    assert ring.find(former) is None


@ON_SQLITE
async def test_a_started_ring_learns_by_itself_and_does_what_is_due(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a request: another process's rotation is seen, and a rotation by age is done."""
    monkeypatch.setattr(ring_module, "LOOK_SECONDS", 0.01)
    ring = ring_on(database, days=1)
    await ring.load()
    await ring.start()
    try:
        fresh = await store_on(database).replace(Origin())
        await until_it_signs(ring, fresh.kid)
        following = (await store_on(database).read()).next
        assert following is not None
        await ripen(database)
        await age(database, 1)
        await until_it_signs(ring, following.kid)
        assert ring.find(fresh.kid) is not None
    finally:
        await ring.stop()


@ON_SQLITE
async def test_a_change_is_counted_once_the_keys_are_there(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a token that a thread verifies with the former keys meanwhile is kept as of the new."""
    ring, told = ring_on(database), list[str]()

    def telling(self: KeyRing, name: str, value: object) -> None:
        told.append(name)
        object.__setattr__(self, name, value)

    monkeypatch.setattr(KeyRing, "__setattr__", telling)
    await ring.load()
    assert told.index("changes") > max(told.index("_keys"), told.index("_current"))


async def until_it_signs(ring: KeyRing, kid: str) -> None:
    """Wait for a started ring to sign with ``kid``."""
    async with asyncio.timeout(5):
        while ring.current.kid != kid:
            await asyncio.sleep(0.005)
