"""The authorization sequence: only ever higher, and seen together with what it orders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import update

from api.db import Database, sequence
from api.db.models import AuthorizationSequence


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


async def advanced(database: Database) -> int:
    """Advance the number in a transaction of its own."""
    async with database.write() as session:
        return await sequence.advance(session)


async def test_it_only_rises(database: Database) -> None:
    """Twenty at once: each has a number of its own, and the highest stands."""
    before = await database.look(sequence.current)
    numbers = await asyncio.gather(*(advanced(database) for _ in range(20)))
    assert len(set(numbers)) == 20
    assert min(numbers) > before
    assert await database.look(sequence.current) == max(numbers)


async def test_it_does_not_repeat_after_a_restore(database: Database) -> None:
    """Set back to what an old backup had, it goes on from the clock, in milliseconds."""
    before = await advanced(database)
    async with database.write() as session:
        await session.execute(update(AuthorizationSequence).values(value=7))
    after = await advanced(database)
    assert after > before
    assert abs(after - time.time() * 1000) < 60_000


async def test_it_goes_beyond_a_clock_that_is_behind(database: Database) -> None:
    """A number ahead of the clock is still followed by a higher one."""
    ahead = int(time.time() * 1000) + 10**9
    async with database.write() as session:
        await sequence.advance_beyond(session, ahead)
    assert await database.look(sequence.current) == ahead
    assert await advanced(database) == ahead + 1
    async with database.write() as session:
        await sequence.advance_beyond(session, 5)
    assert await database.look(sequence.current) == ahead + 1


async def test_what_is_rolled_back_was_never_there(database: Database) -> None:
    """A reader sees the number before until the change commits."""
    before = await database.look(sequence.current)
    with pytest.raises(ZeroDivisionError):
        async with database.write() as session:
            await sequence.advance(session)
            assert await database.look(sequence.current) == before
            raise ZeroDivisionError
    assert await database.look(sequence.current) == before
