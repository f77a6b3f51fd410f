"""What the engine promises of its connections."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from api.db import Database
from tests.conftest import PostgresServer


async def test_a_connection_closed_in_the_pool_is_replaced(
    postgres_server: PostgresServer,
) -> None:
    """Connections that the server ended while they were idle cost the next request nothing."""
    database = Database(postgres_server.url("postgres"))
    try:
        async with database.read() as one, database.read() as other:
            idle = [await s.scalar(text("SELECT pg_backend_pid()")) for s in (one, other)]
        killer = Database(postgres_server.url("postgres"))
        async with killer.read() as session:
            for pid in idle:
                await session.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        await killer.close()
        await asyncio.sleep(0.1)
        async with database.read() as one, database.read() as other:
            fresh = [await s.scalar(text("SELECT pg_backend_pid()")) for s in (one, other)]
        assert not set(idle) & set(fresh)
    finally:
        await database.close()
