"""The receiving side: the examples as processes of their own, beside a real Rolecall."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import jwt
import pytest

from examples.rolecall_auth import RolecallAuth
from tests.conftest import bearer
from tests.live import _serve
from tests.live._serve import BIN, ROOT, Serving, free_port, wait_until
from tests.live.test_keys import FORMER, login_by, ripen, rolecall

SERVICES = ("jwks_flask", "jwks_fastapi", "introspecting")
TESTUSER = {"username": "testuser", "password": "testpass", "transport": "json"}
ADMIN = {"username": "admin", "password": "adminpass", "transport": "json"}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two workers with the demo accounts."""
    data = tmp_path_factory.mktemp("receiving")
    found = _serve.start(data, "--demo", "--workers", "2", SECRET_KEY=FORMER)
    yield found
    assert found.stop() == 0


@contextmanager
def service(name: str, serving: Serving, **environ: str) -> Iterator[httpx.Client]:
    """Start an example under Hypercorn."""
    port = free_port()
    process = subprocess.Popen(
        [BIN / "hypercorn", "-b", f"127.0.0.1:{port}", f"examples.{name}:app"],
        env=os.environ | {"ROLECALL_URL": serving.url} | environ,
        cwd=ROOT, stdout=sys.stderr, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:

            def answers() -> bool:
                try:
                    return client.get("/").status_code == 404
                except httpx.TransportError:
                    return False

            wait_until(answers)
            yield client
    finally:
        process.terminate()
        process.wait(20)


def signed_in(serving: Serving, who: dict[str, str], **more: str) -> dict[str, str]:
    """Return the tokens of a login."""
    answer = httpx.post(f"{serving.url}/login", json=who | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def client_app(serving: Serving, *arguments: str) -> tuple[str, str]:
    """Register a client app; return its id and secret."""
    lines = rolecall(serving, "clients", "create", "app", *arguments).splitlines()
    return lines[0].split()[1], lines[1].split()[1]


def guards(client: httpx.Client, serving: Serving) -> None:
    """Assert what every example must do with tokens of every kind."""
    user, admin = signed_in(serving, TESTUSER), signed_in(serving, ADMIN)
    answer = client.get("/invoices", headers=bearer(user["access_token"]))
    assert (answer.status_code, answer.json()) == (200, {"invoices": [], "for": "testuser"})
    assert client.get("/ledger", headers=bearer(user["access_token"])).status_code == 403
    assert client.get("/ledger", headers=bearer(admin["access_token"])).status_code == 200
    elsewhere = client_app(serving, "--role", "user", "--audience", "elsewhere")
    foreign = signed_in(serving, TESTUSER, client_id=elsewhere[0], client_secret=elsewhere[1])[
        "access_token"
    ]
    claims = jwt.decode(user["access_token"], options={"verify_signature": False})
    header = jwt.get_unverified_header(user["access_token"])
    forged = jwt.encode(claims, "x" * 32, "HS256", {"kid": header["kid"], "typ": "at+jwt"})
    assert client.get("/invoices").status_code == 401
    for token in (foreign, forged, user["refresh_token"], "x", user["access_token"][:-8] + "A" * 8):
        refused = client.get("/invoices", headers=bearer(token))
        assert refused.status_code == 401
        challenge = refused.headers["WWW-Authenticate"].replace('"', "")
        assert challenge == "Bearer error=invalid_token"


@pytest.fixture(scope="module")
def asking(serving: Serving) -> dict[str, str]:
    """What the introspecting service is started with: a client app that may know of our tokens."""
    client_id, secret = client_app(serving, "--audience", "rolecall")
    return {"CLIENT_ID": client_id, "CLIENT_SECRET": secret}


@pytest.mark.parametrize("name", SERVICES)
def test_services_guard_by_role_through_rotations(
    name: str, serving: Serving, asking: dict[str, str]
) -> None:
    """Role by role; a key that is rotated in the midst of requests refuses nobody.

    Offline means that a token that was taken back goes on until it expires: known, and documented.
    Who asks refuses it at once.
    """
    with service(name, serving, **asking) as client, ThreadPoolExecutor(3) as pool:
        guards(client, serving)
        before = signed_in(serving, TESTUSER)["access_token"]

        def ask(_: int) -> int:
            for token in (before, signed_in(serving, TESTUSER)["access_token"]):
                if client.get("/invoices", headers=bearer(token)).status_code != 200:
                    return 0
            return 1

        asked = [pool.submit(ask, n) for n in range(20)]
        ripen(serving)
        kid = rolecall(serving, "keys", "rotate").split()[2]
        asked += [pool.submit(ask, n) for n in range(20)]
        assert sum(one.result(60) for one in asked) == 40
        with serving.client() as everywhere:
            after = login_by(everywhere, kid)
        assert client.get("/invoices", headers=bearer(after)).status_code == 200
        httpx.post(f"{serving.url}/logout", headers=bearer(after))
        expected = 401 if name == "introspecting" else 200
        assert client.get("/invoices", headers=bearer(after)).status_code == expected


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_can_ask_nobody_says_so(
    name: str, serving: Serving, asking: dict[str, str]
) -> None:
    """Neither let in nor called a forger: 503."""
    token = signed_in(serving, TESTUSER)["access_token"]
    with service(name, serving, **asking, ROLECALL_URL="http://127.0.0.1:9") as client:
        assert client.get("/invoices", headers=bearer(token)).status_code == 503


class Counting:
    """Counts refreshes."""

    refreshes = 0

    def __call__(self, request: httpx.Request) -> None:
        self.refreshes += request.url.path == "/refresh"

    async def awaited(self, request: httpx.Request) -> None:
        self(request)


def made_stale(serving: Serving) -> tuple[RolecallAuth, str]:
    """Return the auth of a sign-in whose access token is stale, and the token."""
    tokens = signed_in(serving, TESTUSER)
    admin = bearer(signed_in(serving, ADMIN)["access_token"])
    path = f"{serving.url}/admin/users/{tokens['user']['id']}/roles"  # type: ignore[index]
    for roles in ([], ["user"]):
        assert httpx.put(path, json={"roles": roles}, headers=admin).status_code == 200
    stale = tokens["access_token"]
    return RolecallAuth(serving.url, stale, tokens["refresh_token"]), stale


def test_twenty_threads_share_one_refresh(serving: Serving) -> None:
    """All are answered 200, by the token that one of them refreshed."""
    auth, stale = made_stale(serving)
    counting = Counting()
    hooks = {"request": [counting]}
    with httpx.Client(
        base_url=serving.url, auth=auth, event_hooks=hooks, timeout=20
    ) as client, ThreadPoolExecutor(20) as pool:  # fmt: skip
        answers = list(pool.map(lambda _: client.get("/protected"), range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert counting.refreshes == 1
    assert auth.access_token != stale


async def test_twenty_tasks_share_one_refresh(serving: Serving) -> None:
    """The same without threads; when the session is over, the 401 is handed on after one try."""
    auth, _ = made_stale(serving)
    counting = Counting()
    async with httpx.AsyncClient(
        base_url=serving.url, auth=auth, event_hooks={"request": [counting.awaited]}, timeout=20
    ) as client:
        answers = await asyncio.gather(*(client.get("/protected") for _ in range(20)))
        assert [answer.status_code for answer in answers] == [200] * 20
        assert counting.refreshes == 1
        # taken back: no refresh can repair that, and none is tried
        await client.post("/logout")
        answer = await client.get("/protected")
        assert (answer.status_code, answer.json()["code"]) == (401, "token_revoked")
        assert counting.refreshes == 1
    lost, _ = made_stale(serving)
    lost.refresh_token = "x.y.z"
    async with httpx.AsyncClient(
        base_url=serving.url, auth=lost, event_hooks={"request": [counting.awaited]}
    ) as client:
        answer = await client.get("/protected")
    assert (answer.status_code, answer.json()["code"]) == (401, "token_stale")
    assert counting.refreshes == 2
