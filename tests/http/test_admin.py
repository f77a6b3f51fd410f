"""The admin API: who may do what, what bites on the next request, and what is refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from api.asgi import AsyncFlask
from api.db.models import AuditEvent, Role, RoleInclude, RolePermission, UserRole
from api.parts import Parts
from api.services.audit import SYSTEM
from api.services.audit_log import earliest_id
from tests.conftest import bearer, client_of, sign_in

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
PASSWORD = "correct-Harbour-93"


def code(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the problem's code."""
    return answer.status_code, answer.json()["code"]


@pytest.fixture
async def admin(app: AsyncFlask) -> Any:
    """A client that is signed in as admin, by header."""
    async with client_of(app) as client:
        tokens = await sign_in(client, "admin", "adminpass", transport="json")
        client.headers.update(bearer(tokens["access_token"]))
        yield client


async def made(admin: httpx.AsyncClient, name: str, *roles: str) -> dict[str, Any]:
    """Make a user with roles."""
    body = {"username": name, "password": PASSWORD, "roles": list(roles)}
    answer = await admin.post("/admin/users", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def signed_in_as(app: AsyncFlask, name: str) -> httpx.AsyncClient:
    """Return a client that is signed in as a user made here."""
    async with client_of(app) as visitor:
        tokens = await sign_in(visitor, name, PASSWORD, transport="json")
    client = client_of(app)
    client.headers.update(bearer(tokens["access_token"]))
    client.refresh = tokens["refresh_token"]  # type: ignore[attr-defined]
    return client


async def role(admin: httpx.AsyncClient, name: str, *permissions: str, **more: Any) -> None:
    """Make a role."""
    body = {"name": name, "permissions": list(permissions), **more}
    answer = await admin.post("/admin/roles", json=body)
    assert answer.status_code == 201, answer.text


async def test_a_users_life(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Made, found, changed, given roles, disabled, enabled, deleted: each bites at once."""
    answer = await admin.post(
        "/admin/users", json={"username": "Zoë", "password": PASSWORD, "email": "z@example.org"}
    )
    user = answer.json()
    path = f"/admin/users/{user['id']}"
    assert (answer.status_code, answer.headers["Location"]) == (201, path)
    assert (user["username"], user["roles"], user["is_active"]) == ("Zoë", ["user"], True)
    assert "password" not in answer.text
    found = (await admin.get("/admin/users", params={"q": "zo"})).json()
    assert [item["id"] for item in found["items"]] == [user["id"]]
    async with await signed_in_as(app, "zoë") as zoe:
        assert (await zoe.get("/protected")).status_code == 200
        answer = await admin.put(f"{path}/roles", json={"roles": ["user", "admin"]})
        assert answer.json()["roles"] == ["admin", "user"]
        assert code(await zoe.get("/protected")) == (401, "token_stale")
        fresh = (await zoe.post("/refresh", headers=bearer(zoe.refresh))).json()
        zoe.headers.update(bearer(fresh["access_token"]))
        assert (await zoe.get("/admin/users")).status_code == 200
        answer = await admin.patch(path, json={"email": None, "is_active": False})
        assert (answer.json()["email"], answer.json()["is_active"]) == (None, False)
        assert code(await zoe.get("/protected")) == (401, "token_revoked")
    login = {"username": "zoë", "password": PASSWORD}
    assert code(await admin.post("/login", json=login)) == (401, "bad_credentials")
    assert (await admin.patch(path, json={"is_active": True})).status_code == 200
    async with await signed_in_as(app, "zoë") as zoe:
        other = "another-Lantern-47"
        assert (await admin.patch(path, json={"password": other})).status_code == 200
        assert code(await zoe.get("/protected")) == (401, "token_revoked")
        assert code(await admin.post("/login", json=login)) == (401, "bad_credentials")
        tokens = await sign_in(zoe, "zoë", other, transport="json")
        answer = await admin.delete(path)
        assert (answer.status_code, answer.content) == (204, b"")
        answer = await zoe.get("/protected", headers=bearer(tokens["access_token"]))
        assert code(answer) == (401, "token_revoked")
        answer = await zoe.post("/refresh", headers=bearer(tokens["refresh_token"]))
        assert code(answer) == (401, "token_revoked")
    assert code(await admin.get(path)) == (404, "not_found")
    assert code(await admin.delete(path)) == (404, "not_found")


@ON_SQLITE
async def test_a_lost_update_is_412(admin: httpx.AsyncClient) -> None:
    """If-Match of what was read before another's change is refused; none, or *, is allowed."""
    user = await made(admin, "ann", "user")
    path = f"/admin/users/{user['id']}"
    etag = (await admin.get(path)).headers["ETag"]
    one = await admin.patch(path, json={"email": "a@example.org"}, headers={"If-Match": etag})
    assert one.status_code == 200
    assert one.headers["ETag"] != etag
    for method, where, body in (
        ("PATCH", path, {"email": "b@example.org"}),
        ("PUT", f"{path}/roles", {"roles": []}),
    ):
        lost = await admin.request(method, where, json=body, headers={"If-Match": etag})
        assert code(lost) == (412, "precondition_failed")
    assert code(await admin.delete(path, headers={"If-Match": etag})) == (
        412, "precondition_failed",
    )  # fmt: skip
    assert (await admin.get(path)).json()["email"] == "a@example.org"
    assert (await admin.get(path)).headers["ETag"] == one.headers["ETag"]
    for how in (None, "*", "{}", '"x", {}'):
        current = (await admin.get(path)).headers["ETag"]
        headers = {"If-Match": how.format(current)} if how else {}
        answer = await admin.patch(path, json={"password": PASSWORD + "x"}, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["ETag"] != current
        weak = {"If-Match": f"W/{answer.headers['ETag']}"}
        assert code(await admin.patch(path, json={"email": None}, headers=weak))[0] == 412


async def test_an_etag_is_of_what_an_admin_may_change(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """A sign-in leaves it as it is; what a role gives, and which roles, do not."""
    await role(admin, "reader", "docs:read")
    path = f"/admin/users/{(await made(admin, 'ann', 'reader'))['id']}"
    before = await admin.get(path)
    async with client_of(app) as client:
        await sign_in(client, "ann", PASSWORD)
    signed_in = await admin.get(path)
    assert signed_in.json()["last_login_at"] != before.json()["last_login_at"]
    assert signed_in.headers["ETag"] == before.headers["ETag"]
    seen = {before.headers["ETag"]}
    for change in (
        admin.patch("/admin/roles/reader", json={"permissions": ["docs:write"]}),
        admin.put(f"{path}/roles", json={"roles": []}),
        admin.patch(path, json={"email": "ann@example.org"}),
    ):
        assert (await change).status_code == 200
        seen.add((await admin.get(path)).headers["ETag"])
    assert len(seen) == 4


async def test_of_two_changes_with_one_etag_one_is_made(admin: httpx.AsyncClient) -> None:
    """At once, with the same If-Match: one 200, the others 412."""
    user = await made(admin, "ann", "user")
    path = f"/admin/users/{user['id']}"
    match = {"If-Match": (await admin.get(path)).headers["ETag"]}
    answers = await asyncio.gather(
        *(admin.patch(path, json={"email": f"{n}@example.org"}, headers=match) for n in range(5))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 412, 412, 412, 412]


async def test_nobody_gives_what_they_do_not_hold(
    app: AsyncFlask, admin: httpx.AsyncClient
) -> None:
    """Not to others, not to themselves, not by way of a role, a password or a new user (49)."""
    await role(admin, "clerk", "users:read", "users:write", "roles:*")
    await role(admin, "auditor", "audit:read")
    await role(admin, "helper", "users:read")
    boss = (await admin.get("/admin/users", params={"q": "admin"})).json()["items"][0]
    victim = await made(admin, "victim", "user", "auditor")
    me = await made(admin, "clara", "user", "clerk")
    async with await signed_in_as(app, "clara") as clerk:
        denied = (403, "insufficient_permission")
        for user in (me, victim):
            path = f"/admin/users/{user['id']}/roles"
            for roles in (["admin"], ["auditor", "clerk"], ["user", "clerk", "helper"]):
                if user is victim and "auditor" in roles:
                    continue
                assert code(await clerk.put(path, json={"roles": roles})) == denied, roles
        for body in (
            {"permissions": ["audit:read"]},
            {"permissions": ["*"]},
            {"includes": ["auditor"]},
        ):
            assert code(await clerk.patch("/admin/roles/clerk", json=body)) == denied
            answer = await clerk.post("/admin/roles", json={"name": "new", **body})
            assert code(answer) == denied
        answer = await clerk.delete("/admin/roles/clerk", params={"reassign_to": "auditor"})
        assert code(answer) == denied
        for user in (boss, victim):
            path = f"/admin/users/{user['id']}"
            assert code(await clerk.patch(path, json={"password": PASSWORD})) == denied
            assert code(await clerk.patch(path, json={"is_active": False})) == denied
            assert code(await clerk.patch(path, json={"email": "evil@example.org"})) == denied
            assert code(await clerk.delete(path)) == denied
        own = await clerk.patch(f"/admin/users/{me['id']}", json={"password": "another-Lantern-47"})
        assert code(own) == denied
        body = {"username": "puppet", "password": PASSWORD, "roles": ["admin"]}
        assert code(await clerk.post("/admin/users", json=body)) == denied
        assert code(await clerk.get("/admin/audit")) == denied
        assert (await clerk.get("/me")).json()["roles"] == ["clerk", "user"]
        answer = await clerk.post(
            "/admin/roles", json={"name": "new", "permissions": ["users:read"]}
        )
        assert answer.status_code == 201
        # nor take it away
        path = f"/admin/users/{victim['id']}/roles"
        assert code(await clerk.put(path, json={"roles": ["user"]})) == denied
        assert code(await clerk.patch("/admin/roles/auditor", json={"permissions": []})) == denied
        assert code(await clerk.delete("/admin/roles/helper")) == denied
    refusals = (await admin.get("/admin/audit", params={"action": "admin.refused"})).json()
    assert {item["actor"] for item in refusals["items"]} == {me["id"]}
    assert {"method": "GET", "route": "/admin/audit"} in [i["detail"] for i in refusals["items"]]


async def test_the_last_admin_stays(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Not demoted, disabled or deleted; not by two at once, nor by way of a role (49)."""
    boss = (await admin.get("/admin/users", params={"role": "admin"})).json()["items"][0]
    path = f"/admin/users/{boss['id']}"
    last = (409, "last_admin")
    assert code(await admin.put(f"{path}/roles", json={"roles": ["user"]})) == last
    assert code(await admin.patch(path, json={"is_active": False})) == last
    assert code(await admin.delete(path)) == last
    assert code(await admin.patch("/admin/roles/admin", json={"permissions": []})) == (
        409, "conflict",
    )  # fmt: skip
    assert code(await admin.delete("/admin/roles/admin")) == (409, "conflict")
    second = await made(admin, "second", "user", "admin")
    async with await signed_in_as(app, "second") as other:
        answers = await asyncio.gather(
            admin.put(f"/admin/users/{second['id']}/roles", json={"roles": ["user"]}),
            other.put(f"{path}/roles", json={"roles": ["user"]}),
        )
    assert sorted(answer.status_code for answer in answers) in ([200, 401], [200, 403], [200, 409])


@ON_SQLITE
async def test_an_admin_by_way_of_a_role_counts(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """A role that includes admin makes admins; taking that away from the last is refused."""
    await role(admin, "owner", includes=["admin"])
    boss = (await admin.get("/admin/users", params={"q": "admin"})).json()["items"][0]
    path = f"/admin/users/{boss['id']}/roles"
    answer = await admin.put(path, json={"roles": ["owner"]})
    assert answer.json()["roles"] == ["admin", "owner"]
    tokens = await sign_in(admin, "admin", "adminpass", transport="json")
    admin.headers.update(bearer(tokens["access_token"]))
    answer = await admin.patch("/admin/roles/owner", json={"includes": []})
    assert code(answer) == (409, "last_admin")
    answer = await admin.delete("/admin/roles/owner", params={"reassign_to": "user"})
    assert code(answer) == (409, "last_admin")
    assert (await admin.get("/admin/users")).status_code == 200


async def test_a_roles_life(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Made, included, changed, reassigned, deleted; it bites on its holders' next request."""
    await role(admin, "reader", "docs:read", description="Reads.")
    await role(admin, "editor", "docs:*", includes=["reader"])
    user = await made(admin, "ed", "editor")
    assert (user["roles"], user["permissions"]) == (["editor", "reader"], ["docs:*", "docs:read"])
    access = f"/admin/users/{user['id']}/access"
    answer = (await admin.get(access, params={"permission": "docs:read"})).json()
    assert answer["granted"] is True
    assert answer["ways"] == [
        {"roles": ["editor"], "permission": "docs:*"},
        {"roles": ["editor", "reader"], "permission": "docs:read"},
    ]
    answer = (await admin.get(access, params={"permission": "users:read"})).json()
    assert (answer["granted"], answer["ways"], answer["more"]) == (False, [], False)
    assert "editor, reader" in answer["reason"]
    assert code(await admin.post("/admin/roles", json={"name": "reader"})) == (409, "role_exists")
    for wrong in (["reader"], ["editor"], ["nobody"]):
        answer = await admin.patch("/admin/roles/reader", json={"includes": wrong})
        assert code(answer) == (422, "validation_failed"), wrong
    async with await signed_in_as(app, "ed") as ed:
        answer = await admin.patch("/admin/roles/reader", json={"permissions": ["docs:list"]})
        assert answer.json()["permissions"] == ["docs:list"]
        assert code(await ed.get("/protected")) == (401, "token_stale")
        assert code(await admin.delete("/admin/roles/editor")) == (409, "conflict")
        tokens = (await ed.post("/refresh", headers=bearer(ed.refresh))).json()
        ed.headers.update(bearer(tokens["access_token"]))
        assert (await ed.get("/me")).json()["permissions"] == ["docs:*", "docs:list"]
        answer = await admin.delete("/admin/roles/editor", params={"reassign_to": "reader"})
        assert answer.status_code == 204
        assert code(await ed.get("/protected")) == (401, "token_stale")
    assert (await admin.get(f"/admin/users/{user['id']}")).json()["roles"] == ["reader"]
    assert code(await admin.get("/admin/roles/editor")) == (404, "not_found")
    names = [item["name"] for item in (await admin.get("/admin/roles")).json()["items"]]
    assert names == ["admin", "reader", "user"]


async def test_an_explanation_holds_twenty_ways_and_never_the_loop(
    admin: httpx.AsyncClient, parts: Parts
) -> None:
    """Seven layers of eight roles, each of which includes all of the next: 8^6 ways to the last."""
    user = await made(admin, "ann", "user")
    layers = [[uuid4() for _ in range(8)] for _ in range(7)]
    async with parts.database.write() as session:
        for depth, layer in enumerate(layers):
            session.add_all(Role(id=one, name=f"r{depth}-{n}") for n, one in enumerate(layer))
        await session.flush()
        for layer, below in pairwise(layers):
            session.add_all(RoleInclude(role_id=a, included_id=b) for a in layer for b in below)
        session.add_all(RolePermission(role_id=one, permission="docs:read") for one in layers[-1])
        session.add(UserRole(user_id=UUID(user["id"]), role_id=layers[0][0]))
    async with longest_pause() as pauses:
        access = f"/admin/users/{user['id']}/access"
        answer = await admin.get(access, params={"permission": "docs:read"})
        other = await admin.get(access, params={"permission": "docs:write"})
    assert answer.status_code == 200
    said = answer.json()
    assert (said["granted"], said["more"], len(said["ways"])) == (True, True, 20)
    first = [f"r{depth}-0" for depth in range(7)]
    assert said["ways"][0] == {"roles": first, "permission": "docs:read"}
    assert said["ways"][1]["roles"] == [*first[:6], "r6-1"]
    assert said["reason"] == f"Granted by {' which includes '.join(first)}."
    assert (other.json()["granted"], other.json()["ways"]) == (False, [])
    assert other.json()["more"] is False
    assert max(pauses) < 0.5


@asynccontextmanager
async def longest_pause() -> AsyncIterator[list[float]]:
    """Note for how long the loop looked at nothing else, again and again."""
    pauses = [0.0]

    async def watch() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    watching = asyncio.create_task(watch())
    try:
        yield pauses
    finally:
        watching.cancel()


async def test_sessions_and_tokens_of_others(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Listed, ended one by one and all at once; a token alone is refused, by itself or by jti."""
    user = await made(admin, "ann", "user")
    clients = [await signed_in_as(app, "ann") for _ in range(4)]
    page = (await admin.get(f"/admin/users/{user['id']}/sessions")).json()
    assert len(page["items"]) == 4
    every = (await admin.get("/admin/sessions", params={"limit": 3})).json()
    rest = await admin.get("/admin/sessions", params={"limit": 3, "cursor": every["next_cursor"]})
    assert len({item["id"] for item in every["items"] + rest.json()["items"]}) == 5
    mine = (await admin.get("/admin/sessions", params={"user_id": user["id"]})).json()["items"]
    assert {item["username"] for item in mine} == {"ann"}
    assert "jti" not in json.dumps(mine)
    assert (await admin.delete(f"/admin/sessions/{mine[0]['id']}")).status_code == 204
    assert code(await admin.delete(f"/admin/sessions/{mine[0]['id']}")) == (404, "not_found")
    assert code(await admin.delete(f"/admin/sessions/{uuid4()}")) == (404, "not_found")
    assert code(await clients[-1].get("/protected")) == (401, "token_revoked")
    token = clients[0].headers["Authorization"].removeprefix("Bearer ")
    answer = await admin.post("/admin/tokens/revoke", json={"token": token})
    assert (answer.status_code, answer.json()) == (200, {"revoked": True})
    assert code(await clients[0].get("/protected")) == (401, "token_revoked")
    again = await clients[0].post("/refresh", headers=bearer(clients[0].refresh))
    assert again.status_code == 200
    import jwt

    said = jwt.decode(clients[1].headers["Authorization"][7:], options={"verify_signature": False})
    body = {name: said[name] for name in ("jti", "sub", "exp")}
    assert (await admin.post("/admin/tokens/revoke", json=body)).status_code == 200
    assert code(await clients[1].get("/protected")) == (401, "token_revoked")
    answer = await admin.post(f"/admin/users/{user['id']}/logout")
    assert answer.json() == {"logout": True, "sessions": 3}
    assert code(await clients[2].get("/protected")) == (401, "token_revoked")
    for wrong in (
        {}, {"token": "x"}, {"jti": said["jti"]}, {**body, "token": token}, {**body, "exp": -1},
        {**body, "jti": "x"}, {**body, "exp": "9"},
    ):  # fmt: skip
        answer = await admin.post("/admin/tokens/revoke", json=wrong)
        assert code(answer) == (422, "validation_failed"), wrong
    # whatever is said of its expiry, what was taken back stays so
    body = {name: said[name] for name in ("jti", "sub")}
    assert (await admin.post("/admin/tokens/revoke", json=body | {"exp": 0})).status_code == 200
    assert code(await clients[1].get("/protected")) == (401, "token_revoked")
    huge = await admin.post("/admin/tokens/revoke", json=body | {"exp": 2**53})
    assert huge.status_code == 200
    for client in clients:
        await client.aclose()


async def test_the_log_says_who_did_what(app: AsyncFlask, admin: httpx.AsyncClient) -> None:
    """Filters, pages, the export as a stream; no secret in it."""
    user = await made(admin, "ann", "user")
    wrong = {"username": "ann", "password": "wrong-Secret-55"}
    async with client_of(app, "10.1.2.3") as stranger:
        await stranger.post("/login", json=wrong)
    await admin.patch(f"/admin/users/{user['id']}", json={"password": "another-Lantern-47"})
    page = (await admin.get("/admin/audit", params={"target": user["id"]})).json()
    actions = [item["action"] for item in page["items"]]
    assert actions == ["user.changed", "login.failed", "user.created"]
    changed, failed, _ = page["items"]
    boss = (await admin.get("/me")).json()
    assert (changed["actor"], changed["detail"]["fields"]) == (boss["id"], ["password"])
    assert (failed["ip"], failed["actor"]) == ("10.1.2.3", None)
    assert changed["request_id"]
    one = await admin.get("/admin/audit", params={"action": "login.failed"})
    assert [item["id"] for item in one.json()["items"]] == [failed["id"]]
    for moment, count in (("2020-01-01T00:00:00Z", 0), ("2999-01-01T00:00:00Z", 3)):
        params = {"until": moment, "target": user["id"]}
        assert len((await admin.get("/admin/audit", params=params)).json()["items"]) == count
        params = {"since": moment, "target": user["id"]}
        assert len((await admin.get("/admin/audit", params=params)).json()["items"]) == 3 - count
    first = (await admin.get("/admin/audit", params={"limit": 2})).json()
    assert len(first["items"]) == 2
    params = {"limit": 2, "cursor": first["next_cursor"], "action": "login"}
    assert code(await admin.get("/admin/audit", params=params)) == (422, "validation_failed")
    export = await admin.get("/admin/audit", headers={"Accept": "application/x-ndjson"})
    assert export.headers["Content-Type"] == "application/x-ndjson"
    rows = [json.loads(line) for line in export.text.splitlines()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert {item["id"] for item in page["items"]} <= {row["id"] for row in rows}
    for secret in (PASSWORD, "another-Lantern-47", "wrong-Secret-55", "argon2"):
        assert secret not in export.text


async def test_rows_that_were_altered_or_removed_are_found(
    admin: httpx.AsyncClient, parts: Parts
) -> None:
    """The database refuses to change them; where somebody gets round that, the chain shows it."""
    for n in range(3):
        await made(admin, f"user{n}", "user")
    while await parts.audit_log.seal(2):
        pass
    found = await parts.audit_log.verify()
    assert found.faults == []
    assert (found.sealed, found.unsealed) == (found.sealed, 0)
    assert found.sealed >= 4
    await made(admin, "late", "user")
    assert (await parts.audit_log.verify()).unsealed == 1
    for statement in (
        "UPDATE audit_events SET action = 'x'", "DELETE FROM audit_events",
        "UPDATE audit_seals SET digest = 'x'", "DELETE FROM audit_seals",
    ):  # fmt: skip
        with pytest.raises(DBAPIError, match="append-only"):
            async with parts.database.write() as session:
                await session.execute(text(statement))
    await tamper(parts, "UPDATE audit_events SET actor = NULL WHERE action = 'user.created'")
    faults = (await parts.audit_log.verify()).faults
    assert [fault.what for fault in faults] == ["altered"] * 5
    await tamper(parts, "DELETE FROM audit_events WHERE action = 'user.created'")
    faults = (await parts.audit_log.verify()).faults
    # the demo accounts' as well
    assert [fault.what for fault in faults] == ["removed"] * 5
    await tamper(parts, "DELETE FROM audit_seals WHERE seq = 2")
    faults = (await parts.audit_log.verify()).faults
    assert (2, "missing") in [(fault.seq, fault.what) for fault in faults]


async def tamper(parts: Parts, statement: str) -> None:
    """Do what only somebody with the database's own rights can."""
    async with parts.database.write() as session:
        if parts.database.dialect == "postgresql":
            await session.execute(text("SET session_replication_role = replica"))
            await session.execute(text(statement))
            await session.execute(text("SET session_replication_role = DEFAULT"))
            return
        for table in ("events", "seals"):
            for change in ("update", "delete"):
                await session.execute(text(f"DROP TRIGGER IF EXISTS audit_{table}_no_{change}"))
        await session.execute(text(statement))


async def test_two_processes_seal_each_row_once(admin: httpx.AsyncClient, parts: Parts) -> None:
    """At once, in small batches: one chain, no row twice, none left."""
    for n in range(5):
        await made(admin, f"user{n}", "user")
    await asyncio.gather(*(parts.audit_log.seal(2) for _ in range(8)))
    # who did not get the lock did nothing
    while await parts.audit_log.seal(2):
        await asyncio.gather(*(parts.audit_log.seal(2) for _ in range(8)))
    found = await parts.audit_log.verify()
    assert (found.faults, found.unsealed) == ([], 0)


async def test_a_row_that_was_committed_late_is_sealed_too(parts: Parts) -> None:
    """Its id is from before the newest seal: a slow transaction, or a clock behind another's."""
    await parts.accounts.set_email((await parts.users.find("testuser")).id, None, SYSTEM)
    await parts.audit_log.seal()
    async with parts.database.write() as session:
        early = earliest_id(datetime.now(UTC) - timedelta(seconds=20))
        session.add(AuditEvent(id=early, action="late", detail={}))
    assert await parts.audit_log.seal() == 1
    found = await parts.audit_log.verify()
    assert (found.faults, found.unsealed) == ([], 0)


async def test_numbers_for_a_dashboard(admin: httpx.AsyncClient, parts: Parts) -> None:
    """Counts, filled buckets, the accounts at which sign-ins fail."""
    user = await made(admin, "ann", "user")
    for _ in range(3):
        await admin.post("/login", json={"username": "ann", "password": "wrong-Secret-55"})
    tokens = await sign_in(admin, "ann", PASSWORD, transport="json")
    await admin.post("/logout", headers=bearer(tokens["access_token"]))
    for days, seconds, buckets in ((1, 3600, 24), (2, 3600, 48), (30, 86_400, 30)):
        stats = (await admin.get("/admin/stats", params={"days": days})).json()
        assert (stats["days"], stats["bucket_seconds"]) == (days, seconds)
        assert len(stats["activity"]) == buckets
        assert stats["users"] == {"total": 3, "active": 3, "new": 3}
        assert stats["sessions"] == {"live": 1}
        assert stats["revocations"] == 1
        last = stats["activity"][-1]
        assert (last["logins"], last["failures"]) == (2, 3)
        assert sum(bucket["logins"] for bucket in stats["activity"]) == 2
        failing = {"user_id": user["id"], "username": "ann", "failures": 3}
        assert stats["top_failing"] == [failing]


BAD = [
    ("GET", "/admin/users?limit=0", None, 422), ("GET", "/admin/users?zz=1", None, 422),
    ("GET", "/admin/users/nonsense", None, 404), ("GET", "/admin/audit?since=yesterday", None, 422),
    ("GET", "/admin/audit?since=0001-01-01T00:00:00Z", None, 422),
    ("GET", "/admin/audit?since=2026-01-01T00:00:00", None, 422),
    ("GET", "/admin/stats?days=0", None, 422), ("GET", "/admin/stats?days=9999", None, 422),
    ("GET", "/admin/sessions?user_id=x", None, 422), ("GET", "/admin/roles/no/such", None, 404),
    ("POST", "/admin/users", {"username": "a\u0000", "password": "b", "roles": "x"}, 422),
    ("POST", "/admin/users", {"username": "ok", "password": PASSWORD, "roles": ["nobody"]}, 422),
    ("POST", "/admin/users", {"username": "ok", "password": PASSWORD, "is_active": "yes"}, 422),
    ("POST", "/admin/users", {"username": "TESTUSER", "password": PASSWORD}, 409),
    ("POST", "/admin/users", {"username": "ok", "password": "password1"}, 422),
    ("POST", "/admin/roles", {"name": "a b"}, 422), ("POST", "/admin/roles", {"name": ".."}, 422),
    ("POST", "/admin/roles", {"name": "x", "permissions": ["nonsense"]}, 422),
    ("POST", "/admin/roles", {"name": "x\n"}, 422), ("POST", "/admin/roles", {}, 422),
    ("PATCH", "/admin/roles/user", {}, 422), ("PATCH", "/admin/roles/user", {"name": "z"}, 422),
    ("PATCH", "/admin/roles/none", {"description": "z"}, 404),
    ("DELETE", "/admin/roles/user", None, 409), ("DELETE", "/admin/roles/none", None, 404),
]  # fmt: skip


@ON_SQLITE
@pytest.mark.parametrize(("method", "path", "body", "status"), BAD)
async def test_bad_input_is_4xx_and_changes_nothing(
    admin: httpx.AsyncClient, method: str, path: str, body: Any, status: int
) -> None:
    """A problem document with the contract's status; users and roles are as they were."""

    async def everything() -> Any:
        users, roles = await admin.get("/admin/users"), await admin.get("/admin/roles")
        return users.json()["items"], roles.json()["items"]

    before = await everything()
    answer = await admin.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    if status == 422:
        assert answer.json()["errors"]
    assert await everything() == before


async def test_changes_of_roles_at_once_are_one_after_the_other(admin: httpx.AsyncClient) -> None:
    """No circle, no deadlock, no unknown role: every answer is one that an order explains."""
    for name in ("a", "b", "c", "t"):
        await role(admin, name)
    assert (await admin.patch("/admin/roles/b", json={"includes": ["c"]})).status_code == 200
    for _ in range(4):
        answers = await asyncio.gather(
            admin.patch("/admin/roles/a", json={"includes": ["b"]}),
            admin.patch("/admin/roles/c", json={"includes": ["a"]}),
        )
        assert sorted(answer.status_code for answer in answers) == [200, 422]
        for name in ("a", "c"):
            await admin.patch(f"/admin/roles/{name}", json={"includes": []})
    users = [await made(admin, f"user{n}", "user") for n in range(4)]
    for _ in range(3):
        answers = await asyncio.gather(
            *(
                admin.put(f"/admin/users/{user['id']}/roles", json={"roles": ["t"]})
                for user in users
            ),
            admin.patch("/admin/roles/t", json={"permissions": ["x:y"]}),
            admin.patch(f"/admin/users/{users[0]['id']}", json={"is_active": False}),
        )
        assert {answer.status_code for answer in answers} == {200}
    for user in users:
        await admin.put(f"/admin/users/{user['id']}/roles", json={"roles": []})
    answers = await asyncio.gather(
        admin.delete("/admin/roles/t"),
        *(admin.put(f"/admin/users/{u['id']}/roles", json={"roles": ["t"]}) for u in users),
    )
    assert {answer.status_code for answer in answers} <= {200, 204, 409, 422}


async def test_roles_are_listed_page_by_page(admin: httpx.AsyncClient) -> None:
    """Each once, by name, with what it holds; a cursor of another list, or none, is 422."""
    names = [f"role-{number}" for number in range(5)]
    for name in names:
        await role(admin, name, "users:read")
    seen: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await admin.get("/admin/roles", params=query)).json()
        assert page.keys() == {"items", "next_cursor"}
        assert len(page["items"]) <= 2
        seen += page["items"]
        if (cursor := page["next_cursor"]) is None:
            break
        last = cursor
    assert [one["name"] for one in seen] == sorted(["admin", "user", *names])
    assert all(one["permissions"] == ["users:read"] for one in seen if one["name"] in names)
    theirs = (await admin.get("/admin/users", params={"limit": 1})).json()["next_cursor"]
    for query in ({"cursor": theirs}, {"cursor": "nonsense"}, {"limit": 0}, {"page": 2}):
        answer = await admin.get("/admin/roles", params=query)
        assert code(answer) == (422, "validation_failed"), query
        assert "items" not in answer.json()
    assert (await admin.get("/admin/roles", params={"cursor": last})).status_code == 200
    everything = (await admin.get("/admin/roles")).json()
    assert (everything["items"], everything["next_cursor"]) == (seen, None)
