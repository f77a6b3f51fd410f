"""Nobody gives, or takes away, what they do not hold (49)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api.asgi import AsyncFlask
from tests.http.test_admin import ON_SQLITE, PASSWORD, code, made, role, signed_in_as
from tests.http.test_admin import admin as admin
from tests.http.test_clients import CLIENTS, registered

pytestmark = ON_SQLITE
DENIED = (403, "insufficient_permission")


@pytest.fixture
async def people(app: AsyncFlask, admin: httpx.AsyncClient) -> AsyncIterator[dict[str, Any]]:
    """``clerk`` holds what it takes for users and roles; ``auditor`` what the clerk does not."""
    await role(admin, "clerk", "users:*", "roles:*", "clients:*", "sessions:*", "docs:read")
    await role(admin, "auditor", "audit:read")
    await role(admin, "reader", "docs:read")
    # a name alone, that other services' guards ask for
    await role(admin, "manager")
    people: dict[str, Any] = {
        "clerk": await made(admin, "clerk", "user", "clerk"),
        "auditor": await made(admin, "auditor", "user", "auditor"),
        "reader": await made(admin, "reader", "user", "reader"),
        "manager": await made(admin, "manager", "user", "manager"),
        "nobody": await made(admin, "nobody", "user"),
    }
    async with await signed_in_as(app, "clerk") as clerk:
        yield people | {"as": clerk}


def path_of(user: dict[str, Any]) -> str:
    """Return the path of a user."""
    return f"/admin/users/{user['id']}"


async def test_no_takeover_in_two_steps(people: dict[str, Any], admin: httpx.AsyncClient) -> None:
    """A password is not set, and the roles that forbid it are not taken away first."""
    clerk = people["as"]
    boss = (await admin.get("/admin/users", params={"role": "admin"})).json()["items"][0]
    for user in (boss, people["auditor"]):
        path = path_of(user)
        before = (await admin.get(path)).json()
        for roles in ([], ["user"], ["clerk"], ["user", "auditor", "clerk"]):
            if roles == ["user", "auditor", "clerk"] and user is people["auditor"]:
                continue
            assert code(await clerk.put(f"{path}/roles", json={"roles": roles})) == DENIED, roles
        for body in ({"password": PASSWORD}, {"is_active": False}, {"email": "x@example.org"}):
            assert code(await clerk.patch(path, json=body)) == DENIED
        assert code(await clerk.delete(path)) == DENIED
        assert (await admin.get(path)).json() == before


async def test_no_role_is_emptied_by_who_does_not_hold_it(
    people: dict[str, Any], admin: httpx.AsyncClient
) -> None:
    """Nor changed in any way, included no more, or deleted."""
    clerk = people["as"]
    path = "/admin/roles/auditor"
    for body in (
        {"permissions": []}, {"permissions": ["docs:read"]}, {"includes": ["reader"]},
        {"description": "x"}, {"permissions": ["audit:read"], "includes": ["reader"]},
    ):  # fmt: skip
        assert code(await clerk.patch(path, json=body)) == DENIED, body
    assert code(await clerk.delete(path)) == DENIED
    assert code(await clerk.delete(path, params={"reassign_to": "reader"})) == DENIED
    assert code(await clerk.delete("/admin/roles/reader")) == DENIED  # not its name
    await role(admin, "outer", "docs:read", includes=["manager"])
    assert code(await clerk.patch("/admin/roles/outer", json={"includes": []})) == DENIED
    roles = {r["name"]: r for r in (await admin.get("/admin/roles")).json()["items"]}
    assert (roles["auditor"]["permissions"], roles["outer"]["includes"]) == (
        ["audit:read"], ["manager"],
    )  # fmt: skip


async def test_a_name_is_not_given_by_way_of_a_role(
    people: dict[str, Any], admin: httpx.AsyncClient
) -> None:
    """A role without permissions is a name that guards ask for: it is given by who holds it."""
    clerk, me = people["as"], path_of(people["clerk"])
    assert code(await clerk.put(f"{me}/roles", json={"roles": ["clerk", "manager"]})) == DENIED
    for body in ({"includes": ["manager"]}, {"includes": ["auditor"]}, {"permissions": ["*"]}):
        assert code(await clerk.patch("/admin/roles/clerk", json=body)) == DENIED
        assert code(await clerk.post("/admin/roles", json={"name": "new", **body})) == DENIED
    app = {"name": "x", "allowed_roles": ["manager"], "audiences": [], "grants": []}
    assert code(await clerk.post(CLIENTS, json=app)) == DENIED
    answer = await clerk.delete("/admin/roles/clerk", params={"reassign_to": "manager"})
    assert code(answer) == DENIED
    assert (await clerk.get("/me")).json()["roles"] == ["clerk", "user"]


async def test_what_one_holds_may_be_given_and_taken(
    people: dict[str, Any], admin: httpx.AsyncClient
) -> None:
    """By name and permissions; ``user`` by anybody who may assign roles."""
    clerk = people["as"]
    nobody = path_of(people["nobody"])
    for roles in (["clerk"], ["clerk", "user"], ["user"], []):
        answer = await clerk.put(f"{nobody}/roles", json={"roles": roles})
        assert (answer.status_code, answer.json()["roles"]) == (200, roles)
    for user in ("reader", "manager", "nobody"):
        # all permissions that they hold, the clerk holds too
        for body in ({"is_active": False}, {"is_active": True}, {"email": "x@example.org"}):
            answer = await clerk.patch(path_of(people[user]), json=body)
            assert answer.status_code == 200, (user, body)
    body = {"permissions": ["docs:read", "users:read"], "description": "x"}
    assert (await clerk.patch("/admin/roles/reader", json=body)).status_code == 200
    answer = await clerk.post("/admin/roles", json={"name": "new", "permissions": ["docs:read"]})
    assert answer.status_code == 201
    assert (await clerk.delete(path_of(people["nobody"]))).status_code == 204


async def test_a_client_app_that_acts_is_bound_alike(
    app: AsyncFlask, people: dict[str, Any], admin: httpx.AsyncClient
) -> None:
    """By what it is allowed, and it is nobody once it is disabled."""
    limited = await registered(admin, "clerk", grants=["client_credentials"])
    form = {"grant_type": "client_credentials"}
    secret = (limited["client_id"], limited["client_secret"])
    token = (await admin.post("/oauth/token", data=form, auth=secret)).json()["access_token"]
    clerk: httpx.AsyncClient = people["as"]
    headers = {"Authorization": f"Bearer {token}"}
    auditor = f"{path_of(people['auditor'])}/roles"
    answer = await clerk.put(auditor, json={"roles": []}, headers=headers)
    assert code(answer) == DENIED
    nobody = f"{path_of(people['nobody'])}/roles"
    answer = await clerk.put(nobody, json={"roles": ["clerk"]}, headers=headers)
    assert answer.status_code == 200
    path = f"{CLIENTS}/{limited['client_id']}"
    assert (await admin.patch(path, json={"is_active": False})).status_code == 200
    answer = await clerk.put(nobody, json={"roles": []}, headers=headers)
    assert code(answer) == (401, "token_revoked")


async def test_rights_are_asked_of_the_database_and_not_of_the_token(
    app: AsyncFlask, people: dict[str, Any], admin: httpx.AsyncClient
) -> None:
    """A token that was taken back by itself acts no more, though its session lives."""
    clerk = people["as"]
    token = clerk.headers["Authorization"].removeprefix("Bearer ")
    answer = await admin.post("/admin/tokens/revoke", json={"token": token})
    assert answer.status_code == 200
    answer = await clerk.patch(path_of(people["nobody"]), json={"is_active": False})
    assert code(answer) == (401, "token_revoked")
