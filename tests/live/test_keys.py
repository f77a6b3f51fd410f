"""Rotation under load, and `rolecall keys`, on real processes; read by libraries not ours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import pytest
from joserfc import jwt as jose
from joserfc.jwk import KeySet

from api.db import Database
from api.settings import async_database_url
from benchmarks.load import load
from tests import _keys, conftest
from tests.conftest import bearer
from tests.live import _serve
from tests.live._serve import BIN, ROOT, Serving, wait_until

CLIENTS = 4
FORMER = "kJ8vQ2nR5tXw9zB3fH6mP0sD4gL7yC1e"
OURS = "Zq4nT8bW1xK6mV9cR3hY7pL2dG5sJ0fA"
TESTUSER = {"username": "testuser", "password": "testpass", "transport": "json"}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """Two workers with the demo accounts, on SQLite and an embedded Redis."""
    started = _serve.start(tmp_path, "--demo", "--workers", "2", SECRET_KEY=FORMER)
    yield started
    started.stop()


def rolecall(
    serving: Serving, *arguments: str, code: int = 0, secret: str = FORMER, said: str = ""
) -> str:
    """Run the command line beside the service and return what it printed."""
    environ = os.environ | serving.environ | {"SECRET_KEY": secret}
    done = subprocess.run(
        [BIN / "rolecall", *arguments],
        input=said, capture_output=True, text=True, env=environ, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def ripen(serving: Serving) -> None:
    """Let the next key have been published for long enough: every worker knows it by then."""
    kid = asyncio.run(_ripened(serving.environ))
    with serving.client() as client:
        wait_until(lambda: all(kid in client.get("/.well-known/jwks.json").text for _ in range(20)))


async def _ripened(environ: Mapping[str, str]) -> str:
    data = Path(environ["ROLECALL_DATA_DIR"])
    database = Database(async_database_url(environ.get("DATABASE_URL", ""), data))
    await _keys.ripen(database)
    (kid,) = (await _keys.states(_keys.store_on(database)))["next"]
    await database.close()
    return kid


class Client(threading.Thread):
    """Signs in, then asks and refreshes without end, and verifies offline what it was given."""

    def __init__(self, serving: Serving, stop: threading.Event) -> None:
        super().__init__()
        self.serving = serving
        self.ended = stop
        self.refused: list[str] = []
        self.asked = 0
        self.kids: Counter[str] = Counter()
        # it keeps the JWKS for max-age, and asks again at once for a kid that it does not know:
        # half a minute's cooldown is more than this test takes between two rotations
        address = f"{serving.url}/.well-known/jwks.json"
        self.reader = jwt.PyJWKClient(address, lifespan=300, cooldown_duration=0)
        self.published: set[str] = set()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:  # noqa: BLE001  whatever it is, the test is told
            self.refused.append(repr(error))

    def work(self) -> None:
        with self.serving.client() as client:
            tokens = client.post("/login", json=TESTUSER).json()
            first = tokens["access_token"]
            while not self.ended.is_set():
                self.look(client, tokens["access_token"])
                for token in (first, tokens["access_token"]):
                    self.count(client.get("/protected", headers=bearer(token)))
                answer = client.post("/refresh", headers=bearer(tokens["refresh_token"]))
                if self.count(answer):
                    tokens = answer.json()

    def look(self, client: httpx.Client, token: str) -> None:
        kid = jwt.get_unverified_header(token)["kid"]
        if kid not in self.kids and self.kids and kid not in self.published:
            self.refused.append(f"{kid} signed before any JWKS showed it")
        self.kids[kid] += 1
        document = client.get("/.well-known/jwks.json").json()
        self.published |= {key["kid"] for key in document["keys"]}
        key = self.reader.get_signing_key_from_jwt(token)
        jwt.decode(token, key, algorithms=["EdDSA"], audience="rolecall", issuer="rolecall")
        jose.decode(token, KeySet.import_key_set(document), algorithms=["EdDSA"])

    def count(self, answer: httpx.Response) -> bool:
        self.asked += 1
        if answer.status_code != 200:
            self.refused.append(f"{answer.request.url.path} {answer.status_code} {answer.text}")
        return answer.status_code == 200


# joserfc would have "Ed25519" (RFC 9864) in place of the "EdDSA" that PyJWT and most others know
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated via RFC 9864")
def test_three_rotations_under_load_refuse_nothing(serving: Serving) -> None:
    """Protected requests and refreshes on two workers: every answer is 200, by every key.

    Tokens from before the first rotation go on working; each key is in the JWKS before it signs;
    PyJWT's PyJWKClient and joserfc verify every token offline all the while.
    """
    stop = threading.Event()
    clients = [Client(serving, stop) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        signed = []
        for _ in range(3):
            ripen(serving)
            signed.append(rolecall(serving, "keys", "rotate").split()[2])
            for client in clients:
                wait_until(lambda one=client: one.kids[signed[-1]] >= 3 or one.refused)
                assert client.refused == []
    finally:
        stop.set()
        for client in clients:
            client.join(30)
    assert [refused for client in clients for refused in client.refused] == []
    assert not any(client.is_alive() for client in clients)
    for client in clients:
        assert set(signed) < set(client.kids)
        assert len(client.kids) == 4
    listed = Counter(line.split()[2] for line in rolecall(serving, "keys", "list").splitlines())
    assert listed == {"next": 1, "current": 1, "old": 3}


@pytest.fixture(params=["sqlite", "postgresql"])
def benched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serving]:
    """Two workers with the demo accounts, on either database."""
    environ = {"SECRET_KEY": FORMER}
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_server")
        asyncio.run(conftest._execute(server, "DROP DATABASE IF EXISTS benched"))
        asyncio.run(conftest._execute(server, "CREATE DATABASE benched"))
        environ["DATABASE_URL"] = f"postgresql://postgres@/benched?host={server.directory}"
    started = _serve.start(tmp_path, "--demo", "--workers", "2", **environ)
    yield started
    assert started.stop() == 0


class Mix:
    """What each connection of the benchmark's load sends next, and the kids that it was given."""

    # protected with a token from before the rotation, and with the newest that there is
    KINDS = ("refresh", "login", *["first"] * 3, *["newest"] * 3)

    def __init__(self, serving: Serving) -> None:
        self.first = httpx.post(f"{serving.url}/login", json=TESTUSER).json()["access_token"]
        self.newest = self.first
        self.refresh: dict[int, str] = {}
        self.kids: Counter[str] = Counter()

    def __call__(self, number: int, last: bytes) -> bytes:
        kind = self.KINDS[number % len(self.KINDS)]
        if kind in {"first", "newest"}:
            return self._request("GET", "/protected", getattr(self, kind))
        if last:
            self._keep(number, json.loads(last))
        if kind == "refresh" and number in self.refresh:
            return self._request("POST", "/refresh", self.refresh[number])
        return self._request("POST", "/login", "", json.dumps(TESTUSER).encode())

    def _keep(self, number: int, answer: dict[str, str]) -> None:
        self.newest, self.refresh[number] = answer["access_token"], answer["refresh_token"]
        self.kids[jwt.get_unverified_header(self.newest)["kid"]] += 1

    @staticmethod
    def _request(method: str, path: str, token: str, body: bytes = b"") -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: it", f"Content-Length: {len(body)}"]
        lines += [f"Authorization: Bearer {token}"] if token else []
        lines += ["Content-Type: application/json"] if body else []
        return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_rotation_in_the_middle_of_the_benchmarks_load(benched: Serving) -> None:
    """32 connections that ask, refresh and sign in without pause: every answer is 200."""
    ripen(benched)
    mix, stop = Mix(benched), threading.Event()

    def loaded() -> float:
        rate = 0.0
        while not stop.is_set():
            rate = max(rate, load(int(urlsplit(benched.url).port or 0), mix, 1.0).rate)
        return rate

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(loaded)
        try:
            wait_until(lambda: sum(mix.kids.values()) > 50 or loading.done())
            (former,) = mix.kids
            kid = rolecall(benched, "keys", "rotate").split()[2]
            wait_until(lambda: mix.kids[kid] > 50 or loading.done())
        finally:
            stop.set()
        assert loading.result(60) > 0
    assert set(mix.kids) == {former, kid}


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
def test_other_algorithms_are_read_by_others(algorithm: str, tmp_path: Path) -> None:
    """PyJWKClient and joserfc verify what JWT_ALGORITHM signs, by the JWKS alone."""
    serving = _serve.start(tmp_path, "--demo", JWT_ALGORITHM=algorithm)
    try:
        token = httpx.post(f"{serving.url}/login", json=TESTUSER).json()["access_token"]
        address = f"{serving.url}/.well-known/jwks.json"
        key = jwt.PyJWKClient(address).get_signing_key_from_jwt(token)
        claims = jwt.decode(token, key, [algorithm], audience="rolecall", issuer="rolecall")
        document = httpx.get(address).json()
        read = jose.decode(token, KeySet.import_key_set(document), algorithms=[algorithm])
        assert read.claims == claims
        assert (read.header["alg"], claims["username"]) == (algorithm, "testuser")
        assert {key["alg"] for key in document["keys"]} == {algorithm}
    finally:
        assert serving.stop() == 0


def test_the_command_line_of_keys(serving: Serving) -> None:
    """What it says and refuses; once it says so, no worker takes a token of a retired key."""
    said = rolecall(serving, "keys", "rotate", code=1)
    assert "may not know the next key yet" in said
    ripen(serving)
    with serving.client() as client:
        token = client.post("/login", json=TESTUSER).json()["access_token"]
        former = jwt.get_unverified_header(token)["kid"]
        current = rolecall(serving, "keys", "rotate").split()[2]
        assert "only one that signs" in rolecall(serving, "keys", "retire", current, code=1)
        assert "There is no key nobody" in rolecall(serving, "keys", "retire", "nobody", code=1)
        assert client.get("/protected", headers=bearer(token)).status_code == 200
        assert "is retired" in rolecall(serving, "keys", "retire", "--", former)
        refused_everywhere(client, token)
        assert former not in client.get("/.well-known/jwks.json").text
        token = login_by(client, current)
        fresh = rolecall(serving, "keys", "rotate", "--now")
        assert "Every key before is retired" in fresh
        assert "everybody has to sign in again" in fresh
        refused_everywhere(client, token)
        login_by(client, fresh.split()[2])
    audited = rolecall(serving, "audit", "verify")
    assert "The chain holds." in audited


def test_another_secret_key(serving: Serving) -> None:
    """Stopped, taken over by `rolecall keys reencrypt`, started: nobody has to sign in again."""
    with serving.client() as client:
        token = client.post("/login", json=TESTUSER).json()["access_token"]
    assert serving.stop() == 0
    data = serving.log.parent
    refused = _serve.start(data, "--demo", wait=False, SECRET_KEY=OURS)
    assert refused.process.wait(30) == 1
    assert "rolecall keys reencrypt" in refused.log.read_text()
    arguments = ("keys", "reencrypt")
    assert "SECRET_KEY is not" in rolecall(serving, *arguments, code=1, secret=OURS, said="wrong\n")
    done = rolecall(serving, *arguments, secret=OURS, said=f"{FORMER}\n")
    assert done.startswith("Took over 2 keys, 0 secrets ")
    (data / "former").write_text(f"{FORMER}\n")
    again = ("--former", str(data / "former"))
    assert "nothing to do" in rolecall(serving, *arguments, *again, code=1, secret=OURS)
    started = _serve.start(data, "--demo", "--workers", "2", SECRET_KEY=OURS)
    try:
        with started.client() as client:
            for _ in range(6):
                assert client.get("/protected", headers=bearer(token)).status_code == 200
        assert "The chain holds." in rolecall(started, "audit", "verify", secret=OURS)
    finally:
        started.stop()


def refused_everywhere(client: httpx.Client, token: str) -> None:
    """Assert that no worker takes the token."""
    answers = [client.get("/protected", headers=bearer(token)) for _ in range(20)]
    assert {(one.status_code, one.json()["code"]) for one in answers} == {(401, "invalid_token")}


def login_by(client: httpx.Client, kid: str) -> str:
    """Sign in until every worker signs with ``kid``; return a token of it."""
    tokens: list[Any] = []

    def all_by_it() -> bool:
        tokens[:] = [client.post("/login", json=TESTUSER).json() for _ in range(6)]
        kids = {jwt.get_unverified_header(found["access_token"])["kid"] for found in tokens}
        return kids == {kid}

    wait_until(all_by_it)
    return str(tokens[0]["access_token"])
