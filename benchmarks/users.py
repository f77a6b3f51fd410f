"""Pages of a million users: the thousandth costs what the first costs.

python -m benchmarks.users [USERS]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import insert

from api import logs
from api.app import compose
from api.db import migrate
from api.db.models import User, new_id
from api.parts import Parts
from api.services.users import UserFilter
from api.settings import Settings
from benchmarks.figures import Figures, keep

CHUNK = 20_000
LIMIT = 50
PAGES = 1_000
ROUNDS = 9


async def main(users: int) -> None:
    """Print what the first and the last of a thousand pages cost."""
    with tempfile.TemporaryDirectory(prefix="rcu-") as folder:
        settings = Settings(
            secret_key="kJ8vQ2nR5tXw9zB3fH6mP0sD4gL7yC1e",
            database_url=f"sqlite+aiosqlite:///{Path(folder) / 'db.sqlite3'}",
            redis_url="redis://127.0.0.1:1",
        )
        parts = compose(settings)
        await migrate.upgrade(parts.database)
        print(f"making {users:,} users ...", flush=True)
        await _fill(parts, users)
        found: Figures = {}
        for sort in ("created_at", "username", "-username"):
            found |= await _measure(parts, UserFilter(sort=sort))
        parts.passwords.close()
        await parts.database.close()
    keep("users", f"Pages of {LIMIT} of {users:,} users", found)


async def _measure(parts: Parts, which: UserFilter) -> Figures:
    cursor, seen = None, set()
    for _ in range(PAGES - 1):
        page = await parts.users.page(which, LIMIT, cursor)
        seen |= {user.id for user in page.items}
        cursor = page.next_cursor
    if len(seen) != (PAGES - 1) * LIMIT:
        raise SystemExit("a page was given twice, or cut short")
    first, last = [], []
    for _ in range(ROUNDS):
        first.append(await _seconds(parts, which, None))
        last.append(await _seconds(parts, which, cursor))
    one, thousand = statistics.median(first) * 1000, statistics.median(last) * 1000
    return {
        f"by {which.sort}, page 1, ms": round(one, 2),
        f"by {which.sort}, page {PAGES:,}, ms": round(thousand, 2),
        f"by {which.sort}, ratio": round(thousand / one, 2),
    }


async def _seconds(parts: Parts, which: UserFilter, cursor: str | None) -> float:
    began = time.perf_counter()
    await parts.users.page(which, LIMIT, cursor)
    return time.perf_counter() - began


async def _fill(parts: Parts, users: int) -> None:
    for start in range(0, users, CHUNK):
        rows = [
            {
                "id": new_id(),
                "username": f"user{number * 7_919 % users:07}",
                "username_key": f"user{number * 7_919 % users:07}",
                "password_hash": "x",
            }
            for number in range(start, min(start + CHUNK, users))
        ]
        async with parts.database.write(60) as session:
            await session.execute(insert(User), rows)


if __name__ == "__main__":
    logs.configure("WARNING")
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
