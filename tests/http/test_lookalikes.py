"""New usernames that look like others over HTTP: refused; whoever has one signs in with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text, update

from api.app import create_app
from api.asgi import AsyncFlask
from api.db import Database, migrate
from api.db.models import User
from api.errors import StartupError
from api.parts import EXTENSION, Parts
from api.services import bootstrap
from api.services.audit import Origin
from api.settings import Settings
from tests.conftest import bearer, client_of, sign_in

PASSWORD = "correct-Harbour-93"
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def open_app(settings: Settings) -> AsyncIterator[AsyncFlask]:
    """A service where anybody may register."""
    app = create_app(replace(settings, registration_open=True))
    async with app.running():
        yield app


async def registered(app: AsyncFlask, name: str) -> httpx.Response:
    """Register somebody of that name."""
    async with client_of(app) as client:
        return await client.post("/register", json={"username": name, "password": PASSWORD})


@ON_SQLITE
async def test_no_registration_passes_for_an_administrator(open_app: AsyncFlask) -> None:
    """In whatever spelling: 422 on the field, never 500, and nobody is made."""
    for name in (
        "\u0430dmin", "adm\u0131n", "\uff41dmin", "admin\ufe0f", "ad\u200bmin", "\u202eadmin",
        "a\u0300\u0301\u0302\u0303\u0304dmin", "admin\u2800", "admin\U000e0100", "adm1n", "Admin.",
        "ADM\u0130N", "\u1d00dmin", "\U0001f170dmin", "admin\u20dd", "admin", "\u2066admin\u2069",
    ):  # fmt: skip
        answer = await registered(open_app, name)
        assert answer.status_code == 422, (name, answer.text)
        assert answer.json()["code"] == "validation_failed"
        assert [error["field"] for error in answer.json()["errors"]] == ["username"]
    parts: Parts = open_app.extensions[EXTENSION]
    rows = await parts.database.rows(select(User.username).order_by(User.username))
    assert [row.username for row in rows] == ["admin", "testuser"]


@ON_SQLITE
async def test_ordinary_names_of_any_script_register_and_sign_in(open_app: AsyncFlask) -> None:
    """In one script, with its accents."""
    for name in ("Привет", "山田", "محمد", "José", "한글kim"):
        answer = await registered(open_app, name)
        assert answer.status_code == 201, (name, answer.text)
        async with client_of(open_app) as client:
            assert (await sign_in(client, name, PASSWORD))["user"]["username"] == name


async def test_of_confusable_names_one_is_registered(open_app: AsyncFlask) -> None:
    """One after the other, and at once: 201 and 409, on both databases."""
    for names in (("scope", "\u0455\u0441\u043e\u0440\u0435"), ("Paul7", "PauI7")):
        assert [(await registered(open_app, name)).status_code for name in names] == [201, 409]
    answers = await asyncio.gather(
        *(registered(open_app, name) for name in ("modem", "modern", "rnodem", "rnodern"))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    refused = next(answer.json() for answer in answers if answer.status_code == 409)
    assert refused["code"] == "username_taken"
    assert "errors" not in refused


@ON_SQLITE
async def test_operators_give_reserved_names_but_no_lookalikes(app: AsyncFlask) -> None:
    """Who may make users could else make one that passes for an administrator."""
    async with client_of(app) as admin:
        tokens = await sign_in(admin, "admin", "adminpass", transport="json")
        admin.headers.update(bearer(tokens["access_token"]))

        async def made(name: str) -> int:
            body = {"username": name, "password": PASSWORD, "roles": ["user"]}
            return (await admin.post("/admin/users", json=body)).status_code

        assert await made("support") == 201
        assert await made("\u0430dmin") == 422
        assert await made("adm\u0131n") == 409
        assert await made("testu\u0455er") == 422


@ON_SQLITE
async def test_whoever_has_such_a_name_keeps_it(app: AsyncFlask, parts: Parts) -> None:
    """A mixed name of before signs in; so does one that an import brings."""
    old = {"username": "\u0430nn", "username_key": "\u0430nn", "username_skeleton": None}
    async with parts.database.write() as session:
        await session.execute(update(User).where(User.username == "testuser").values(old))
    async with client_of(app) as client:
        signed_in: dict[str, Any] = await sign_in(client, "\u0430nn", "testpass")
        assert signed_in["user"]["username"] == "\u0430nn"


async def test_an_import_takes_the_names_that_people_have(
    open_app: AsyncFlask,
) -> None:
    """Mixed or confusable, they are made; the like of them is not registered afterwards."""
    parts: Parts = open_app.extensions[EXTENSION]
    names = ("modem", "modern", "\u0430nn", "testu5er", "test\u0443ser", "support")
    lines = [
        json.dumps({"username": name, "password": PASSWORD}).encode() + b"\n" for name in names
    ]
    done = await parts.transfer.take_in(lines, Origin(actor="console"))
    assert (done.made, done.bad) == (6, [])
    for name in names:
        async with client_of(open_app) as client:
            assert (await sign_in(client, name, PASSWORD))["user"]["username"] == name
    for name in ("rnodem", "ann", "modern"):
        answer = await registered(open_app, name)
        assert (answer.status_code, answer.json()["code"]) == (409, "username_taken")


@ON_SQLITE
async def test_a_first_administrator_has_no_deceptive_name(app: AsyncFlask, parts: Parts) -> None:
    """One sentence that names the setting, no traceback."""
    with pytest.raises(StartupError, match=r"ROLECALL_ADMIN_USERNAME .* different scripts"):
        await bootstrap._first_admin(parts.users, "b\u043ess", PASSWORD)
    await bootstrap._first_admin(parts.users, "root", PASSWORD)
    assert (await parts.users.find("root")).roles == ("admin", "user")


async def test_a_migration_gives_names_of_before_their_skeletons(database_url: str) -> None:
    """Of two that are confusable the first has it; both keep their names."""
    database = Database(database_url)
    try:
        await migrate.downgrade(database, "0004")
        async with database.write() as session:
            copied = (
                "INSERT INTO users (id, username, username_key, password_hash, is_active, version,"
                " created_at, updated_at) SELECT '{}', '{}', '{}', password_hash, is_active,"
                " version, created_at, updated_at FROM users WHERE username = 'testuser'"
            )
            for number, name in enumerate(("modem", "modern")):
                one = f"ffffffff-ffff-7fff-8fff-fffffffffff{number}"
                one = one if database.dialect == "postgresql" else one.replace("-", "")
                await session.execute(text(copied.format(one, name, name)))
        await migrate.upgrade(database)
        rows = await database.rows(select(User.username, User.username_skeleton))
        found = {row.username: row.username_skeleton for row in rows}
    finally:
        await database.close()
    assert found == {
        "admin": "adrnin", "testuser": "testuser", "modem": "rnodern", "modern": None,
    }  # fmt: skip
