"""Faults that were found once, each by the HTTP request that showed it."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import func, insert, select

from api.app import create_app
from api.asgi import AsyncFlask
from api.auth.guards import public
from api.db import db_now
from api.db.models import CleanupTask, Revocation, Role, RolePermission, Session, new_id
from api.errors import StartupError, ValidationFailed
from api.parts import Parts
from api.services import bootstrap
from api.services.audit import SYSTEM
from api.services.lifetimes import Lifetimes, access_tokens_until, floor_until
from api.services.sessions import SessionFilter
from api.settings import Settings
from tests.conftest import bearer, client_of, sign_in
from tests.http._forge import genuine, let_in, signed
from tests.http.test_admin import admin as admin
from tests.http.test_admin import role
from tests.http.test_clients import registered

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
TESTUSER = {"username": "testuser", "password": "testpass"}


def code(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the problem's code."""
    return answer.status_code, answer.json()["code"]


@ON_SQLITE
async def test_right_sign_ins_at_once_are_not_throttled(client: httpx.AsyncClient) -> None:
    """More right sign-ins at once than there are places for failures: all get in."""
    answers = await asyncio.gather(*(client.post("/login", json=TESTUSER) for _ in range(25)))
    assert [answer.status_code for answer in answers] == [200] * 25


@ON_SQLITE
@pytest.mark.parametrize("path", ["/logout", "/logout/all"])
async def test_only_a_post_clears_cookies(client: httpx.AsyncClient, path: str) -> None:
    """A link or a preflight to a logout changes nothing, in the browser as on the server (23)."""
    await sign_in(client)
    for method in ("GET", "HEAD", "OPTIONS"):
        answer = await client.request(method, path)
        assert "Set-Cookie" not in answer.headers, method
    assert (await client.get("/protected")).status_code == 200
    csrf = {"X-CSRF-TOKEN": client.cookies["csrf_access_token"]}
    assert len((await client.post(path, headers=csrf)).headers.get_list("Set-Cookie")) == 4


async def test_of_two_password_changes_one_is_whole(app: AsyncFlask) -> None:
    """Two sessions change it at once: one stands and keeps its session, the other is refused."""
    async with client_of(app) as client:
        tokens = [(await sign_in(client, transport="json"))["access_token"] for _ in range(2)]
        news = ["first-Harbour-91", "second-Harbour-92"]
        answers = await asyncio.gather(
            *(
                client.post(
                    "/me/password",
                    json={"current_password": "testpass", "new_password": new},
                    headers=bearer(token),
                )
                for token, new in zip(tokens, news, strict=True)
            )
        )
        assert sorted(answer.status_code for answer in answers) == [204, 401]
        won = [answer.status_code for answer in answers].index(204)
        checks = [await client.get("/protected", headers=bearer(token)) for token in tokens]
        assert checks[won].status_code == 200
        assert code(checks[1 - won]) == (401, "token_revoked")
        logins = [await client.post("/login", json=TESTUSER | {"password": new}) for new in news]
        assert logins[won].status_code == 200
        assert code(logins[1 - won]) == (401, "bad_credentials")


async def test_one_session_changes_its_password_once_at_a_time(app: AsyncFlask) -> None:
    """Twice at once from one session: what was verified against is gone for the second."""
    async with client_of(app) as client:
        headers = bearer((await sign_in(client, transport="json"))["access_token"])
        bodies = [
            {"current_password": "testpass", "new_password": f"harbour-Lantern-{n}"}
            for n in range(2)
        ]
        answers = await asyncio.gather(
            *(client.post("/me/password", json=body, headers=headers) for body in bodies)
        )
        assert sorted(answer.status_code for answer in answers) == [204, 401]
        assert (await client.get("/protected", headers=headers)).status_code == 200


async def test_of_two_role_changes_one_is_whole(parts: Parts) -> None:
    """At once, with and without a role in common: the roles are those of one, not of both."""
    user = await parts.users.find("testuser")
    for _ in range(5):
        for one, other in ((["admin"], ["user"]), (["admin", "user"], ["user"])):
            await asyncio.gather(
                parts.users.set_roles(user.id, one, SYSTEM),
                parts.users.set_roles(user.id, other, SYSTEM),
            )
            assert list((await parts.users.get(user.id)).roles) in (one, other)


async def test_ten_thousand_sessions_are_ended_by_one_row(parts: Parts) -> None:
    """All are ended at once by one row; their own rows follow in batches."""
    user = await parts.users.find("testuser")
    rows = [
        {
            "id": new_id(), "user_id": user.id, "current_jti": str(new_id()),
            "idle_expires_at": parts_time(), "expires_at": parts_time(),
        }
        for _ in range(10_000)
    ]  # fmt: skip
    async with parts.database.write() as session:
        await session.execute(insert(Session), rows)
    assert await parts.sessions.end_all_of(user.id, SYSTEM) == 10_000
    async with parts.database.read() as session:
        found = (await session.execute(select(Revocation.kind, Revocation.subject))).all()
    assert [tuple(row) for row in found] == [("user_ended", str(user.id))]
    assert await parts.sessions.count_live(user.id) == 0
    assert (await parts.sessions.page(SessionFilter(user_id=user.id), 10, None)).items == []
    while await parts.cleanup.batch(4_000):
        pass
    async with parts.database.read() as session:
        left = select(func.count()).select_from(Session).where(Session.revoked_at.is_(None))
        assert await session.scalar(left) == 0
        assert await session.scalar(select(func.count()).select_from(CleanupTask)) == 0


def parts_time() -> Any:
    """Return an hour from now."""
    from datetime import UTC, datetime, timedelta

    return datetime.now(UTC) + timedelta(hours=1)


async def test_a_session_ended_by_a_dead_worker_is_told_again(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Ended in the database and not in Redis: who hears that it has ended can rely on it."""
    tokens = await sign_in(client, transport="json")
    access, refresh = bearer(tokens["access_token"]), bearer(tokens["refresh_token"])
    publish = parts.blocklist._publish
    told: list[Any] = []

    async def dies(entries: Any, *_: Any) -> None:
        told.append(entries)

    parts.blocklist._publish = dies
    assert (await client.post("/logout", headers=access)).status_code == 200
    parts.blocklist._publish = publish
    redis = parts.blocklist.redis
    sid = told[0][0].subject
    key = f"{parts.settings.redis_prefix}revocations"
    await redis.hdel(key, f"sid:{sid}")
    for ask in (client.post("/refresh", headers=refresh), client.post("/logout", headers=access)):
        assert code(await ask) == (401, "token_revoked")
        # on a machine that stalls it may be given up: then nobody trusts it
        is_told = await redis.hexists(key, f"sid:{sid}")
        assert is_told or not parts.blocklist.status().is_warm
        await redis.hdel(key, f"sid:{sid}")


@ON_SQLITE
@pytest.mark.parametrize("path", ["/refresh", "/logout", "/logout/all"])
async def test_bodies_that_nobody_reads_are_refused(client: httpx.AsyncClient, path: str) -> None:
    """Not JSON, broken, with members, compressed: refused, and the token is not spent."""
    tokens = await sign_in(client, transport="json")
    headers = bearer(tokens["refresh_token"])
    as_json = headers | {"Content-Type": "application/json"}
    asked = [
        (b"zzz", headers | {"Content-Type": "text/plain"}, 415),
        (b"a=b", headers | {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b"{}", as_json | {"Content-Encoding": "gzip"}, 415),
        (b"{not json", as_json, 400),
        (b'{"x": 1}', as_json, 422),
        (b"[]", as_json, 422),
    ]
    for body, how, status in asked:
        answer = await client.post(path, content=body, headers=how)
        assert answer.status_code == status, body
    assert (await client.post(path, content=b"{}", headers=as_json)).status_code == 200


@ON_SQLITE
async def test_a_transport_that_is_not_there_opens_no_session(settings: Settings) -> None:
    """Refused before the sign-in, not after."""
    app = create_app(replace(settings, token_location=("headers",)))
    async with app.running(), client_of(app) as client:
        answer = await client.post("/login", json=TESTUSER | {"transport": "cookies"})
        assert code(answer) == (422, "validation_failed")
        async with app.extensions["rolecall"].database.read() as session:
            assert (await session.scalars(select(Session))).all() == []


@ON_SQLITE
async def test_no_access_token_outlives_its_session(settings: Settings) -> None:
    """Where a session goes idle before an access token would expire, that expires with it."""
    app = create_app(replace(settings, refresh_expires=60))
    async with app.running(), client_of(app) as client:
        assert 1 <= (await sign_in(client))["expires_in"] <= 60


@ON_SQLITE
async def test_what_is_taken_back_outlives_the_leeway(settings: Settings) -> None:
    """A token is accepted until its exp and the leeway: so long, and longer, it is refused."""
    app = create_app(replace(settings, leeway=300))
    async with app.running(), client_of(app) as client:
        tokens = await sign_in(client, transport="json")
        await client.post("/logout", headers=bearer(tokens["access_token"]))
        async with app.extensions["rolecall"].database.read() as session:
            (row,) = (await session.scalars(select(Revocation))).all()
            (ended,) = (await session.scalars(select(Session))).all()
        assert (row.expires_at - ended.idle_expires_at).total_seconds() >= 299
    short, long = Lifetimes(300, 1, 1, 1), Lifetimes(300, 1, 1, 1, leeway=300)
    assert (access_tokens_until(long) - access_tokens_until(short)).total_seconds() > 299
    # lifetimes may have been longer before a restart
    assert (floor_until(short) - access_tokens_until(short)).total_seconds() > 86_000


def changed_cursor(cursor: str, **values: Any) -> str:
    """Return a cursor with its time or id replaced."""
    mark, at, name = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    data = json.dumps([mark, values.get("at", at), values.get("id", name)])
    return base64.urlsafe_b64encode(data.encode()).rstrip(b"=").decode()


@ON_SQLITE
async def test_cursors_that_were_tampered_with_are_422(client: httpx.AsyncClient) -> None:
    """Of another type, out of range: told so, whatever is in them."""
    headers = bearer((await sign_in(client, "admin", "adminpass"))["access_token"])
    page = await client.get("/admin/users", params={"limit": 1}, headers=headers)
    cursor = page.json()["next_cursor"]
    odd = [changed_cursor(cursor, id=value) for value in (5, True, [], {}, None, "x", "\0")]
    odd += [
        changed_cursor(cursor, at=value)
        for value in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026", 7, "\0")
    ]
    for value in odd:
        answer = await client.get(
            "/admin/users", params={"limit": 1, "cursor": value}, headers=headers
        )
        assert code(answer) == (422, "validation_failed"), value
    for limit in ("1_0", "\u0661", "1.0", " 1", "0", "201", "9" * 30):
        answer = await client.get("/admin/users", params={"limit": limit}, headers=headers)
        assert code(answer) == (422, "validation_failed"), limit


@ON_SQLITE
async def test_ones_sessions_come_in_pages(client: httpx.AsyncClient) -> None:
    """/me/sessions keeps to the rules of lists."""
    tokens = [await sign_in(client, transport="json") for _ in range(3)]
    headers = bearer(tokens[0]["access_token"])
    seen: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(2):
        params = {"limit": "2"} | cursor
        page = (await client.get("/me/sessions", params=params, headers=headers)).json()
        seen += [item["id"] for item in page["items"]]
        cursor = {"cursor": page["next_cursor"]}
    assert page["next_cursor"] is None
    assert len(set(seen)) == 3
    for wrong in ({"limit": 0}, {"cursor": "bad"}, {"zz": 3}):
        answer = await client.get("/me/sessions", params=wrong, headers=headers)
        assert code(answer) == (422, "validation_failed")


@ON_SQLITE
async def test_odd_claims_under_a_good_signature_are_401(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """What no token of ours holds is refused, in every route, and breaks nothing."""
    _, header, claims = await genuine(client)
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    odd = {f"{name} of 4,000": claims | {name: "x" * 4_000} for name in ("sid", "sub", "jti")}
    odd |= {f"extra {extra!r}": claims | {"extra": extra} for extra in ("\ud800", 2**70, deep)}
    forged = {name: signed(parts, said, header) for name, said in odd.items()}
    assert await let_in(client, forged) == {}


@ON_SQLITE
async def test_slashes_redirect_nowhere(client: httpx.AsyncClient) -> None:
    """A doubled slash is 404, not a redirect to the host that the client named."""
    for path in ("/me//sessions", "/docs//swagger-ui.css", "/health/ready/"):
        answer = await client.get(f"http://test{path}", headers={"Host": "evil.example"})
        assert code(answer) == (404, "not_found"), path
        assert "Location" not in answer.headers


@ON_SQLITE
async def test_only_ascii_space_is_trimmed_from_a_credential(client: httpx.AsyncClient) -> None:
    """U+00A0 and U+0085 are no space in a header (20)."""
    token = (await sign_in(client, transport="json"))["access_token"]
    for odd in (f"Bearer {token}\xa0", f"Bearer {token}\x85", f"\xa0Bearer {token}"):
        answer = await client.get("/protected", headers={"Authorization": odd.encode("latin-1")})
        assert code(answer) == (400, "bad_request")
    padded = {"Authorization": f"Bearer {token} \t"}
    assert (await client.get("/protected", headers=padded)).status_code == 200


@ON_SQLITE
async def test_two_tokens_by_one_name_are_refused(settings: Settings) -> None:
    """By cookie or in the query: which of two would count is nobody's guess (19)."""
    app = create_app(replace(settings, token_location=("headers", "cookies", "query_string")))
    async with app.running(), client_of(app) as client:
        one = (await sign_in(client, transport="json"))["access_token"]
        two = (await sign_in(client, transport="json"))["access_token"]
        cookies = {"Cookie": f"access_token={one}; access_token={two}"}
        assert code(await client.get("/protected", headers=cookies)) == (400, "bad_request")
        answer = await client.get(f"/protected?jwt={one}&jwt={two}")
        assert code(answer) == (400, "bad_request")
        assert (await client.get(f"/protected?jwt={one}")).status_code == 200


@ON_SQLITE
async def test_nothing_at_all_has_no_type(client: httpx.AsyncClient) -> None:
    """An empty answer is not text/html."""
    headers = bearer((await sign_in(client, transport="json"))["access_token"])
    sid = (await client.get("/me/sessions", headers=headers)).json()["items"][0]["id"]
    for answer in (
        await client.options("/logout"),
        await client.delete(f"/me/sessions/{sid}", headers=headers),
    ):
        assert answer.status_code in {200, 204}
        assert "Content-Type" not in answer.headers


@ON_SQLITE
async def test_the_field_of_a_weak_password_is_the_bodys(client: httpx.AsyncClient) -> None:
    """/me/password calls it new_password."""
    headers = bearer((await sign_in(client, transport="json"))["access_token"])
    body = {"current_password": "testpass", "new_password": "password1"}
    answer = await client.post("/me/password", json=body, headers=headers)
    assert code(answer) == (422, "weak_password")
    assert {fault["field"] for fault in answer.json()["errors"]} == {"new_password"}


# The edges of Unicode's Default_Ignorable_Code_Point, as DerivedCoreProperties.txt lists them.
IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180d\u180e\u180f\u200b\u200f\u202a\u202e"
    "\u2060\u206f\u3164\ufe00\ufe0f\ufeff\uffa0\ufff0\ufff8\U0001bca0\U0001bca3\U0001d173"
    "\U0001d17a\U000e0000\U000e0100\U000e01ef\U000e0fff"
)


@ON_SQLITE
@pytest.mark.parametrize(
    "name", ["admin\u202e", "ad\u200bmin", "a\u2028b", "a\ue000", *(f"ad{c}min" for c in IGNORABLE)]
)
async def test_names_that_cannot_be_seen_are_refused(settings: Settings, name: str) -> None:
    """Nobody registers a name that looks like another's."""
    app = create_app(replace(settings, registration_open=True))
    async with app.running(), client_of(app) as client:
        body = {"username": name, "password": "correct-Harbour-93"}
        assert code(await client.post("/register", json=body)) == (422, "validation_failed")
        body["username"] = "Zoë 😀"
        assert (await client.post("/register", json=body)).status_code == 201


@ON_SQLITE
async def test_aborts_of_a_teams_own_views_keep_the_contract(
    app: AsyncFlask, client: httpx.AsyncClient
) -> None:
    """abort(401) has its challenge, and each status a code that goes with it (16)."""
    from flask import abort

    @app.get("/abort/<int:status>")
    @public
    async def aborting(status: int) -> Any:
        abort(status)

    expected = {401: "missing_token", 403: "insufficient_permission", 409: "conflict"}
    for status, name in expected.items():
        answer = await client.get(f"/abort/{status}")
        assert code(answer) == (status, name)
        assert ("WWW-Authenticate" in answer.headers) == (status != 409)


@ON_SQLITE
async def test_demo_accounts_are_not_served_to_others(parts: Parts) -> None:
    """A database with the demo accounts is refused where other machines can reach it."""
    arguments = {"demo": False, "admin_username": None, "admin_password": None}
    prepare = bootstrap.prepare
    await prepare(parts.database, parts.accounts, parts.users, public=False, **arguments)
    with pytest.raises(StartupError, match="demo accounts"):
        await prepare(parts.database, parts.accounts, parts.users, public=True, **arguments)
    for name in ("testuser", "admin"):
        user = await parts.users.find(name)
        if name == "admin":
            await parts.users.set_password(user.id, "correct-Harbour-93", SYSTEM)
        else:
            await parts.users.deactivate(user.id, SYSTEM)
    await prepare(parts.database, parts.accounts, parts.users, public=True, **arguments)


@ON_SQLITE
async def test_roles_that_do_not_fit_in_a_cookie_are_not_given(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Just under the limit is given and fits in 4,096 bytes; more is 422, and nothing changed.

    It fits with the audiences of a client app too, in whatever alphabet.
    """
    user = await parts.users.find("testuser")
    async with parts.database.write() as session:
        for number in range(40):
            role = Role(name=f"role-{number:02}-{'x' * 20}", description="")
            session.add(role)
            await session.flush()
            session.add(RolePermission(role_id=role.id, permission=f"area{number}:{'y' * 20}"))
    roles = (await parts.roles.page(200, None)).items
    names = [role.name for role in roles if role.name.startswith("role-")]
    given: list[str] = []
    for name in names:
        try:
            await parts.users.set_roles(user.id, [*given, name], SYSTEM)
        except ValidationFailed:
            break
        given.append(name)
    assert 20 < len(given) < 40
    assert list((await parts.users.get(user.id)).roles) == given
    wanted = {
        "name": "x", "allowed_roles": ["user", *given], "grants": [], "public": True,
        "audiences": ["rolecall", "😀" * 12, "😁" * 12], "access_token_expires": None,
    }  # fmt: skip
    through, _ = await parts.clients.create(wanted, SYSTEM)
    for more in ({}, {"client_id": str(through.client_id)}):
        answer = await client.post("/login", json=TESTUSER | more)
        assert answer.status_code == 200
        largest = max(len(cookie) for cookie in answer.headers.get_list("Set-Cookie"))
        assert 3_000 < largest < 4_096


async def test_old_sessions_are_forgotten_in_batches(parts: Parts) -> None:
    """Sessions that nobody can refresh any more are pruned; the others stay."""
    user = await parts.users.find("testuser")

    async def opened(offset: int) -> UUID:
        async with parts.database.write() as session:
            return (
                await session.execute(
                    insert(Session)
                    .values(
                        id=new_id(), user_id=user.id, current_jti=str(new_id()),
                        idle_expires_at=db_now(offset), expires_at=db_now(offset),
                    )
                    .returning(Session.id)
                )
            ).scalar_one()  # fmt: skip

    for _ in range(3):
        await opened(-90_000)
    kept = {await opened(-60), await opened(60)}
    assert [await parts.sessions.prune(2) for _ in range(3)] == [2, 1, 0]
    async with parts.database.read() as session:
        assert set(await session.scalars(select(Session.id))) == kept


@pytest.mark.parametrize(
    ("path", "change", "again", "fields"),
    [
        ("/admin/roles/b", {"permissions": []}, {"permissions": [], "description": "x"}, ["b"]),
        ("/admin/roles/b", {"includes": []}, {"includes": []}, ["b", "c"]),
        ("/admin/roles/b", {"includes": []}, {"includes": [], "permissions": []}, ["b", "c"]),
        ("/admin/roles/b", None, None, ["b", "c"]),
        ("client", {"allowed_roles": ["b"]}, {"allowed_roles": ["b"], "name": "other"}, []),
    ],
)
async def test_a_change_by_a_dead_worker_is_told_again(
    client: httpx.AsyncClient,
    admin: httpx.AsyncClient,
    parts: Parts,
    path: str,
    change: dict[str, Any] | None,
    again: dict[str, Any] | None,
    fields: list[str],
) -> None:
    """Whoever asks for what is so already can rely on it: every floor that the first one raised.

    Also where the same request changes something else.
    """
    await role(admin, "c", "docs:read")
    await role(admin, "b", "stats:read", includes=["c"])
    app = await registered(admin, "b", "c", grants=["client_credentials"])
    wanted = [f"role:{name}" for name in fields] + ["scope:narrowed"]
    if path == "client":
        path, wanted = f"/admin/clients/{app['client_id']}", [f"client:{app['client_id']}"]
    publish = parts.blocklist._publish

    async def dies(*_: Any) -> None:
        pass

    async def ask(body: dict[str, Any] | None) -> httpx.Response:
        return await (admin.delete(path) if body is None else admin.patch(path, json=body))

    parts.blocklist._publish = dies
    assert (await ask(change)).is_success
    parts.blocklist._publish = publish
    key = f"{parts.settings.redis_prefix}revocations"
    await parts.blocklist.redis.hdel(key, *wanted)
    assert (await ask(again)).status_code == (404 if again is None else 200)
    # on a machine that stalls it may be given up: then nobody trusts it
    told = [await parts.blocklist.redis.hexists(key, field) for field in wanted]
    assert all(told) or not parts.blocklist.status().is_warm
