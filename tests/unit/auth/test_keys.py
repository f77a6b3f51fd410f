"""Signing keys: made once, kept encrypted, shown in public without their private half."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from cryptography.hazmat.primitives import serialization
from sqlalchemy import delete, select

from api.auth.keys import KeyRing
from api.db import Database
from api.db.models import SigningKey
from api.errors import StartupError


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database without a key."""
    database = Database(database_url)
    async with database.write() as session:
        await session.execute(delete(SigningKey))
    yield database
    await database.close()


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
async def test_a_key_is_made_once_and_kept_encrypted(database: Database, algorithm: str) -> None:
    """Five processes at once end with one key; at rest it is sealed under the secret."""
    rings = [KeyRing(database, "s" * 40, algorithm) for _ in range(5)]
    await asyncio.gather(*(ring.load() for ring in rings))
    assert len({ring.current.kid for ring in rings}) == 1
    async with database.read() as session:
        (row,) = (await session.scalars(select(SigningKey))).all()
    raw = rings[0].current.private.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    assert raw[-32:] not in row.private
    (jwk,) = rings[0].jwks()["keys"]
    assert (jwk["kid"], jwk["alg"], jwk["use"]) == (row.kid, algorithm, "sig")
    assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & set(jwk)


async def test_another_secret_is_said_in_a_sentence(database: Database) -> None:
    """Keys kept under another SECRET_KEY: refused at the start, nothing changed."""
    await KeyRing(database, "s" * 40).load()
    with pytest.raises(StartupError, match="SECRET_KEY is not the one"):
        await KeyRing(database, "t" * 40).load()


async def test_under_another_secret_nothing_is_written(database: Database) -> None:
    """Not even a key of another algorithm: the right secret must go on opening them all."""
    ring = KeyRing(database, "s" * 40)
    await ring.load()
    with pytest.raises(StartupError):
        await KeyRing(database, "t" * 40, "ES256").load()
    async with database.read() as session:
        assert len((await session.scalars(select(SigningKey))).all()) == 1
    async with database.write() as session:
        session.add(KeyRing(database, "t" * 40, "ES256")._make())
    assert not await ring.reload()
    assert ring.find(ring.current.kid) is not None


async def test_a_key_of_another_process_is_found(database: Database) -> None:
    """reload finds it, and looks at most once a second."""
    ring = KeyRing(database, "s" * 40)
    await ring.load()
    other = KeyRing(database, "s" * 40, "ES256")
    await other.load()
    assert ring.find(other.current.kid) is None
    assert await ring.reload()
    assert ring.find(other.current.kid) is not None
    assert not await ring.reload()
