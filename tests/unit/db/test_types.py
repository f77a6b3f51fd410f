"""What the column types promise: a moment comes back as it went in, in UTC, from both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import bindparam, cast, select
from sqlalchemy.exc import StatementError

from api.db import Database
from api.db.types import UTCDateTime

AHEAD = timezone(timedelta(hours=5, minutes=30))


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 1, 2, 3, 4, 5, tzinfo=AHEAD),
        None,
    ],
)
async def test_a_moment_comes_back_in_utc(database_url: str, moment: datetime | None) -> None:
    """With its microseconds, whatever its own zone was; nothing comes back as nothing."""
    database = Database(database_url)
    try:
        asked = bindparam("moment", type_=UTCDateTime)
        # SQLite makes a number of what it casts: there it is said what a column would hold
        said = asked if "sqlite" in database_url else cast(asked, UTCDateTime)
        [(found,)] = await database.rows(select(said), {"moment": moment})
    finally:
        await database.close()
    assert found == moment
    if moment is not None:
        assert found.tzinfo is UTC


async def test_a_moment_without_a_zone_is_refused(database_url: str) -> None:
    """Nothing guesses which zone was meant."""
    database = Database(database_url)
    naive = datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    try:
        with pytest.raises(StatementError, match="a naive datetime cannot be stored"):
            await database.rows(select(bindparam("moment", type_=UTCDateTime)), {"moment": naive})
    finally:
        await database.close()
