"""A ring of keys by a wrong clock: ``python -m tests._ring_process DATABASE_URL SECONDS``.

A command a line on standard input, an answer a line on standard output.
"""

from __future__ import annotations

import asyncio
import sys
import time

from api import logs
from api.auth.keys import KeyRing
from api.db import Database
from api.errors import Conflict
from api.services.audit import Origin
from tests._keys import store_on

TRUE_TIME = time.time


async def main(url: str, skew: float) -> None:
    """Answer until the input ends."""
    time.time = lambda: TRUE_TIME() + skew
    logs.configure("WARNING")
    database = Database(url)
    ring = KeyRing(store_on(database))
    await ring.load()
    while line := await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(f"{await answer(ring, *line.split())}\n")
        sys.stdout.flush()
    await database.close()


async def answer(ring: KeyRing, command: str, kid: str = "") -> str:
    """Do one command."""
    if command == "signs":
        return ring.current.kid
    if command == "find":
        return "found" if ring.find(kid) else "unknown"
    if command == "look":
        await ring._look()
    elif command == "keep":
        await ring._store.keep()
    else:
        try:
            await ring._store.rotate(Origin())
        except Conflict:
            return "refused"
        return "rotated"
    return "ok"


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
