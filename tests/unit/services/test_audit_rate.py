"""Repeated audit events: one row at once, then one row with a count for each window."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import select

from api.db import Database
from api.db.models import AuditEvent
from api.errors import Unavailable
from api.services import audit
from api.services.audit import Origin
from api.services.audit_rate import RepeatedEvents
from api.services.housekeeping import counting

ACTOR = Origin(actor="someone", ip="192.0.2.1")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    database = Database(database_url)
    yield database
    await database.close()


async def rows(database: Database, action: str = "test.noted") -> list[AuditEvent]:
    """Return the rows of an action, the oldest first."""
    query = select(AuditEvent).where(AuditEvent.action == action).order_by(AuditEvent.id)
    async with database.read() as session:
        return list(await session.scalars(query))


async def counts(database: Database) -> list[int | None]:
    """Return the count of each row, None where it is of one event."""
    return [row.detail.get("count") for row in await rows(database)]


async def test_the_first_is_written_and_the_others_are_counted(database: Database) -> None:
    """A thousand of a kind in one window are two rows, and none of them is lost."""
    events = RepeatedEvents(database, window=0.3)
    await asyncio.gather(*(events.note("test.noted", ACTOR, number=n) for n in range(1_000)))
    assert await counts(database) == [None]
    assert await events.write_due() == 0
    await asyncio.sleep(0.3)
    assert await events.write_due() == 1
    assert await counts(database) == [None, 999]
    last = (await rows(database))[-1]
    assert (last.actor, last.ip, last.detail["number"]) == ("someone", "192.0.2.1", 999)
    # those of the next window are counted too, though none of them is written at once
    await events.note("test.noted", ACTOR, number=1)
    assert await events.write_due() == 0
    await asyncio.sleep(0.3)
    assert await events.write_due() == 1
    assert await counts(database) == [None, 999, 1]


async def test_a_kind_that_is_not_repeated_is_forgotten(database: Database) -> None:
    """Its next event is a first one again, written at once and without a count."""
    events = RepeatedEvents(database, window=0.05)
    for _ in range(3):
        await events.note("test.noted", ACTOR)
        await asyncio.sleep(0.1)
        assert await events.write_due() == 0
    assert await counts(database) == [None] * 3
    assert await events.write_all() == 0


async def test_what_tells_events_apart(database: Database) -> None:
    """Action, actor, client app, target and the details that are named; not the rest."""
    events = RepeatedEvents(database)
    kinds: list[dict[str, Any]] = [
        {"origin": ACTOR, "route": "/a", "scope": "x"},
        {"origin": ACTOR, "route": "/b", "scope": "x"},
        {"origin": Origin(actor="another"), "route": "/a", "scope": "x"},
        {"origin": Origin(actor="someone", client_id="app"), "route": "/a", "scope": "x"},
        {"origin": ACTOR, "route": "/a", "scope": "x", "target": "something"},
    ]
    for _ in range(2):
        for kind in kinds:
            await events.note("test.noted", distinct_by=("route",), **kind)
    await events.note("test.noted", ACTOR, distinct_by=("route",), route="/a", scope="another")
    assert len(await rows(database)) == len(kinds)
    assert await events.write_all() == len(kinds)
    assert sorted(filter(None, await counts(database))) == [1, 1, 1, 1, 2]


async def test_memory_is_bounded(database: Database) -> None:
    """Kinds beyond the limit share one, whose row names nobody."""
    events = RepeatedEvents(database, most=5)
    for number in range(50):
        await events.note("test.noted", Origin(actor=f"user{number}"))
    # one of each kind, and the first of those that share one
    assert len(await rows(database)) == 6
    assert len(events._kinds) == 6
    await events.write_all()
    last = (await rows(database))[-1]
    assert (last.actor, last.target, last.detail) == (None, None, {"count": 44})


async def test_a_database_that_is_away_loses_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written is refused, or counted until it can be."""
    events = RepeatedEvents(database, window=0.0)

    async def away(*_: Any) -> None:
        raise Unavailable

    with monkeypatch.context() as patched:
        patched.setattr(database, "run", away)
        with pytest.raises(Unavailable):
            await events.note("test.noted", ACTOR)
    assert await counts(database) == []
    for _ in range(4):
        await events.note("test.noted", ACTOR)
    with monkeypatch.context() as patched:
        patched.setattr(database, "run", away)
        with pytest.raises(Unavailable):
            await events.write_due()
    await events.note("test.noted", ACTOR)
    await events.write_due()
    assert await counts(database) == [None, 4]


async def test_the_counts_are_written_when_the_process_stops(database: Database) -> None:
    """However little of the window has passed."""
    events = RepeatedEvents(database)
    async with counting(events):
        for _ in range(3):
            await events.note("test.noted", ACTOR)
        assert await counts(database) == [None]
    assert await counts(database) == [None, 2]
    assert audit.row("x", ACTOR, count=2)["detail"] == {"count": 2}
