"""The list of users: each as it is shown alone, in every order, whatever was searched for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.http.test_admin import PASSWORD, code, made, role
from tests.http.test_admin import admin as admin

USERNAMES = ["Anna", "bob", "Cara", "d-Ave", "eve", "Zoë"]


async def listed(admin: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    """Return all of a list, page by page."""
    seen: list[dict[str, Any]] = []
    while True:
        answer = await admin.get("/admin/users", params=query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert page.keys() == {"items", "next_cursor"}
        assert len(page["items"]) <= query.get("limit", 50)
        seen += page["items"]
        if page["next_cursor"] is None:
            return seen
        query["cursor"] = page["next_cursor"]


def names(users: list[dict[str, Any]]) -> list[str]:
    """Return their names, in the order of the list."""
    return [user["username"] for user in users]


async def test_a_list_shows_each_as_it_is_shown_alone(admin: httpx.AsyncClient) -> None:
    """With no role, one, many, and roles through roles: the same members, nobody else's.

    And whoever is shown with a role is found by it.
    """
    await role(admin, "reader", "docs:read", "a:read")
    await role(admin, "writer", "docs:write", includes=["reader"])
    await role(admin, "editor", includes=["writer"])
    await role(admin, "nothing")
    roles = [[], ["reader"], ["writer", "user"], ["editor", "reader"], ["nothing"], ["editor"]]
    for name, given in zip(USERNAMES, roles, strict=True):
        await made(admin, name, *given)
    users = await listed(admin, limit=3)
    assert sorted(names(users)) == sorted(["admin", "testuser", *USERNAMES])
    for user in users:
        alone = await admin.get(f"/admin/users/{user['id']}")
        assert alone.json() == user
        assert "password" not in alone.text
    held = {user["username"]: (user["roles"], user["permissions"]) for user in users}
    docs = ["a:read", "docs:read", "docs:write"]
    assert held["Anna"] == ([], [])
    assert held["bob"] == (["reader"], ["a:read", "docs:read"])
    assert held["Cara"] == (["reader", "user", "writer"], docs)
    assert held["d-Ave"] == held["Zoë"] == (["editor", "reader", "writer"], docs)
    assert held["eve"] == (["nothing"], [])
    for name in ("admin", "user", "reader", "writer", "editor", "nothing"):
        those = [user for user in users if name in user["roles"]]
        assert await listed(admin, role=name, limit=2) == those
        assert those


@pytest.mark.parametrize("sort", ["created_at", "-created_at", "username", "-username"])
async def test_pages_show_each_once_and_in_order(admin: httpx.AsyncClient, sort: str) -> None:
    """In every order, whatever the pages' size, page by page as in one piece."""
    for name in USERNAMES:
        await made(admin, name)
    whole = await listed(admin, sort=sort)
    keys = [
        (user["username"].casefold() if "username" in sort else user["created_at"])
        for user in whole
    ]
    assert len({user["id"] for user in whole}) == len(whole) == 8
    for one, next_one in pairwise(reversed(keys) if sort.startswith("-") else keys):
        assert one <= next_one
    for limit in (1, 3, 7, 8):
        assert await listed(admin, sort=sort, limit=limit) == whole, limit
    cursor = (await admin.get("/admin/users", params={"limit": 2, "sort": sort})).json()
    other = "username" if sort != "username" else "-username"
    params = {"sort": other, "cursor": cursor["next_cursor"]}
    assert code(await admin.get("/admin/users", params=params)) == (422, "validation_failed")


async def test_a_search_takes_its_text_by_the_letter(admin: httpx.AsyncClient) -> None:
    """Neither ``%`` nor ``_`` nor the escape itself stands for anything else."""
    emails = {"a_b": "one%two@example.org", "acb": None, "a-b": "x/y_z@example.org"}
    for name, email in emails.items():
        body = {"username": name, "password": PASSWORD} | ({"email": email} if email else {})
        assert (await admin.post("/admin/users", json=body)).status_code == 201
    found = {
        "a_b": ["a_b"], "A_B": ["a_b"], "%": ["a_b"], "E%T": ["a_b"], "/": ["a-b"], "/y_": ["a-b"],
        "_": ["a-b", "a_b"], "acb": ["acb"], "//": [], "/_": [], "/%": [], "a%b": [], "\\": [],
        "'": [],
    }  # fmt: skip
    for text, expected in found.items():
        users = await listed(admin, q=text, sort="username", limit=1)
        assert names(users) == expected, text


async def test_filters_add_up(admin: httpx.AsyncClient) -> None:
    """By role, by whether active and by text: all of them hold, on every page."""
    await role(admin, "reader", "docs:read")
    users = [await made(admin, name, *(["reader"] * (name < "e"))) for name in USERNAMES]
    off = {"is_active": False}
    for user in users[:2]:
        assert (await admin.patch(f"/admin/users/{user['id']}", json=off)).status_code == 200
    for query, expected in (
        ({"role": "reader"}, [*USERNAMES[:4], "Zoë"]),
        ({"role": "reader", "active": "false"}, ["Anna", "bob"]),
        ({"role": "reader", "active": "true"}, ["Cara", "d-Ave", "Zoë"]),
        ({"role": "reader", "active": "true", "q": "a"}, ["Cara", "d-Ave"]),
        ({"active": "false", "q": "zo"}, []),
        ({"role": "nobody"}, []),
    ):
        for limit in (1, 50):
            got = await listed(admin, sort="username", limit=limit, **query)
            assert names(got) == expected, (query, limit)
