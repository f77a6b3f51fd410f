"""Import and export of users: all or nothing, every bad line by its number, hashes taken over."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from api.db.models import User
from api.parts import Parts
from api.services.audit import SYSTEM
from api.services.roles import RoleView
from tests.conftest import sign_in
from tests.unit.auth.test_foreign import HASHES, PASSWORD


def line(**user: Any) -> bytes:
    """Return a line of a file."""
    return json.dumps(user).encode() + b"\n"


async def count(parts: Parts) -> int:
    """Return how many users there are."""
    async with parts.database.read() as session:
        return await session.scalar(select(func.count(User.id))) or 0


async def test_hashes_are_taken_over_and_replaced(client: httpx.AsyncClient, parts: Parts) -> None:
    """Each kind signs in with its password, and is argon2id of today's profile from then on."""
    lines = [line(username=kind, password_hash=h, email=None) for kind, h in HASHES.items()]
    lines += [b"\n", line(username="plain", password=PASSWORD, roles=["user", "admin"])]
    done = await parts.transfer.take_in(lines, SYSTEM)
    assert (done.made, done.bad) == (len(HASHES) + 1, [])
    for name in (*HASHES, "plain"):
        wrong = await client.post("/login", json={"username": name, "password": "wrong"})
        assert wrong.json()["code"] == "bad_credentials"
        assert (await sign_in(client, name, PASSWORD))["login"] is True
        row = await parts.users.row((await parts.users.find(name)).id)
        assert not parts.passwords.outdated(row.password_hash)
        assert (await sign_in(client, name, PASSWORD))["login"] is True
    assert (await parts.users.find("plain")).roles == ("admin", "user")


BAD = [
    b"{", b"[]", b'"x"', b"\xff\xfe", line(username="a"), line(username="", password=PASSWORD),
    line(username="TESTUSER", password=PASSWORD), line(username="b", password="short"),
    line(username="c", password=PASSWORD, roles=["nobody"]), line(username="d", password_hash="x"),
    line(username="e", password=PASSWORD, password_hash=HASHES["bcrypt"]),
    line(username="f", password=PASSWORD, zz=1), line(username="Good", password=PASSWORD),
    line(username="g", password=PASSWORD, is_active="yes"),
    line(username="h\u200b", password=PASSWORD),
]  # fmt: skip


async def test_one_bad_line_and_nobody_is_made(parts: Parts) -> None:
    """Every bad line is told by its number, with a reason; the good ones wait."""
    before = await count(parts)
    lines = [line(username="good", password=PASSWORD), *BAD]
    done = await parts.transfer.take_in(lines, SYSTEM)
    assert done.made == 0
    assert sorted(bad.number for bad in done.bad) == list(range(2, len(lines) + 1))
    assert all(bad.reasons for bad in done.bad)
    assert PASSWORD not in str(done.bad)
    assert await count(parts) == before


async def test_the_good_lines_alone_where_that_is_asked(parts: Parts) -> None:
    """``partial`` makes the good ones and tells of the others."""
    before = await count(parts)
    lines = [*BAD, line(username="good2", password=PASSWORD)]
    done = await parts.transfer.take_in(lines, SYSTEM, partial=True)
    assert (done.made, len(done.bad)) == (2, len(BAD) - 1)
    assert await count(parts) == before + 2


async def test_what_is_given_out_can_be_taken_in(client: httpx.AsyncClient, parts: Parts) -> None:
    """A round trip over many batches: the same users, the same passwords, the same roles."""
    lines = [line(username=f"u{n}", password_hash=HASHES["bcrypt"]) for n in range(1_200)]
    seen: list[int] = []
    done = await parts.transfer.take_in(lines, SYSTEM, progress=seen.append)
    assert (done.made, sum(seen), done.bad) == (1_200, 1_200, [])
    out = [json.loads(row) async for row in parts.transfer.give_out()]
    assert len(out) == 1_202
    admin = next(row for row in out if row["username"] == "admin")
    assert (admin["roles"], admin["is_active"]) == (["admin", "user"], True)
    assert admin["password_hash"].startswith("$argon2id$")
    again = [json.dumps(row | {"username": "again-" + row["username"]}).encode() for row in out]
    done = await parts.transfer.take_in(again, SYSTEM)
    assert (done.made, done.bad) == (1_202, [])
    await sign_in(client, "again-admin", "adminpass")
    assert (await parts.users.find("again-admin")).roles == ("admin", "user")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_an_empty_file_makes_nobody(parts: Parts) -> None:
    """Nothing to do is nothing done."""
    done = await parts.transfer.take_in([], SYSTEM)
    assert (done.made, done.bad) == (0, [])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_only_who_holds_too_much_is_refused(parts: Parts) -> None:
    """Roles that do not fit in a token together are told; some of them, or none, are fine."""
    for name in "ab":
        permissions = tuple(f"{name}{n}:{'y' * 50}" for n in range(25))
        await parts.roles.create(RoleView(name, "", permissions, ()), SYSTEM)
    combinations = [["a", "b"], ["a"], ["b"], []]
    lines = [
        line(username=f"u{n}", password_hash=HASHES["bcrypt"], roles=roles)
        for n, roles in enumerate(combinations)
    ]
    done = await parts.transfer.take_in(lines, SYSTEM, partial=True)
    assert done.made == 3
    assert [(bad.number, bad.reasons) for bad in done.bad] == [
        (1, ["roles: Together they do not fit in a token."])
    ]
