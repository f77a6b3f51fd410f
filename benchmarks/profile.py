"""Where the time of the loop's thread goes, by whose code it is: without a server, 32 at once.

    python -m benchmarks.profile [protected] [refresh] [list] [login]

cProfile makes calls of Python dearer than C: compare shares within a table, not with a clock.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from api import logs
from api.app import create_app
from api.asgi import AsyncFlask
from api.parts import EXTENSION
from api.settings import load
from benchmarks import mint
from benchmarks.contestants import PASSWORD
from benchmarks.figures import keep
from benchmarks.load import CONNECTIONS
from benchmarks.running import environment

# By the beginning of a path behind the last of these folders; the rest is Python's own.
FOLDERS = ("site-packages/", f"{Path.cwd()}/")
ROOMS = {
    "api/asgi": "the bridge", "api/portal": "the bridge", "api/http": "the bridge",
    "api/auth": "tokens, guards, passwords", "api/blocklist": "the blocklist",
    "api/together": "the blocklist", "api/services": "services", "api/db": "SQLite's trips",
    "api": "routes and the rest", "schemas": "schemas", "benchmarks": "the load itself",
    "flask_jwt_extended": "flask-jwt-extended", "flask": "Flask and Werkzeug",
    "werkzeug": "Flask and Werkzeug", "sqlalchemy": "SQLAlchemy", "aiosqlite": "SQLite's trips",
    "redis": "Redis's client", "jwt": "PyJWT and cryptography",
    "cryptography": "PyJWT and cryptography", "argon2": "argon2", "marshmallow": "marshmallow",
    "webargs": "marshmallow", "prometheus_client": "metrics", "orjson": "JSON", "json": "JSON",
}  # fmt: skip
COUNTS = {"protected": 200, "refresh": 40, "list": 20, "login": 25}
Ask = Callable[..., Awaitable[Any]]


async def main(works: list[str]) -> None:
    """Keep the shares of each work."""
    app = create_app(load())
    with app.app_context():
        await mint.prepare(app.extensions[EXTENSION])
    async with app.running():
        for work in works:
            await _rounds(app, work, 5)
            profile = cProfile.Profile(time.thread_time)  # not what is waited for
            profile.enable()
            await _rounds(app, work, COUNTS[work])
            profile.disable()
            shares = _shares(pstats.Stats(profile))
            keep(
                f"profile {work}",
                f"Where the processor time of the loop goes: {work}, in hundredths",
                shares,
            )


async def _rounds(app: AsyncFlask, work: str, count: int) -> None:
    # profiled, thirty sign-ins at once would outwait the database's time limit
    many = 4 if work == "login" else CONNECTIONS
    who = "admin" if work == "list" else "testuser"
    tokens = [await _login(app, who) for _ in range(many)]
    await asyncio.gather(*(_one(app, work, count, one) for one in tokens))


async def _one(app: AsyncFlask, work: str, count: int, tokens: Any) -> None:
    for _ in range(count):
        if work == "login":
            await _login(app, "testuser")
        elif work == "refresh":
            tokens = await _ask(app, "POST", "/refresh", tokens["refresh_token"])
        else:
            path = "/protected" if work == "protected" else "/admin/users"
            await _ask(app, "GET", path, tokens["access_token"])


async def _login(app: AsyncFlask, name: str) -> Any:
    body = json.dumps({"username": name, "password": PASSWORD, "transport": "json"}).encode()
    return await _ask(app, "POST", "/login", "", body)


async def _ask(app: AsyncFlask, method: str, path: str, token: str, body: bytes = b"") -> Any:
    headers = [(b"host", b"127.0.0.1"), (b"content-length", str(len(body)).encode())]
    headers += [(b"content-type", b"application/json")] if body else []
    headers += [(b"authorization", f"Bearer {token}".encode())] if token else []
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 50_000), "server": ("127.0.0.1", 8_000),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    await app.asgi(scope, receive, send)
    if sent[0]["status"] != 200:
        raise SystemExit(f"{path} answers {sent[0]['status']} {sent[1]['body']!r}")
    return json.loads(sent[1]["body"])


def _shares(stats: Any) -> dict[str, float | str]:
    spent: Counter[str] = Counter()
    for (path, _line, name), (_calls, _all, own, _below, callers) in stats.stats.items():
        if path != "~":
            spent[_room(path)] += own
        elif "sign" in name or "verify" in name:
            spent["PyJWT and cryptography"] += own
        else:
            # what is written in C counts for whoever called it
            for (caller, *_), (*_, its_own, _) in callers.items():
                spent[_room(caller)] += its_own
    whole = sum(spent.values())
    return {
        room: round(100 * own / whole, 1) for room, own in spent.most_common() if own > whole / 200
    }


def _room(path: str) -> str:
    for folder in FOLDERS:
        path = path.rpartition(folder)[2]
    for beginning, room in ROOMS.items():
        if path.startswith((f"{beginning}/", f"{beginning}.", f"{beginning}_")):
            return room
    return "Python and its loop"


if __name__ == "__main__":
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcp-")))
        os.environ.update(environment(folder, stack))
        logs.configure("WARNING")
        asyncio.run(main(sys.argv[1:] or list(COUNTS)))
