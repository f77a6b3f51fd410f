"""Who has an account cannot be told: the same answer for the same work (27).

Work is counted, not timed: calls that hash, and the statements that the database is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import bcrypt
import httpx
import pytest
from flask import has_request_context
from sqlalchemy import event, update

from api.app import create_app
from api.asgi import AsyncFlask
from api.auth.pool import Pool
from api.db.models import User
from api.parts import EXTENSION, Parts
from api.settings import Settings
from tests.conftest import bearer, client_of, sign_in

PASSWORD = "kumquat vienna 77"
Answer = tuple[int, dict[str, Any], dict[str, str]]


@dataclass
class Work:
    """What requests had done: what was hashed, and which statements were sent, in order."""

    hashed: list[str] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)

    def sent(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        """Note a statement of a request: what is done beside them, now and then, is not theirs."""
        if has_request_context():
            self.statements.append(statement)

    def taken(self) -> tuple[list[str], list[str]]:
        """Return it, and begin anew."""
        found = (self.hashed[:], self.statements[:])
        self.hashed.clear()
        self.statements.clear()
        return found


@pytest.fixture
async def open_app(settings: Settings) -> Any:
    """A service where anybody may register."""
    app = create_app(replace(settings, registration_open=True))
    async with app.running():
        yield app


@pytest.fixture
def work(open_app: AsyncFlask, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Count the work of ``open_app``."""
    parts: Parts = open_app.extensions[EXTENSION]
    found = Work()
    run = Pool.run

    async def noting(pool: Pool, job: Any) -> Any:
        found.hashed.append(job.__qualname__.split(".<locals>")[0])
        return await run(pool, job)

    monkeypatch.setattr(Pool, "run", noting)
    engine = parts.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", found.sent)
    yield found
    event.remove(engine, "before_cursor_execute", found.sent)


async def asked(client: httpx.AsyncClient, path: str, headers: Any = None, **body: Any) -> Answer:
    """Return all that a client can see of an answer, but for the ids and the date of it."""
    answer = await client.post(path, json=body, headers=headers)
    seen = {n: v for n, v in answer.headers.items() if n not in {"x-request-id", "date"}}
    document = answer.json() if answer.content else {}
    return answer.status_code, document | {"request_id": ""}, seen


async def disable(parts: Parts, username: str) -> None:
    """Disable a user behind the service's back."""
    async with parts.database.write() as session:
        await session.execute(update(User).where(User.username == username).values(is_active=False))


async def test_the_work_of_requests_is_counted_and_no_other(
    open_app: AsyncFlask, work: Work
) -> None:
    """What is sent in a request's own tasks and threads, and nothing that runs beside it."""
    parts: Parts = open_app.extensions[EXTENSION]
    async with client_of(open_app) as client:
        _, one = await asyncio.gather(
            parts.database.ping(), asked(client, "/login", username="nobody", password="x")
        )
        assert one[0] == 401
        counted = work.taken()[1]
        await parts.database.ping()
        assert work.taken() == ([], [])
        await asked(client, "/login", username="nobody", password="x")
        assert work.taken()[1] == counted
        assert (await client.get("/health/ready")).status_code == 200
        assert len(work.taken()[1]) == 1


async def test_a_login_that_fails_fails_in_one_way(open_app: AsyncFlask, work: Work) -> None:
    """Unknown, wrong, disabled with the wrong and the right password: one answer, one work."""
    parts: Parts = open_app.extensions[EXTENSION]
    async with client_of(open_app) as client:
        for name in ("gone", "Zo\xeb \U0001f600"):
            await asked(client, "/register", username=name, password=PASSWORD)
        await disable(parts, "gone")
        await asked(client, "/login", username="nobody", password="x")
        work.taken()
        outcomes = []
        for username, password in (
            ("nobody", "x"), ("testuser", "x"), ("gone", "x"), ("gone", PASSWORD),
            ("Zo\xeb \U0001f600", "x"), ("TESTUSER", "x"), ("nobody\u0301 else", PASSWORD),
            ("x" * 64, "y" * 256), ("admin", " "),
        ):  # fmt: skip
            answer = await asked(client, "/login", username=username, password=password)
            outcomes.append((answer, work.taken()))
    (status, problem, headers), (hashed, statements) = outcomes[0]
    assert (status, problem["code"]) == (401, "bad_credentials")
    assert headers["www-authenticate"] == "Bearer"
    assert hashed == ["Passwords.verify"]
    assert len([s for s in statements if "INSERT INTO audit_events" in s]) == 1
    for outcome in outcomes[1:]:
        assert outcome == outcomes[0]


async def test_hashes_of_other_systems_are_verified_once_too(
    open_app: AsyncFlask, work: Work
) -> None:
    """A user with a bcrypt hash: one verification, one answer, as for nobody."""
    parts: Parts = open_app.extensions[EXTENSION]
    hashed = bcrypt.hashpw(b"former", bcrypt.gensalt(4)).decode()
    async with parts.database.write() as session:
        await session.execute(
            update(User).where(User.username == "testuser").values(password_hash=hashed)
        )
    async with client_of(open_app) as client:
        work.taken()
        nobody = await asked(client, "/login", username="nobody", password="x"), work.taken()
        foreign = await asked(client, "/login", username="testuser", password="x"), work.taken()
    assert foreign == nobody


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_throttling_tells_nobody_from_somebody(open_app: AsyncFlask, work: Work) -> None:
    """The eleventh attempt is 429 whether the name is anybody's, and nothing is looked at."""
    async with client_of(open_app) as client:
        outcomes = []
        for name in ("nobody", "testuser"):
            for _ in range(10):
                assert (await asked(client, "/login", username=name, password="x"))[0] == 401
            work.taken()
            status, problem, headers = await asked(client, "/login", username=name, password="x")
            headers.pop("retry-after")
            outcomes.append((status, problem, headers, work.taken()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 429
    assert outcomes[0][3] == ([], [])


async def test_registering_costs_the_same_for_a_name_that_is_taken(
    open_app: AsyncFlask, work: Work
) -> None:
    """Checked, hashed and sent to the database alike; a weak password is told first."""
    parts: Parts = open_app.extensions[EXTENSION]
    async with client_of(open_app) as client:
        await asked(client, "/register", username="gone", password=PASSWORD)
        await disable(parts, "gone")
        work.taken()
        done = {}
        for name in ("testuser", "TESTUSER", "gone", "newcomer"):
            answer = await asked(client, "/register", username=name, password=PASSWORD)
            done[name] = (answer[0], *work.taken())
        weak = []
        for name in ("testuser", "newcomer", "stranger"):
            answer = await asked(client, "/register", username=name, password="password")
            weak.append((answer, work.taken()))
    assert {name: found[0] for name, found in done.items()} == {
        "testuser": 409, "TESTUSER": 409, "gone": 409, "newcomer": 201,
    }  # fmt: skip
    hashed = ["Passwords.refuse_weak", "Passwords.hash"]
    assert all(found[1] == hashed for found in done.values())
    until = len(done["testuser"][2])
    assert all(found[2][:until] == done["testuser"][2] for found in done.values())
    assert "INSERT INTO users" in done["testuser"][2][-1]
    assert weak[0] == weak[1] == weak[2]
    assert weak[0][0][0] == 422
    assert weak[0][1] == (["Passwords.refuse_weak"], [])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_closed_registration_asks_nobody(client: httpx.AsyncClient, parts: Parts) -> None:
    """403 for every name alike; nothing is hashed, no statement sent."""
    work = Work()
    event.listen(parts.database.engine.sync_engine, "before_cursor_execute", work.sent)
    outcomes = [
        await asked(client, "/register", username=name, password=PASSWORD)
        for name in ("testuser", "newcomer")
    ]
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0][0], outcomes[0][1]["code"]) == (403, "registration_closed")
    assert work.taken() == ([], [])


async def test_a_password_change_that_fails_fails_in_one_way(
    open_app: AsyncFlask, work: Work
) -> None:
    """Wrong with a good, a weak or the same new one: one verification, and nothing told of it."""
    async with client_of(open_app) as client:
        token = bearer((await sign_in(client, transport="json"))["access_token"])
        outcomes = []
        for new in (PASSWORD, "password", "testuser-x", "testpass"):
            work.taken()
            answer = await asked(
                client, "/me/password", token, current_password="wrong", new_password=new
            )
            outcomes.append((answer, work.taken()))
        assert outcomes[0][0][1]["code"] == "bad_credentials"
        assert outcomes[0][1][0] == ["Passwords.verify"]
        assert all(outcome == outcomes[0] for outcome in outcomes)
        work.taken()
        right = await asked(
            client, "/me/password", token, current_password="testpass", new_password=PASSWORD
        )
        assert right[0] == 204
        assert work.taken()[0] == ["Passwords.verify", "Passwords.refuse_weak", "Passwords.hash"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_is_not_ones_own_is_as_good_as_not_there(client: httpx.AsyncClient) -> None:
    """Another's session and no session: the same 404."""
    theirs = bearer((await sign_in(client, "admin", "adminpass", transport="json"))["access_token"])
    session = (await client.get("/me/sessions", headers=theirs)).json()["items"][0]["id"]
    mine = bearer((await sign_in(client, transport="json"))["access_token"])
    client.cookies.clear()
    answers = [
        await client.delete(f"/me/sessions/{name}", headers=mine)
        for name in (session, "00000000-0000-7000-8000-000000000000")
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    one, other = (answer.json() | {"request_id": ""} for answer in answers)
    assert one == other
    assert (await client.get("/me", headers=theirs)).status_code == 200
