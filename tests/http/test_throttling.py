"""Failed sign-ins over HTTP: counted one by one, by who and from where, and for how long (28)."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest

from api.app import create_app
from api.asgi import AsyncFlask
from api.auth.passwords import Passwords
from api.settings import Settings
from tests.conftest import bearer, client_of, sign_in

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

RIGHT = {"username": "testuser", "password": "testpass"}
WRONG = {"username": "testuser", "password": "wrong"}


@asynccontextmanager
async def limited(settings: Settings, **limits: int) -> AsyncIterator[AsyncFlask]:
    """A service with small limits: 3 failures a pair, 6 an account, 9 an address."""
    few = {"login_failures_pair": 3, "login_failures_account": 6, "login_failures_address": 9}
    app = create_app(replace(settings, **(few | limits)))  # type: ignore[arg-type]
    async with app.running():
        yield app


async def tried(
    app: AsyncFlask, number: int, address: str = "127.0.0.1", **body: str
) -> Counter[int]:
    """Send so many wrong passwords at once; return the answers' statuses."""
    async with client_of(app, address) as client:
        answers = await asyncio.gather(
            *(client.post("/login", json=WRONG | body) for _ in range(number))
        )
    return Counter(answer.status_code for answer in answers)


async def test_attempts_at_once_count_one_by_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty exactly three are looked at, of whatever account, there or not."""
    looked_at = []
    verify = Passwords.verify

    async def noting(self: Passwords, password: str, hashed: str | None) -> bool:
        looked_at.append(hashed)
        return await verify(self, password, hashed)

    monkeypatch.setattr(Passwords, "verify", noting)
    async with limited(settings) as app:
        for number, name in enumerate(("testuser", "nobody", "admin"), 1):
            assert await tried(app, 20, username=name) == {401: 3, 429: 17}
            assert len(looked_at) == 3 * number


async def test_no_spelling_of_a_name_has_a_count_of_its_own(settings: Settings) -> None:
    """Case and width are one account, as they are one user."""
    async with limited(settings) as app:
        names = ("testuser", "TestUser", "TESTUSER", "\uff54estuser", "te\u017ftuser")
        statuses = [set(await tried(app, 1, username=name)) for name in names]
    assert statuses == [{401}] * 3 + [{429}] * 2


async def test_an_address_has_one_count_over_all_names(settings: Settings) -> None:
    """Nine names in turn, then none; IPv6 counts by its /64, with or without a zone."""
    async with limited(settings) as app:
        passed = [await tried(app, 1, "10.0.0.1", username=f"u{n}") for n in range(12)]
        assert [set(found) for found in passed] == [{401}] * 9 + [{429}] * 3
        assert await tried(app, 1, "10.0.0.2", username="u1") == {401: 1}
        passed = [await tried(app, 1, f"2001:db8::{n:x}", username=f"u{n}") for n in range(12)]
        assert [set(found) for found in passed] == [{401}] * 9 + [{429}] * 3
        assert await tried(app, 1, "2001:db8:0:1::1", username="u1") == {401: 1}
        passed = [await tried(app, 1, f"fe80::{n:x}%eth{n}", username=f"u{n}") for n in range(12)]
        assert [set(found) for found in passed] == [{401}] * 9 + [{429}] * 3


async def test_strangers_do_not_lock_the_owner_out(settings: Settings) -> None:
    """The account's count is full: who behaves gets in, and may err once; a stranger may not."""
    async with limited(settings) as app:
        for n in range(4):
            await tried(app, 3, f"10.0.0.{n}")
        assert await tried(app, 3, "10.0.0.9") == {401: 1, 429: 2}
        async with client_of(app, "10.0.1.1") as owner:
            assert (await owner.post("/login", json=RIGHT)).status_code == 200
            assert (await owner.post("/login", json=WRONG)).status_code == 401
            assert (await owner.post("/login", json=RIGHT)).status_code in {200, 429}
        async with client_of(app, "10.0.0.1") as stranger:
            assert (await stranger.post("/login", json=RIGHT)).status_code == 429


async def test_networks_of_ipv6_have_limits_of_their_own(settings: Settings) -> None:
    """Sixty /64s of one /48 have six tries in a /56, twelve in the /48, then none (86).

    A right password from elsewhere gets in, and so it does from another /48 of IPv6.
    """
    async with limited(settings, login_failures_account=1_000) as app:
        narrow = [f"2001:db8:0:{n:x}::1" for n in range(60)]
        wide = [f"2001:db8:0:{n:x}00::1" for n in range(60)]
        assert sum([(await tried(app, 1, one))[401] for one in narrow]) == 6
        assert sum([(await tried(app, 1, one))[401] for one in wide]) == 6
        for address, status in (("2001:db8:0:ffff::1", 429), ("2001:db8:1::1", 200)):
            async with client_of(app, address) as client:
                answer = await client.post("/login", json=RIGHT)
            assert answer.status_code == status
            assert ("Retry-After" in answer.headers) == (status == 429)


async def test_limits_of_wider_networks_are_settings(settings: Settings) -> None:
    """What they say counts, over one account and over all."""
    async with limited(settings, login_failures_pair_56=4, login_failures_address_48=10) as app:
        answers = [await tried(app, 1, f"2001:db8:0:{n:x}::1") for n in range(6)]
        assert [set(found) for found in answers] == [{401}] * 4 + [{429}] * 2
        names = [f"u{n}" for n in range(9)]
        answers = [
            await tried(app, 1, f"2001:db8:0:{n:x}00::1", username=name)
            for n, name in enumerate(names)
        ]
        assert sum(found[401] for found in answers) == 6


async def test_client_secrets_are_counted_by_the_same_networks(settings: Settings) -> None:
    """Sixty /64s of one /48 guess a client's secret twelve times."""
    basic = base64.b64encode(b"00000000-0000-7000-8000-000000000000:wrong").decode()
    statuses: Counter[int] = Counter()
    async with limited(settings, login_failures_account=1_000) as app:
        for n in range(60):
            async with client_of(app, f"2001:db8:0:{n:x}00::1") as client:
                answer = await client.post(
                    "/oauth/token",
                    data={"grant_type": "client_credentials"},
                    headers={"Authorization": f"Basic {basic}"},
                )
            statuses[answer.status_code] += 1
    assert statuses == {401: 12, 429: 48}


@pytest.mark.parametrize("proxies", [0, 1, 2])
async def test_forwarded_addresses_are_believed_as_far_as_told(
    settings: Settings, proxies: int
) -> None:
    """What the client writes itself gives it no fresh count, however many proxies there are."""
    async with limited(settings, trusted_proxies=proxies) as app:

        async def attempt(number: int, forwarded: str) -> int:
            headers = {"X-Forwarded-For": forwarded, "X-Real-IP": forwarded, "Forwarded":
                       f"for={forwarded}", "True-Client-IP": forwarded}  # fmt: skip
            async with client_of(app, "10.0.0.1") as client:
                body = WRONG | {"username": f"u{number}"}
                return (await client.post("/login", json=body, headers=headers)).status_code

        # each proxy adds the address that it saw on the right of what came
        trail = {0: "", 1: ", 203.0.113.7", 2: ", 203.0.113.7, 192.0.2.1"}[proxies]
        statuses = [await attempt(n, f"198.51.100.{n}{trail}") for n in range(12)]
        assert statuses == [401] * 9 + [429] * 3
        if proxies:
            other = {1: "198.51.100.1, 203.0.113.8", 2: "203.0.113.8, 192.0.2.1"}[proxies]
            assert await attempt(1, other) == 401
        # a list that is too short was not written by our proxies: the peer's address counts
        assert await attempt(1, "") == (429 if not proxies else 401)


async def test_forwarded_nonsense_is_no_address(settings: Settings) -> None:
    """Nothing in X-Forwarded-For is a 5xx, or reaches the database as it is."""
    async with (
        limited(settings, trusted_proxies=1, login_failures_address=1_000) as app,
        client_of(app, "10.0.0.1") as client,
    ):
        for n, forwarded in enumerate((
            "x" * 5_000, "\xe9", "', DROP TABLE users", "fe80::1%" + "z" * 200, "::1%eth0",
            "[::1]:80", "[::1", "::ffff:1.2.3.4", "1.2.3.4:99999", "unknown", "_hidden", ",",
            "1.2.3.4, ", "0x7f.1", "127.1", "\t", "::", "1.2.3.4%25",
        )):  # fmt: skip
            headers = {"X-Forwarded-For": forwarded.encode("latin-1")}
            body = WRONG | {"username": f"u{n}"}
            answer = await client.post("/login", json=body, headers=headers)
            assert answer.status_code == 401, (forwarded, answer.text)
            signed_in = await client.post("/login", json=RIGHT, headers=headers)
            assert signed_in.status_code == 200, forwarded
        mine = bearer(signed_in.json()["access_token"])
        client.cookies.clear()
        sessions = (await client.get("/me/sessions", headers=mine)).json()["items"]
    assert {session["ip"] for session in sessions} <= {
        "10.0.0.1", "fe80::1", "::1", "1.2.3.4", "::"
    }  # fmt: skip


async def test_retry_after_is_when_it_works_again(settings: Settings) -> None:
    """The seconds that are left of the window; looked at from then on, the right one too."""
    async with limited(settings, login_window=2) as app, client_of(app) as client:
        assert await tried(app, 3) == {401: 3}
        waits = []
        for pause in (0, 1.05):
            await asyncio.sleep(pause)
            refused = await client.post("/login", json=RIGHT)
            assert (refused.status_code, refused.json()["code"]) == (429, "too_many_requests")
            waits.append(int(refused.headers["Retry-After"]))
        assert 2 <= waits[0] <= 3
        assert waits[1] == 1
        await asyncio.sleep(1)
        assert (await client.post("/login", json=WRONG)).status_code == 401
        assert (await client.post("/login", json=RIGHT)).status_code == 200


async def test_what_is_no_attempt_does_not_count(settings: Settings) -> None:
    """Bodies that name nobody, or no password, leave every count where it is."""
    async with limited(settings) as app, client_of(app) as client:
        for body in ({}, {"username": "testuser"}, WRONG | {"x": 1}, WRONG | {"password": ""}):
            for _ in range(5):
                assert (await client.post("/login", json=body)).status_code == 422
        assert await tried(app, 5) == {401: 3, 429: 2}


async def test_a_stolen_token_guesses_no_password(settings: Settings) -> None:
    """/me/password counts as /login does, and with it."""
    async with limited(settings) as app, client_of(app) as client:
        token = bearer((await sign_in(client, transport="json"))["access_token"])
        guess = {"current_password": "wrong", "new_password": "kumquat vienna 77"}
        statuses: list[int] = []
        for _ in range(5):
            answer: httpx.Response = await client.post("/me/password", json=guess, headers=token)
            statuses.append(answer.status_code)
        assert statuses == [401] * 3 + [429] * 2
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await client.post("/login", json=RIGHT)).status_code == 429
