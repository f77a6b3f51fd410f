"""Many holders and many sessions, written to the database in bulk, beside those that are real.

Rows go in by SQLAlchemy's tables, so that columns get the defaults of their models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import NullPool, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from api.db.models import Base, Revocation, Role, Session, User, UserRole, new_id, table_of

# Rows in one transaction: the service waits for it on SQLite.
CHUNK = 20_000


@asynccontextmanager
async def database_at(url: str) -> AsyncIterator[AsyncEngine]:
    """Connections beside the service's; ``url`` names the async driver."""
    engine = create_async_engine(url, poolclass=NullPool)
    yield engine
    await engine.dispose()


async def password_hash_of(database: AsyncEngine, username: str) -> str:
    """Return the hash of a user's password: whoever has it too has that password."""
    async with database.connect() as connection:
        query = select(User.password_hash).where(User.username == username)
        return str((await connection.execute(query)).scalar_one())


async def add_users(
    database: AsyncEngine, names: Iterable[str], hashed: str, role: str
) -> list[UUID]:
    """Add active users who have one role; return their ids."""
    async with database.connect() as connection:
        query = select(Role.id).where(Role.name == role)
        role_id = (await connection.execute(query)).scalar_one()
    ids: list[UUID] = []
    for chunk in _chunks(names):
        users = [
            {"id": new_id(), "username": name, "username_key": name, "password_hash": hashed}
            for name in chunk
        ]
        given = [{"user_id": user["id"], "role_id": role_id} for user in users]
        async with database.begin() as connection:
            await _insert(connection, User, users)
            await _insert(connection, UserRole, given)
        ids += [user["id"] for user in users]
    return ids


async def add_sessions(
    database: AsyncEngine, user_ids: Iterable[UUID], client_id: UUID | None = None
) -> None:
    """Add a live session for each of the ids, through a client app or none."""
    until = datetime.now(UTC) + timedelta(days=7)
    for chunk in _chunks(user_ids):
        sessions = [
            {
                "id": new_id(),
                "user_id": user_id,
                "client_id": client_id,
                "current_jti": str(new_id()),
                "idle_expires_at": until,
                "expires_at": until,
            }
            for user_id in chunk
        ]
        async with database.begin() as connection:
            await _insert(connection, Session, sessions)


async def count_revocations(database: AsyncEngine) -> int:
    """Return how many rows the ledger has."""
    async with database.connect() as connection:
        query = select(func.count()).select_from(Revocation)
        return int((await connection.execute(query)).scalar_one())


async def _insert(
    connection: AsyncConnection, model: type[Base], rows: Sequence[dict[str, Any]]
) -> None:
    await connection.execute(insert(table_of(model)), rows)


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk
