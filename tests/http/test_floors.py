"""One change of a role, a client app or a user refuses the tokens that it concerns, no others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import func, select

from api.asgi import AsyncFlask
from api.db.models import CleanupTask, Revocation, Role, Session, UserRole
from api.parts import Parts
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_admin import ON_SQLITE, PASSWORD, code, made, role
from tests.http.test_admin import admin as admin
from tests.http.test_clients import CLIENTS, granted, refreshed, registered, said, through

STALE, REVOKED = (401, "token_stale"), (401, "token_revoked")


@dataclass
class Holders:
    """Access tokens, by how their holder came to hold the role."""

    app: dict[str, Any]
    tokens: dict[str, str] = field(default_factory=dict)
    refresh: dict[str, str] = field(default_factory=dict)

    async def statuses(self, client: httpx.AsyncClient) -> dict[str, tuple[int, str]]:
        """Return what a protected route answers to each."""
        found = {}
        for how, token in self.tokens.items():
            answer = await client.get("/protected", headers=bearer(token))
            found[how] = (answer.status_code, answer.json().get("code", ""))
        return found


@pytest.fixture
async def holders(app: AsyncFlask, admin: httpx.AsyncClient) -> Holders:
    """Holders of ``inner``: direct, through ``outer``, through a client app, narrowed; and others.

    ``outer`` includes ``inner``; the client app is allowed ``inner`` and not ``outer``.
    """
    await role(admin, "inner", "stats:read", "docs:read")
    await role(admin, "outer", "users:read", includes=["inner"])
    await role(admin, "beside", "docs:write")
    grants = ["client_credentials", "refresh_token"]
    limited = await registered(admin, "inner", "beside", grants=grants)
    found = Holders(limited)
    for how, roles in (
        ("direct", ["inner"]), ("through outer", ["outer"]), ("beside", ["beside"]),
    ):  # fmt: skip
        await made(admin, how.replace(" ", "-"), *roles)
    async with client_of(app) as visitor:
        for how, name, more in (
            ("direct", "direct", {}),
            ("through outer", "through-outer", {}),
            ("through a client app", "through-outer", through(limited)),
            ("beside", "beside", {}),
            ("beside, through the client app", "beside", through(limited)),
        ):
            tokens = await sign_in(visitor, name, PASSWORD, transport="json", **more)
            found.tokens[how] = str(tokens["access_token"])
            found.refresh[how] = str(tokens["refresh_token"])
        tokens = await sign_in(
            visitor, "through-outer", PASSWORD, transport="json", **through(limited)
        )
        form = {"grant_type": "refresh_token", "scope": "stats:read"}
        form["refresh_token"] = str(tokens["refresh_token"])
        auth = (limited["client_id"], limited["client_secret"])
        narrowed = (await visitor.post("/oauth/token", data=form, auth=auth)).json()
        found.tokens["narrowed by a scope"] = narrowed["access_token"]
        found.refresh["narrowed by a scope"] = narrowed["refresh_token"]
        own = (await granted(visitor, limited)).json()
        found.tokens["the client app's own"] = own["access_token"]
        own = (await granted(visitor, limited, scope="stats:read")).json()
        found.tokens["the client app's own, narrowed"] = own["access_token"]
    return found


HOLDING = {
    "direct", "through outer", "through a client app", "narrowed by a scope",
    "the client app's own", "the client app's own, narrowed",
}  # fmt: skip
BESIDE = {"beside", "beside, through the client app"}


async def test_a_role_that_loses_a_permission(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, holders: Holders, parts: Parts
) -> None:
    """Every token with a permission of the role is stale from the answer on; others are not (80).

    In one transaction of two rows, and a refresh shows the new rights.
    """
    assert set((await holders.statuses(client)).values()) == {(200, "")}
    answer = await admin.patch("/admin/roles/inner", json={"permissions": ["docs:read"]})
    assert answer.status_code == 200
    statuses = await holders.statuses(client)
    assert {how for how, status in statuses.items() if status == STALE} == HOLDING
    assert {how for how, status in statuses.items() if status == (200, "")} == BESIDE
    async with parts.database.read() as session:
        rows = await session.execute(select(Revocation.kind, Revocation.subject))
        assert {tuple(row) for row in rows} == {("role", "inner"), ("scope", "narrowed")}
    for how in ("direct", "through outer"):
        answer = await client.post("/refresh", headers=bearer(holders.refresh[how]))
        assert "stats:read" not in said(answer.json()["access_token"])["permissions"]
        token = bearer(answer.json()["access_token"])
        assert (await client.get("/protected", headers=token)).status_code == 200
    answer = await refreshed(client, holders.app, holders.refresh["through a client app"])
    assert said(answer.json()["access_token"])["permissions"] == ["docs:read"]


async def test_a_role_that_includes_another_no_more(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, holders: Holders
) -> None:
    """A token that came through a client app names what was included, and not the role (80)."""
    claims = said(holders.tokens["through a client app"])
    assert claims["roles"] == ["inner"]
    assert (await admin.patch("/admin/roles/outer", json={"includes": []})).status_code == 200
    statuses = await holders.statuses(client)
    for how in ("through outer", "through a client app", "narrowed by a scope"):
        assert statuses[how] == STALE, how
    for how in BESIDE:
        assert statuses[how] == (200, ""), how
    answer = await refreshed(client, holders.app, holders.refresh["through a client app"])
    assert said(answer.json()["access_token"])["roles"] == []


async def test_a_role_that_is_deleted(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, holders: Holders, parts: Parts
) -> None:
    """Its holders hold the other role from the answer on; their rows follow in batches.

    Another role of the same name gives nothing to who held the first.
    """
    answer = await admin.delete("/admin/roles/inner", params={"reassign_to": "beside"})
    assert answer.status_code == 204
    statuses = await holders.statuses(client)
    assert {how for how, status in statuses.items() if status == STALE} >= HOLDING
    await role(admin, "inner", "secrets:read")

    async def told() -> dict[str, Any]:
        answer = await admin.get("/admin/users", params={"q": "direct"})
        (user,) = answer.json()["items"]
        return {name: user[name] for name in ("roles", "permissions")}

    async def rights() -> list[Any]:
        answer = await client.post("/refresh", headers=bearer(holders.refresh["direct"]))
        claims = said(answer.json()["access_token"])
        holders.refresh["direct"] = answer.json()["refresh_token"]
        return [claims["roles"], claims["permissions"], await told()]

    expected = [["beside"], ["docs:write"], {"roles": ["beside"], "permissions": ["docs:write"]}]
    assert await rights() == expected
    assert {r["name"] for r in (await admin.get("/admin/roles")).json()["items"]} == {
        "admin", "beside", "inner", "outer", "user",
    }  # fmt: skip
    assert code(await admin.get("/admin/roles/-deleted:x")) == (404, "not_found")
    held = (await admin.get("/admin/users", params={"role": "beside"})).json()["items"]
    assert {user["username"] for user in held} == {"direct", "beside"}
    while await parts.cleanup.batch(1):
        pass
    assert await rights() == expected
    async with parts.database.read() as session:
        gone = select(func.count()).select_from(Role).where(Role.deleted_at.is_not(None))
        assert await session.scalar(gone) == 0
        assert await session.scalar(select(func.count()).select_from(CleanupTask)) == 0


async def test_what_a_deleted_role_included_is_lost_by_those_who_held_it_through_another(
    client: httpx.AsyncClient, admin: httpx.AsyncClient
) -> None:
    """A role or a client app that held the deleted one does not hold what replaces it."""
    await role(admin, "x", "users:read")
    await role(admin, "r", includes=["x"])
    await role(admin, "a", includes=["r"])
    await made(admin, "one", "a")
    await made(admin, "two", "x")
    tokens = []
    for name, allowed in (("one", "x"), ("two", "r"), ("two", "a")):
        app = await registered(admin, allowed)
        tokens.append(await sign_in(client, name, PASSWORD, transport="json", **through(app)))
    for one in tokens:
        assert said(str(one["access_token"]))["permissions"] == ["users:read"]
    answer = await admin.delete("/admin/roles/r", params={"reassign_to": "x"})
    assert answer.status_code == 204
    for one in tokens:
        headers = bearer(one["access_token"])
        assert code(await client.get("/admin/users", headers=headers)) == STALE


@ON_SQLITE
async def test_roles_that_are_deleted_one_after_the_other(
    admin: httpx.AsyncClient, holders: Holders, parts: Parts
) -> None:
    """Before the first is tidied up: its holders hold the last, and are counted as holders."""
    await role(admin, "third", "docs:third")
    delete = admin.delete
    assert (await delete("/admin/roles/inner", params={"reassign_to": "beside"})).is_success
    assert code(await delete("/admin/roles/beside")) == (409, "conflict")
    assert (await delete("/admin/roles/beside", params={"reassign_to": "third"})).is_success
    assert code(await delete("/admin/roles/third")) == (409, "conflict")
    for _ in range(2):
        (user,) = (await admin.get("/admin/users", params={"q": "direct"})).json()["items"]
        assert (user["roles"], user["permissions"]) == (["third"], ["docs:third"])
        answer = await admin.get(
            f"/admin/users/{user['id']}/access", params={"permission": "docs:third"}
        )
        assert "-deleted" not in answer.text
        assert answer.json()["granted"] is True
        while await parts.cleanup.batch(100):
            pass
    path = f"/admin/users/{user['id']}/roles"
    assert (await admin.put(path, json={"roles": ["outer"]})).json()["roles"] == ["outer"]


async def test_a_role_that_is_taken_while_the_deletion_is_tidied_up(
    admin: httpx.AsyncClient, holders: Holders, parts: Parts
) -> None:
    """What was given in place of a deleted role can be taken away before its rows have gone."""
    await admin.delete("/admin/roles/inner", params={"reassign_to": "beside"})
    (user,) = (await admin.get("/admin/users", params={"q": "direct"})).json()["items"]
    path = f"/admin/users/{user['id']}/roles"
    assert (await admin.put(path, json={"roles": []})).json()["roles"] == []
    while await parts.cleanup.batch(100):
        pass
    async with parts.database.read() as session:
        query = select(func.count()).select_from(UserRole)
        assert await session.scalar(query.where(UserRole.user_id == UUID(user["id"]))) == 0


@pytest.mark.parametrize("how", ["disabled", "deleted"])
async def test_a_client_app_that_is_no_more(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, holders: Holders, parts: Parts, how: str
) -> None:
    """Every token through it is revoked by one row, for good; its users' other sessions live."""
    path = f"{CLIENTS}/{holders.app['client_id']}"
    if how == "disabled":
        assert (await admin.patch(path, json={"is_active": False})).status_code == 200
    else:
        assert (await admin.delete(path)).status_code == 204
    for _ in range(2):
        statuses = await holders.statuses(client)
        expected = {
            how: (200, "") if how in {"direct", "through outer", "beside"} else REVOKED
            for how in statuses
        }
        assert statuses == expected
        answer = await refreshed(client, holders.app, holders.refresh["through a client app"])
        assert answer.status_code in {400, 401}
        while await parts.cleanup.batch(2):
            pass
    async with parts.database.read() as session:
        rows = await session.execute(select(Revocation.kind, Revocation.subject))
        assert [tuple(row) for row in rows] == [("client_ended", holders.app["client_id"])]
        theirs = select(func.count()).select_from(Session).where(Session.client_id.is_not(None))
        left = await session.scalar(theirs.where(Session.revoked_at.is_(None)))
        assert left == 0
    if how == "disabled":
        assert (await admin.patch(path, json={"is_active": True})).status_code == 200
        assert await holders.statuses(client) == expected
        answer = await refreshed(client, holders.app, holders.refresh["through a client app"])
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
        again = await sign_in(client, "direct", PASSWORD, **through(holders.app))
        token = bearer(again["access_token"])
        assert (await client.get("/protected", headers=token)).status_code == 200


async def test_a_client_app_that_is_allowed_less(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, holders: Holders, parts: Parts
) -> None:
    """Tokens through it are stale by one row, and no others."""
    path = f"{CLIENTS}/{holders.app['client_id']}"
    assert (await admin.patch(path, json={"allowed_roles": ["beside"]})).status_code == 200
    statuses = await holders.statuses(client)
    for how, status in statuses.items():
        direct = how in {"direct", "through outer", "beside"}
        assert status == ((200, "") if direct else STALE), how
    async with parts.database.read() as session:
        rows = await session.execute(select(Revocation.kind, Revocation.subject))
        assert [tuple(row) for row in rows] == [("client", holders.app["client_id"])]
    answer = await refreshed(client, holders.app, holders.refresh["through a client app"])
    assert said(answer.json()["access_token"])["roles"] == []


async def test_the_session_that_changes_the_password_goes_on(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Both its tokens work, old and new; every other session ended by one row, for good."""
    sessions = [await sign_in(client, transport="json") for _ in range(4)]
    client.cookies.clear()
    mine, *others = sessions
    body = {"current_password": "testpass", "new_password": "harbour-Lantern-47"}
    answer = await client.post("/me/password", json=body, headers=bearer(mine["access_token"]))
    assert answer.status_code == 204
    listed = await client.get("/me/sessions", headers=bearer(mine["access_token"]))
    assert [one["current"] for one in listed.json()["items"]] == [True]
    for other in others:
        for method, path, name in (
            ("GET", "/protected", "access"),
            ("POST", "/refresh", "refresh"),
        ):
            headers = bearer(other[f"{name}_token"])
            assert code(await client.request(method, path, headers=headers)) == REVOKED
    async with parts.database.read() as session:
        kinds = list(await session.scalars(select(Revocation.kind)))
        assert kinds == ["user_ended"]
    while await parts.cleanup.batch(1):
        pass
    for _ in range(2):
        assert (await client.get("/protected", headers=bearer(mine["access_token"]))).is_success
        answer = await client.post("/refresh", headers=bearer(mine["refresh_token"]))
        assert answer.status_code == 200
        mine = answer.json()
    # from another session again: the first is not spared twice
    body = {"username": "testuser", "password": "harbour-Lantern-47", "transport": "json"}
    second = (await client.post("/login", json=body)).json()
    answer = await client.post("/logout/all", headers=bearer(second["access_token"]))
    assert answer.json() == {"logout": True, "sessions": 2}
    for tokens in (mine, second):
        assert (
            code(await client.get("/protected", headers=bearer(tokens["access_token"]))) == REVOKED
        )


async def test_a_user_who_is_deleted(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, parts: Parts
) -> None:
    """Their tokens are revoked, their name is free at once, and their sessions follow."""
    user = await made(admin, "gone", "user")
    tokens = await sign_in(client, "gone", PASSWORD, transport="json")
    assert (await admin.delete(f"/admin/users/{user['id']}")).status_code == 204
    again = await made(admin, "gone", "user")
    assert again["id"] != user["id"]
    for _ in range(2):
        headers = bearer(tokens["access_token"])
        assert code(await client.get("/protected", headers=headers)) == REVOKED
        headers = bearer(tokens["refresh_token"])
        assert code(await client.post("/refresh", headers=headers)) == REVOKED
        while await parts.cleanup.batch(10):
            pass
    async with parts.database.read() as session:
        theirs = Session.user_id == UUID(user["id"])
        assert await session.scalar(select(func.count()).select_from(Session).where(theirs)) == 0


@ON_SQLITE
async def test_the_same_again_changes_nothing(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, holders: Holders, parts: Parts
) -> None:
    """The same roles, permissions, includes and client app: no token becomes stale."""
    (user,) = (await admin.get("/admin/users", params={"q": "direct"})).json()["items"]
    app = holders.app["client_id"]
    for path, body in (
        ("/admin/roles/inner", {"permissions": ["docs:read", "stats:read", "docs:read"]}),
        ("/admin/roles/outer", {"includes": ["inner"], "permissions": ["users:read"]}),
        (f"{CLIENTS}/{app}", {"allowed_roles": ["beside", "inner"]}),
    ):
        assert (await admin.patch(path, json=body)).status_code == 200
    path = f"/admin/users/{user['id']}/roles"
    answer = await admin.put(path, json={"roles": ["inner", "inner"]})
    assert answer.status_code == 200
    assert answer.headers["ETag"] == (await admin.get(f"/admin/users/{user['id']}")).headers["ETag"]
    assert set((await holders.statuses(client)).values()) == {(200, "")}
    async with parts.database.read() as session:
        assert await session.scalar(select(func.count()).select_from(Revocation)) == 0
