"""Sessions against a simple model: whatever is done in whatever order, the two agree."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import httpx
import pytest
from hypothesis import Phase
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import update

from api.app import create_app
from api.db.models import Session
from api.parts import EXTENSION, Parts
from api.services.audit import SYSTEM
from api.settings import Settings
from tests import conftest
from tests.conftest import bearer, client_of, sign_in

T = TypeVar("T")
GRACE = 300


@dataclass
class UserModel:
    """What there is to know of a user."""

    name: str
    active: bool = True
    version: int = 1
    admin: bool = False


@dataclass
class SessionModel:
    """One login: its refresh tokens, the newest last, and its access tokens with their ``ver``."""

    user: UserModel
    refresh: list[str] = field(default_factory=list)
    access: list[tuple[str, int]] = field(default_factory=list)
    live: bool = True
    in_grace: bool = False


class Sessions(RuleBasedStateMachine):
    """Login, refresh, retry, replay, logout, role change, disable, Redis flushed, time passed."""

    build: ClassVar[Any]
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.parts: Parts
        self.client: httpx.AsyncClient
        self.users = [UserModel("ann"), UserModel("bob")]
        self.all: list[SessionModel] = []
        self.do(self._open())

    def do(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return self.runner.run(run())

    async def _open(self) -> None:
        app = create_app(type(self).build(self.stack))
        await self.stack.enter_async_context(app.running())
        self.client = await self.stack.enter_async_context(client_of(app))
        self.parts = app.extensions[EXTENSION]
        for user in self.users:
            await self.parts.users.create(
                user.name, "testpass", None, ["user"], SYSTEM, checked=False
            )

    def teardown(self) -> None:
        self.do(self.stack.aclose())
        self.runner.close()

    async def _ask(self, method: str, path: str, token: str) -> tuple[int, dict[str, Any]]:
        answer = await self.client.request(method, path, headers=bearer(token))
        return answer.status_code, answer.json()

    def _take(self, session: SessionModel, tokens: dict[str, Any]) -> None:
        session.access.append((tokens["access_token"], session.user.version))
        if tokens["refresh_token"] not in session.refresh:
            session.refresh.append(tokens["refresh_token"])

    def _end(self, session: SessionModel) -> None:
        session.live = False

    @rule(target=sessions, who=st.integers(0, 1))
    def login(self, who: int) -> SessionModel:
        """A right password opens a session, unless the user is disabled."""
        user = self.users[who]
        session = SessionModel(user, live=user.active)
        self.all.append(session)
        if user.active:
            self._take(session, self.do(sign_in(self.client, user.name, transport="json")))
        else:
            body = {"username": user.name, "password": "testpass"}
            assert self.do(self.client.post("/login", json=body)).status_code == 401
        return session

    @rule(session=sessions, times=st.integers(1, 3))
    def refresh(self, session: SessionModel, times: int) -> None:
        """The newest refresh token gives the next; a dead session's gives nothing."""
        for _ in range(times if session.refresh else 0):
            status, body = self.do(self._ask("POST", "/refresh", session.refresh[-1]))
            if session.live:
                assert status == 200, body
                assert body["refresh_token"] not in session.refresh
                self._take(session, body)
                session.in_grace = True
            else:
                assert (status, body["code"]) == (401, "token_revoked")

    @rule(session=sessions)
    def retry(self, session: SessionModel) -> None:
        """The immediate predecessor gives the same generation in the grace, else it is theft."""
        if len(session.refresh) < 2:
            return
        status, body = self.do(self._ask("POST", "/refresh", session.refresh[-2]))
        if not session.live:
            assert (status, body["code"]) == (401, "token_revoked")
        elif session.in_grace:
            assert status == 200, body
            assert _jti(body["refresh_token"]) == _jti(session.refresh[-1])
            session.access.append((body["access_token"], session.user.version))
        else:
            assert (status, body["code"]) == (401, "refresh_reused")
            self._end(session)

    @rule(session=sessions, which=st.integers(0, 3))
    def replay(self, session: SessionModel, which: int) -> None:
        """An older one than those two is theft at any time, and ends the session."""
        older = session.refresh[:-2]
        if not older:
            return
        status, body = self.do(self._ask("POST", "/refresh", older[which % len(older)]))
        assert (status, body["code"]) == (
            401, "refresh_reused" if session.live else "token_revoked",
        )  # fmt: skip
        self._end(session)

    @rule(session=consumes(sessions), by_refresh=st.booleans())
    def logout(self, session: SessionModel, by_refresh: bool) -> None:
        """Either token ends the session, a stale access token too."""
        if not session.access:
            return
        token, _ = session.access[-1]
        status, body = self.do(
            self._ask("POST", "/logout", session.refresh[-1] if by_refresh else token)
        )
        if not session.live:
            assert (status, body["code"]) == (401, "token_revoked")
        else:
            assert (status, body) == (200, {"logout": True})
            self._end(session)

    @rule(who=st.integers(0, 1))
    def change_roles(self, who: int) -> None:
        """A change of roles leaves the sessions and makes their access tokens stale."""
        user = self.users[who]
        user.admin = not user.admin
        names = ["admin", "user"] if user.admin else ["user"]
        self.do(self._set_roles(user, names))
        user.version += 1

    async def _set_roles(self, user: UserModel, names: list[str]) -> None:
        found = await self.parts.users.find(user.name)
        await self.parts.users.set_roles(found.id, names, SYSTEM)

    @rule(rare=st.integers(0, 5))
    def disable(self, rare: int) -> None:
        """Now and then bob is disabled: all his sessions end."""
        user = self.users[1]
        if rare or not user.active:
            return
        self.do(self._deactivate(user))
        user.active = False
        user.version += 1
        for session in self.all:
            if session.user is user:
                self._end(session)

    async def _deactivate(self, user: UserModel) -> None:
        found = await self.parts.users.find(user.name)
        await self.parts.users.deactivate(found.id, SYSTEM)

    @rule()
    def flush_redis(self) -> None:
        """Everything that Redis knows is lost."""
        self.do(self._flush())

    async def _flush(self) -> None:
        # in one step, as FLUSHALL is; the Redis is shared with other tests
        script = "for _, key in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('DEL', key) end"
        pattern = f"{self.parts.settings.redis_prefix}*"
        await self.parts.blocklist.redis.eval(script, 0, pattern)

    @rule()
    def let_the_grace_pass(self) -> None:
        """More than the grace goes by, for rotations."""
        self.do(self._age())
        for session in self.all:
            session.in_grace = False

    async def _age(self) -> None:
        async with self.parts.database.write() as session:
            for row in await session.execute(Session.__table__.select()):
                if row.rotated_at is not None:
                    await session.execute(
                        update(Session)
                        .where(Session.id == row.id)
                        .values(rotated_at=row.rotated_at - timedelta(seconds=GRACE + 1))
                    )

    @invariant()
    def access_tokens_say_what_the_model_says(self) -> None:
        """Each session's newest and oldest access tokens: let in, stale, or revoked."""
        for session in self.all[-6:]:
            for token, version in {*session.access[:1], *session.access[-1:]}:
                status, body = self.do(self._ask("GET", "/protected", token))
                if not session.live:
                    assert (status, body["code"]) == (401, "token_revoked")
                elif version < session.user.version:
                    assert (status, body["code"]) == (401, "token_stale")
                else:
                    assert status == 200, body
                    assert ("admin" in body["roles"]) == session.user.admin


def _jti(token: str) -> str:
    import jwt

    return str(jwt.decode(token, options={"verify_signature": False})["jti"])


@pytest.fixture
def build(
    sqlite_template: Path, redis_server: conftest.RedisServer, tmp_path: Path
) -> Iterator[Any]:
    """Make settings for one run of the machine: a database and keys in Redis of its own."""

    def settings_of(stack: AsyncExitStack) -> Settings:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=tmp_path))
        path = Path(folder) / "db.sqlite3"
        shutil.copy(sqlite_template, path)
        settings = conftest._settings(f"sqlite+aiosqlite:///{path}", redis_server.url, Path(folder))
        # no example takes so long, however busy the machine
        return replace(settings, refresh_grace=GRACE)

    return settings_of


def test_sessions_agree_with_the_model(build: Any) -> None:
    """In any order: one successor a refresh token, and what was taken back stays so (31 to 48)."""
    machine = type("Machine", (Sessions,), {"build": staticmethod(build)})
    run_state_machine_as_test(
        machine,
        settings=profile(
            max_examples=20, stateful_step_count=30, deadline=None, derandomize=True,
            # each step is a few HTTP requests: an example that fails is told as it is
            database=None, phases=[Phase.generate],
        ),
    )  # fmt: skip
