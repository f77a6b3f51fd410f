"""No token is made that the service refuses for its size: whatever grows is refused before (81)."""

from __future__ import annotations

import httpx
import pytest

from api.asgi import AsyncFlask
from api.auth.claims import LARGEST_COOKIE
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_admin import ON_SQLITE, PASSWORD, code, made, role
from tests.http.test_admin import admin as admin
from tests.http.test_clients import CLIENTS, granted, registered

TOO_LONG = (422, "validation_failed")


def permissions(area: str, number: int) -> list[str]:
    """Return so many permissions of 40 characters."""
    return [f"{area}{n:03}:{'x' * 33}" for n in range(number)]


async def largest_cookie(app: AsyncFlask, name: str) -> int:
    """Return how long the longest cookie of a sign-in is; its token must be accepted."""
    async with client_of(app) as client:
        answer = await client.post("/login", json={"username": name, "password": PASSWORD})
        assert answer.status_code == 200
        token = bearer(answer.json()["access_token"])
        client.cookies.clear()
        assert (await client.get("/protected", headers=token)).status_code == 200
        return max(len(cookie) for cookie in answer.headers.get_list("Set-Cookie"))


async def test_an_included_role_does_not_grow_beyond_a_token(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Not by itself, through two layers, nor beside another role that a holder has."""
    await role(admin, "base", *permissions("b", 10))
    await role(admin, "middle", includes=["base"])
    await role(admin, "top", includes=["middle"])
    await role(admin, "beside", *permissions("s", 10))
    await made(admin, "one", "top")
    await made(admin, "two", "top", "beside")
    for number, expected in ((20, 200), (24, 200), (50, 422), (200, 422), (24, 200)):
        answer = await admin.patch(
            "/admin/roles/base", json={"permissions": permissions("b", number)}
        )
        assert answer.status_code == expected, number
        for name in ("one", "two"):
            assert await largest_cookie(app, name) < LARGEST_COOKIE
    # nor by an include more, or a role of its own that somebody has
    await role(admin, "more", *permissions("m", 30))
    answer = await admin.patch("/admin/roles/middle", json={"includes": ["base", "more"]})
    assert code(answer) == TOO_LONG
    # nor by a role that takes the place of another
    await role(admin, "small", *permissions("t", 9))
    for name, expected in (("more", 422), ("small", 204)):
        answer = await admin.delete("/admin/roles/beside", params={"reassign_to": name})
        assert answer.status_code == expected, name
    answer = await admin.delete("/admin/roles/small", params={"reassign_to": "more"})
    assert code(answer) == TOO_LONG
    assert await largest_cookie(app, "two") < LARGEST_COOKIE


@ON_SQLITE
async def test_a_large_role_may_shrink(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Nobody is kept from taking permissions away, however near to the limit holders are."""
    await role(admin, "base", *permissions("b", 38))
    await made(admin, "one", "base")
    await role(admin, "other", *permissions("o", 60))
    for number in (37, 10, 0):
        body = {"permissions": permissions("b", number)}
        assert (await admin.patch("/admin/roles/base", json=body)).status_code == 200
    assert await largest_cookie(app, "one") < LARGEST_COOKIE


@ON_SQLITE
async def test_the_longest_username_counts(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """64 characters of four bytes: a role that fits for others may not fit for theirs."""
    name = "😀" * 64
    await role(admin, "base", *permissions("b", 10))
    answer = await admin.post(
        "/admin/users", json={"username": name, "password": PASSWORD, "roles": ["base"]}
    )
    assert answer.status_code == 201
    number = 11
    while True:
        body = {"permissions": permissions("b", number)}
        answer = await admin.patch("/admin/roles/base", json=body)
        if answer.status_code != 200:
            break
        number += 1
    assert code(answer) == TOO_LONG
    assert 2_800 < await largest_cookie(app, name) < LARGEST_COOKIE


@pytest.mark.parametrize("audiences", [[], ["a" * 250]])
async def test_a_client_app_does_not_grow_beyond_a_token(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, audiences: list[str]
) -> None:
    """By the roles that it is allowed, 64 of them, nor by a role that it is allowed."""
    for n in range(64):
        await role(admin, f"r{n:02}-{'y' * 60}", f"area{n}:{'z' * 50}")
    every = [f"r{n:02}-{'y' * 60}" for n in range(64)]
    body = {"name": "x", "allowed_roles": every, "audiences": audiences, "grants": []}
    assert code(await admin.post(CLIENTS, json=body)) == TOO_LONG
    grants = ["client_credentials"]
    app = await registered(admin, *every[:8], audiences=audiences, grants=grants)
    path = f"{CLIENTS}/{app['client_id']}"
    assert code(await admin.patch(path, json={"allowed_roles": every})) == TOO_LONG
    answer = await admin.patch(
        f"/admin/roles/{every[0]}", json={"permissions": permissions("q", 60)}
    )
    assert code(answer) == TOO_LONG
    own = (await granted(client, app)).json()["access_token"]
    assert len(own) < LARGEST_COOKIE
    if not audiences:
        assert (await client.get("/protected", headers=bearer(own))).status_code == 200
    asked = {"token": own}
    secret = (app["client_id"], app["client_secret"])
    answer = await client.post("/oauth/introspect", data=asked, auth=secret)
    assert answer.json()["active"] is True


@ON_SQLITE
async def test_a_user_is_not_given_more_than_a_token_holds(
    app: AsyncFlask, client: httpx.AsyncClient, admin: httpx.AsyncClient
) -> None:
    """Neither when they are made nor later; what they had stays."""
    await role(admin, "one", *permissions("o", 30))
    await role(admin, "two", *permissions("t", 30))
    body = {"username": "ann", "password": PASSWORD, "roles": ["one", "two"]}
    assert code(await admin.post("/admin/users", json=body)) == TOO_LONG
    user = await made(admin, "ann", "one")
    path = f"/admin/users/{user['id']}"
    answer = await admin.put(f"{path}/roles", json={"roles": ["one", "two"]})
    assert code(answer) == TOO_LONG
    assert (await admin.get(path)).json()["roles"] == ["one"]
    assert await largest_cookie(app, "ann") < LARGEST_COOKIE
    assert (await sign_in(client, "ann", PASSWORD))["user"]["roles"] == ["one"]  # type: ignore[index]
