"""The blocklist with a million live revocations: rebuild, memory, and what a check costs.

    python -m benchmarks.blocklist [ENTRIES] [postgresql]

A redis-server and a database of its own. Checks go on while an empty Redis is rebuilt, and every
answer is looked at: revoked is refused, live is let in.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import insert

from api import logs
from api.blocklist import Blocklist, Verdict
from api.db import Database, migrate
from api.db.models import Revocation
from benchmarks.figures import keep
from benchmarks.running import postgresql
from tests._redis import RedisServer

ROUNDS = 7
CHECKS = 2_000
AT_ONCE = 50
CHUNK = 20_000


async def main(entries: int, kind: str) -> None:
    """Print what was measured."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcb-")))
        none, redis = RedisServer(folder / "none"), RedisServer(folder / "redis")
        for server in (none, redis):
            server.start()
            stack.callback(server.stop)
        empty = await stack.enter_async_context(_database(folder / "empty", kind))
        database = await stack.enter_async_context(_database(folder / "full", kind))
        few = Blocklist(empty, none.url)
        stack.push_async_callback(few.stop)
        await few.start()
        print(f"filling the ledger with {entries:,} sessions ...", flush=True)
        await _fill(database, entries)
        before = (await redis.command("INFO", "memory"))["used_memory"]
        many = Blocklist(database, redis.url)
        stack.push_async_callback(many.stop)
        took, answered, slowest = await _rebuild(many, entries)
        used = (await redis.command("INFO", "memory"))["used_memory"] - before
        costs: dict[Blocklist, list[float]] = {few: [], many: []}
        for _ in range(ROUNDS):
            for blocklist, found in costs.items():
                found.append(await _checks(blocklist))
        none_us, full_us = (statistics.median(found) * 1e6 for found in costs.values())
    keep(
        f"blocklist {entries}",
        f"{entries:,} live revocations in Redis ({kind})",
        {
            "rebuild of an empty Redis, s": round(took, 1),
            "checks answered meanwhile": answered,
            "the slowest of them, ms": round(slowest * 1000),
            "bytes an entry": round(used / entries),
            "a check with no entry, us": round(none_us),
            "a check with all of them, us": round(full_us),
            "ratio": round(full_us / none_us, 2),
        },
    )


@asynccontextmanager
async def _database(folder: Path, kind: str) -> AsyncIterator[Database]:
    folder.mkdir()  # noqa: ASYNC240  nothing else runs yet
    with ExitStack() as stack:
        url = f"sqlite+aiosqlite:///{folder / 'db.sqlite3'}"
        if kind == "postgresql":
            url = stack.enter_context(postgresql(folder / "pg"))
        database = Database(url)
        await migrate.upgrade(database)
        yield database
        await database.close()


def _sid(number: int) -> str:
    return str(UUID(int=number))


async def _fill(database: Database, entries: int) -> None:
    now = datetime.now(UTC)
    until = now + timedelta(days=7)
    for start in range(0, entries, CHUNK):
        rows = [
            {
                "kind": "sid",
                "subject": _sid(number),
                "floor": 0,
                "expires_at": until,
            }
            for number in range(start, min(start + CHUNK, entries))
        ]
        async with database.write(600) as session:
            await session.execute(insert(Revocation), rows)


def _claims(sid: str) -> dict[str, Any]:
    return {"jti": "j" + sid, "sid": sid, "sub": "u" + sid, "roles": ["user"], "type": "access"}


async def _rebuild(blocklist: Blocklist, entries: int) -> tuple[float, int, float]:
    """Start on an empty Redis with checks going on; return seconds, checks, and the slowest."""
    began = time.perf_counter()
    starting = asyncio.create_task(blocklist.start())
    answered, slowest = 0, 0.0
    while not blocklist.status().is_warm:
        asked = time.perf_counter()
        await _check(blocklist, _sid(answered * 997 % entries), Verdict.REVOKED)
        await _check(blocklist, f"live{answered}", Verdict.VALID)
        slowest = max(slowest, time.perf_counter() - asked)
        answered += 2
        await asyncio.sleep(0.005)
    took = time.perf_counter() - began
    await starting
    return took, answered, slowest


async def _check(blocklist: Blocklist, sid: str, expected: Verdict) -> None:
    verdict = await blocklist.check(_claims(sid))
    if verdict is not expected:
        raise SystemExit(f"wrong answer for {sid}: {verdict}, not {expected}")


async def _checks(blocklist: Blocklist) -> float:
    """Return the seconds that a check costs, of live sessions, many at once."""
    began = time.perf_counter()
    for start in range(0, CHECKS, AT_ONCE):
        await asyncio.gather(
            *(_check(blocklist, f"live{start + n}", Verdict.VALID) for n in range(AT_ONCE))
        )
    if not blocklist.status().is_warm:
        raise SystemExit("Redis went cold while it was measured")
    return (time.perf_counter() - began) / CHECKS


if __name__ == "__main__":
    logs.configure("WARNING")
    arguments = [*sys.argv[1:], "1000000", "sqlite"]
    number = next(word for word in arguments if word.isdecimal())
    asyncio.run(main(int(number), "postgresql" if "postgresql" in arguments else "sqlite"))
