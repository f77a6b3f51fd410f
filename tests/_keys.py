"""Signing keys in tests: rings on a database, and time that passes for keys alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import update

from api.auth.keys import KeyRing
from api.db import Database, db_now
from api.db.models import SigningKey
from api.services.lifetimes import Lifetimes
from api.services.signing_keys import PUBLISHED_SECONDS, SigningKeys

LIFETIMES = Lifetimes(access=300, idle=600, absolute=900, grace=10, leeway=5)


def store_on(
    database: Database, secret: str = "s" * 40, algorithm: str = "EdDSA", days: int = 0
) -> SigningKeys:
    """Return the keys of ``database`` as a process with these settings would have them."""
    return SigningKeys(database, secret, algorithm, LIFETIMES, rotation_days=days)


def ring_on(database: Database, *settings: Any, **more: Any) -> KeyRing:
    """Return a ring that is not loaded."""
    return KeyRing(store_on(database, *settings, **more))


async def states(store: SigningKeys) -> dict[str, list[str]]:
    """Return the kids by state."""
    found: dict[str, list[str]] = {"next": [], "current": [], "old": [], "retired": []}
    for key in await store.all():
        found[key.state].append(key.kid)
    return found


async def ripen(database: Database) -> None:
    """Let the next key have been published for long enough."""
    await _set(database, SigningKey.activated_at.is_(None), created_at=db_now(-PUBLISHED_SECONDS))


async def age(database: Database, days: int) -> None:
    """Let the current key have signed for so many days."""
    since = db_now(-days * 86_400)
    await _set(database, SigningKey.replaced_at.is_(None), activated_at=since, current=True)


async def expire(database: Database, by: timedelta = timedelta()) -> None:
    """Let every token of the old keys have expired, or be about to."""
    until = db_now(int(by.total_seconds()))
    await _set(database, SigningKey.replaced_at.is_not(None), verifies_until=until)


async def _set(database: Database, which: Any, *, current: bool = False, **values: Any) -> None:
    statement = update(SigningKey).where(which, SigningKey.retired_at.is_(None))
    if current:
        statement = statement.where(SigningKey.activated_at.is_not(None))
    async with database.write() as session:
        await session.execute(
            statement.values(**values).execution_options(synchronize_session=False)
        )
