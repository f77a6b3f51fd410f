"""One change that concerns a million: as fast as one that concerns ten, and refused at once.

    python -m benchmarks.many [HOLDERS] [SESSIONS] [sqlite] [postgresql]

A role with HOLDERS users is changed and deleted, a client app with HOLDERS sessions disabled and
deleted, a user with SESSIONS sessions logged out everywhere and deleted: over HTTP, by an
administrator's token, beside the same with ten. Tokens that were made before by real sign-ins and
refreshes must be refused at once, and a minute later. The rows are written to the database in bulk.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.figures import Figures, keep
from benchmarks.running import postgresql
from tests.live._many import add_sessions, add_users, database_at, password_hash_of
from tests.live._serve import start

FEW, FEW_ROUNDS = 10, 5
SAMPLES, SIGN_INS = 200, 40
LATER_SECONDS = 60.0
# How long requests are watched after a change: what is tidied up behind it must not be in the way.
WATCHED_SECONDS = 5.0
AT_ONCE = 20
PASSWORD = "testpass"
GONE = {"token_revoked", "token_stale"}
LIFETIME = "3600"


@dataclass
class Tokens:
    """What was made before a change, and what must be refused after it."""

    access: list[str] = field(default_factory=list)
    refresh: list[str] = field(default_factory=list)


@dataclass
class Subject:
    """What is changed: a role, a client app or a user.

    ``names`` may sign in, ``owners`` have a session each in the database.
    """

    path: str
    names: Sequence[str]
    owners: Sequence[UUID]
    client_id: str = ""


@dataclass
class Refused:
    """Tokens that a change revoked, and when it was answered."""

    what: str
    at: float
    tokens: Tokens


class Bench:
    """The service, its database, its administrator, and what was measured."""

    def __init__(self, client: httpx.AsyncClient, database: AsyncEngine, hashed: str) -> None:
        self.client = client
        self.database = database
        self.hashed = hashed
        self.figures: Figures = {}
        self.refused: list[Refused] = []
        self.live = ""

    async def sign_in_as_admin(self) -> None:
        """Send an administrator's token from now on."""
        body = {"username": "admin", "password": "adminpass", "transport": "json"}
        token = (await self.client.post("/login", json=body)).json()["access_token"]
        self.client.headers["Authorization"] = f"Bearer {token}"
        self.live = (await self._sign_in("testuser"))["access_token"]

    async def make(self, path: str, **body: Any) -> dict[str, Any]:
        """Make something as the administrator."""
        answer = await self.client.post(path, json=body)
        if answer.status_code != 201:
            raise SystemExit(f"POST {path}: {answer.status_code} {answer.text}")
        return dict(answer.json())

    async def change(self, method: str, path: str, body: Any = None) -> tuple[float, int]:
        """Make a change; return the seconds until it was answered, and the status."""
        began = time.perf_counter()
        answer = await self.client.request(method, path, json=body)
        return time.perf_counter() - began, answer.status_code

    async def compare(
        self, what: str, few: Sequence[Subject], many: Subject, method: str, body: Any = None,
        below: str = "",
    ) -> None:  # fmt: skip
        """Make a change of each of ``few``, and of ``many``; keep both times and their ratio.

        Tokens of ``many`` made before must be refused at once.
        """
        tokens = await self._tokens_of(many)
        small = []
        for one in few:
            seconds, status = await self.change(method, one.path + below, body)
            if status not in {200, 204}:
                raise SystemExit(f"{what}: {status} for {FEW}")
            small.append(seconds * 1000)
        seconds, status = await self.change(method, many.path + below, body)
        median = statistics.median(small)
        self.figures[f"{what}: with {FEW}, ms"] = round(median, 1)
        if status not in {200, 204}:
            self.figures[f"{what}: with all, answered"] = f"{status} after {seconds:.1f} s"
            return
        self.figures[f"{what}: with all, ms"] = round(seconds * 1000, 1)
        self.figures[f"{what}: ratio"] = round(seconds * 1000 / median, 2)
        refused = Refused(what, time.monotonic(), tokens)
        await self._all_refused(refused, "at once")
        self.refused.append(refused)
        self.figures[f"{what}: slowest request after it, ms"] = await self._watch()

    async def later(self) -> None:
        """See that everything is still refused, a minute after the last change."""
        for one in self.refused:
            await asyncio.sleep(max(0.0, one.at + LATER_SECONDS - time.monotonic()))
            await self._all_refused(one, "a minute later")
        self.figures["tokens refused at once, and a minute later"] = sum(
            len(one.tokens.access) for one in self.refused
        )

    async def _tokens_of(self, subject: Subject) -> Tokens:
        """Mint tokens by real sign-ins and refreshes."""
        tokens = Tokens()
        more = {"client_id": subject.client_id} if subject.client_id else {}
        for number in range(SIGN_INS):
            name = subject.names[number * len(subject.names) // SIGN_INS]
            found = await self._sign_in(name, **more)
            tokens.access.append(found["access_token"])
            for _ in range(SAMPLES // SIGN_INS - 1):
                answer = await self._with(found["refresh_token"], "POST", "/refresh")
                found = dict(answer.json())
                tokens.access.append(found["access_token"])
            tokens.refresh.append(found["refresh_token"])
        statuses = Counter([status for status, _ in await self._statuses(tokens.access)])
        if statuses != {200: len(tokens.access)}:
            raise SystemExit(f"tokens are refused before the change: {statuses}")
        return tokens

    async def _all_refused(self, one: Refused, when: str) -> None:
        found = Counter(await self._statuses(one.tokens.access))
        accepted = {said: times for said, times in found.items() if said[0] != 401}
        # by the change, and not because they expired
        if accepted or {code for _, code in found} - GONE:
            raise SystemExit(f"{one.what}, {when}: tokens of before are answered {dict(found)}")

    async def _statuses(self, tokens: list[str]) -> list[tuple[int, str]]:
        limit = asyncio.Semaphore(AT_ONCE)

        async def ask(token: str) -> tuple[int, str]:
            async with limit:
                answer = await self._with(token, "GET", "/protected")
            return answer.status_code, answer.json().get("code", "")

        return list(await asyncio.gather(*(ask(token) for token in tokens)))

    async def _watch(self) -> float:
        """Return the milliseconds that the slowest request took: protected ones, and sign-ins."""
        slowest, until = 0.0, time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < until:
            for work in (self._with(self.live, "GET", "/protected"), self._sign_in("testuser")):
                began = time.perf_counter()
                await work
                slowest = max(slowest, time.perf_counter() - began)
        return round(slowest * 1000, 1)

    async def _sign_in(self, username: str, **more: str) -> dict[str, str]:
        body = {"username": username, "password": PASSWORD, "transport": "json", **more}
        answer = await self.client.post("/login", json=body)
        if answer.status_code != 200:
            raise SystemExit(f"sign-in of {username}: {answer.status_code} {answer.text}")
        return dict(answer.json())

    async def _with(self, token: str, method: str, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return await self.client.request(method, path, headers=headers)


async def _role(bench: Bench, name: str, holders: int) -> Subject:
    await bench.make("/admin/roles", name=name, permissions=["audit:read"], includes=[])
    names = [f"{name}-{number:07}" for number in range(holders)]
    ids = await add_users(bench.database, names, bench.hashed, name)
    return Subject(f"/admin/roles/{name}", names, ids)


async def _app(bench: Bench, holders: Subject) -> Subject:
    role = holders.path.rpartition("/")[2]
    app = await bench.make(
        "/admin/clients", name="many", allowed_roles=[role], audiences=[],
        grants=["refresh_token"], public=True,
    )  # fmt: skip
    client_id = str(app["client_id"])
    subject = Subject(f"/admin/clients/{client_id}", holders.names, holders.owners, client_id)
    await _fill(bench, [subject])
    return subject


async def _user(bench: Bench, name: str, sessions: int) -> Subject:
    (user_id,) = await add_users(bench.database, [name], bench.hashed, "user")
    subject = Subject(f"/admin/users/{user_id}", [name], [user_id] * sessions)
    await _fill(bench, [subject])
    return subject


async def _fill(bench: Bench, subjects: Sequence[Subject]) -> None:
    """Add the sessions of client apps and of users, which a change has ended."""
    for one in subjects:
        client_id = UUID(one.client_id) if one.client_id else None
        await add_sessions(bench.database, one.owners, client_id)


async def _measure(bench: Bench, holders: int, sessions: int) -> None:
    print(
        f"writing {holders:,} users, as many sessions, and {sessions:,} of one user ...", flush=True
    )
    await bench.make("/admin/roles", name="rest", permissions=[], includes=[])
    many = await _role(bench, "many", holders)
    roles = [await _role(bench, f"few{number}", FEW) for number in range(FEW_ROUNDS)]
    apps, app = [await _app(bench, role) for role in roles], await _app(bench, many)
    users = [await _user(bench, f"user{number}", FEW) for number in range(FEW_ROUNDS)]
    user = await _user(bench, "busy", sessions)

    off, on = {"is_active": False}, {"is_active": True}
    permissions = {"permissions": ["audit:read", "users:read"]}
    await bench.compare("a role changed", roles, many, "PATCH", permissions)
    await bench.compare("a client app disabled", apps, app, "PATCH", off)
    for one in [*apps, app]:
        await bench.change("PATCH", one.path, on)
    await _fill(bench, [*apps, app])
    await bench.compare("a client app deleted", apps, app, "DELETE")
    await bench.compare("a role deleted", roles, many, "DELETE", below="?reassign_to=rest")
    await bench.compare("a user logged out", users, user, "POST", below="/logout")
    await _fill(bench, [*users, user])
    await bench.compare("a user deleted", users, user, "DELETE")
    await bench.later()


@contextmanager
def _served(folder: Path, kind: str) -> Iterator[tuple[str, str]]:
    """A service of its own: yield its URL, and its database's."""
    environ: dict[str, Any] = {
        "JWT_ACCESS_TOKEN_EXPIRES": LIFETIME,
        "ROLECALL_LOG_LEVEL": "WARNING",
    }
    with ExitStack() as stack:
        url = f"sqlite+aiosqlite:///{folder / 'serve' / 'data' / 'rolecall.sqlite3'}"
        if kind == "postgresql":
            url = stack.enter_context(postgresql(folder / "pg"))
            environ["DATABASE_URL"] = url.replace("+asyncpg", "")
        serving = start(folder / "serve", "--demo", **environ)
        stack.callback(serving.stop)
        yield serving.url, url


async def main(holders: int, sessions: int, kind: str) -> None:
    """Print what was measured."""
    with (
        tempfile.TemporaryDirectory(prefix="rcm-") as folder,
        _served(Path(folder), kind) as (url, database_url),
    ):
        async with (
            database_at(database_url) as database,
            httpx.AsyncClient(base_url=url, timeout=600) as client,
        ):
            bench = Bench(client, database, await password_hash_of(database, "testuser"))
            await bench.sign_in_as_admin()
            await _measure(bench, holders, sessions)
    keep(
        f"many {holders} {kind}",
        f"One change of {holders:,} holders or sessions, {sessions:,} of one user ({kind})",
        bench.figures,
    )


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()] or [1_000_000, 400_000]
    kinds = [word for word in sys.argv[1:] if not word.isdecimal()] or ["sqlite", "postgresql"]
    for one_kind in kinds:
        asyncio.run(main(numbers[0], numbers[-1], one_kind))
