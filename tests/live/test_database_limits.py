"""`rolecall serve` on PostgreSQL: however it stops, no statement of it goes on."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path

import asyncpg
import httpx
import pytest

from tests.conftest import PostgresServer
from tests.live._serve import Serving, start

STATEMENTS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND state = 'active' AND wait_event_type = 'Lock'"
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_service_that_ends_leaves_no_statement(
    postgres_server: PostgresServer, tmp_path: Path, how: signal.Signals
) -> None:
    """Sign-ins wait for a lock when it ends; two seconds later no statement waits any more."""
    name = f"ends_{how.name.lower()}"
    server = await asyncpg.connect(
        host=postgres_server.directory, user="postgres", database="postgres"
    )
    await server.execute(f"CREATE DATABASE {name}")
    address = f"postgresql://postgres@/{name}?host={postgres_server.directory}"
    serving = await asyncio.to_thread(
        start, tmp_path, "--demo", "--workers", "2", DATABASE_URL=address
    )
    # what one transaction sees of pg_stat_activity does not change: another connection watches
    holder, watcher = [
        await asyncpg.connect(host=postgres_server.directory, user="postgres", database=name)
        for _ in range(2)
    ]
    try:
        async with holder.transaction():
            await holder.execute("LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE")
            for _ in range(4):
                threading.Thread(target=sign_in, args=(serving,), daemon=True).start()
            async with asyncio.timeout(10):
                while await watcher.fetchval(STATEMENTS) < 4:
                    await asyncio.sleep(0.05)
            serving.process.send_signal(how)
            await asyncio.to_thread(serving.process.wait, 30)
            async with asyncio.timeout(2):
                while await watcher.fetchval(STATEMENTS):
                    await asyncio.sleep(0.05)
    finally:
        serving.process.kill()
        await holder.close()
        await watcher.close()
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


def sign_in(serving: Serving) -> None:
    """Sign in, and wait for whatever answer there is."""
    body = {"username": "testuser", "password": "testpass"}
    try:
        with serving.client() as client:
            client.post("/login", json=body)
    except httpx.HTTPError:
        pass  # it was killed
