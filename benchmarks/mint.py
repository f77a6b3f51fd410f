"""Rolecall's own people and tokens, by its own code.

python -m benchmarks.mint prepare | mint COUNT
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from api import logs
from api.app import create_app
from api.auth.claims import AccessIdentity
from api.auth.tokens import mint_access
from api.db import migrate
from api.db.models import new_id
from api.parts import EXTENSION, Parts
from api.services import roles
from api.services.audit import Origin
from api.settings import load
from benchmarks.peers.data import PEOPLE


async def prepare(parts: Parts) -> None:
    """Make the people."""
    await migrate.upgrade(parts.database)
    async with parts.database.write() as session:
        await roles.ensure_built_in(session)
    for name in ("testuser", "admin", *PEOPLE):
        names = ("admin", "user") if name == "admin" else ("user",)
        email = f"{name}@example.org"
        await parts.users.create(name, "testpass", email, names, Origin(), checked=False)


async def mint(parts: Parts, count: int) -> None:
    """Print access tokens, each of another session: guards ask only whether one was revoked."""
    await parts.keys.load()
    user = await parts.users.find("testuser")
    for _ in range(count):
        identity = AccessIdentity(
            user.id, new_id(), user.username, ("user",), (), user.version, by_cookie=False
        )
        print(mint_access(identity, timedelta(hours=1), fresh=True))


async def main() -> None:
    """Do what the command line asks."""
    logs.configure("WARNING")
    app = create_app(load())
    parts: Parts = app.extensions[EXTENSION]
    with app.app_context():
        await (prepare(parts) if sys.argv[1] == "prepare" else mint(parts, int(sys.argv[2])))
    await parts.blocklist.stop()
    parts.passwords.close()
    await parts.database.close()


if __name__ == "__main__":
    asyncio.run(main())
