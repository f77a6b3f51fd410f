"""Two nodes on one PostgreSQL: each a `rolecall serve` with a data folder and a port of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.running import postgresql
from tests._redis import RedisServer
from tests.live._proxy import Proxy, proxy_to
from tests.live._serve import BIN, Serving, start, wait_until

# Both nodes decrypt the same signing keys.
SECRET = "kJ8vQ2nR5tXw9zB3fH6mP0sD4gL7yC1e"
TRIES = 40
# By then whatever would accept a revoked token has had its time: leases, retries, reconnections.
WATCHED_SECONDS = 4.0
# How a node says that it reaches another Redis than the one that the database names.
SAYS_SO = re.compile(r"\bindex\b|another redis", re.IGNORECASE)


@dataclass
class Node:
    """One node, as clients reach it."""

    serving: Serving
    to_database: Proxy
    to_redis: Proxy | None = None

    def post(self, path: str, token: str = "", **more: Any) -> httpx.Response:
        """Send a POST on a connection of its own."""
        return self._ask("POST", path, token, **more)

    def status(self, token: str) -> int:
        """Return the status of a protected request."""
        return self._ask("GET", "/protected", token).status_code

    def ready(self) -> dict[str, Any]:
        """Return what readiness says."""
        return dict(self._ask("GET", "/health/ready").json())

    def check(self) -> str:
        """Return what `rolecall check` prints."""
        environ = os.environ | dict(self.serving.environ)
        done = subprocess.run(
            [BIN / "rolecall", "check"], env=environ, capture_output=True, text=True, timeout=30
        )
        return done.stdout + done.stderr

    def sign_in(self) -> dict[str, Any]:
        """Return the tokens of a new session."""
        body = {"username": "testuser", "password": "testpass", "transport": "json"}
        answer = self.post("/login", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def _ask(self, method: str, path: str, token: str = "", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{self.serving.url}{path}"
        return httpx.request(method, url, headers=headers, timeout=20, **more)


@contextmanager
def two_nodes(folder: Path, *, one_redis: bool) -> Iterator[list[Node]]:
    """Two nodes that reach the database, and Redis where they share it, by a proxy each."""
    with ExitStack() as stack:
        url = stack.enter_context(postgresql(folder / "pg"))
        socket = Path(url.rpartition("host=")[2]) / ".s.PGSQL.5432"
        redis = RedisServer(folder / "redis")
        if one_redis:
            redis.start()
            stack.callback(redis.stop)
        nodes = []
        for name in ("one", "two"):
            to_database = stack.enter_context(proxy_to(socket))
            environ: dict[str, Any] = {
                "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{to_database.port}/postgres",
                "SECRET_KEY": SECRET,
            }
            to_redis = None
            if one_redis:
                to_redis = stack.enter_context(proxy_to(redis.socket))
                environ["REDIS_URL"] = f"redis://127.0.0.1:{to_redis.port}"
            serving = start(folder / name, "--demo", **environ)
            stack.callback(serving.stop)
            nodes.append(Node(serving, to_database, to_redis))
        yield nodes


@pytest.fixture(scope="module")
def apart(short_tmp: Path) -> Iterator[list[Node]]:
    """Nodes with an embedded Redis each: the default."""
    (short_tmp / "apart").mkdir()
    with two_nodes(short_tmp / "apart", one_redis=False) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def together(short_tmp: Path) -> Iterator[list[Node]]:
    """Nodes with one Redis."""
    (short_tmp / "together").mkdir()
    with two_nodes(short_tmp / "together", one_redis=True) as nodes:
        yield nodes


@pytest.fixture(params=["apart", "together"])
def nodes(request: pytest.FixtureRequest) -> list[Node]:
    """Two nodes, in both ways."""
    found: list[Node] = request.getfixturevalue(request.param)
    return found


def _accepted_after_logout(here: Node, there: Node, tries: int) -> int:
    """Log out at one node, again and again; return how often the other accepted the token."""
    accepted = 0
    for _ in range(tries):
        tokens = here.sign_in()
        token = tokens["access_token"]
        assert there.status(token) == 200
        assert here.post("/logout", token).status_code == 200
        accepted += there.status(token) != 401
        accepted += there.post("/refresh", tokens["refresh_token"]).status_code != 401
    return accepted


def test_a_logout_at_one_node_holds_at_the_other_from_its_answer_on(nodes: list[Node]) -> None:
    """40 logouts each way, each followed by requests to the other node: none is accepted (84)."""
    one, two = nodes
    assert _accepted_after_logout(one, two, TRIES) == 0
    assert _accepted_after_logout(two, one, TRIES) == 0


def test_a_node_with_another_redis_than_the_index_says_so(apart: list[Node]) -> None:
    """One of both is the index; the other node's readiness or `rolecall check` says it is not."""
    said: list[str] = []

    def one_says_so() -> bool:
        said[:] = [f"{node.ready()} {node.check()}" for node in apart]
        return any(SAYS_SO.search(one) for one in said)

    with suppress(AssertionError):
        wait_until(one_says_so, 8)
    assert one_says_so(), said
    assert [node.ready()["status"] for node in apart].count("ok") == 1


def test_nodes_with_one_redis_are_both_ready(together: list[Node]) -> None:
    """Neither has anything to complain of."""
    wait_until(lambda: [node.ready()["status"] for node in together] == ["ok", "ok"])
    assert not any(SAYS_SO.search(str(node.ready().get("reason"))) for node in together)


def _statuses_for(seconds: float, nodes: list[Node], token: str) -> set[int]:
    """Ask both nodes for some seconds; return what they answered."""
    found = set()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found |= {node.status(token) for node in nodes}
    return found


def _agreed_on(token: str, nodes: list[Node]) -> set[int]:
    """Wait until the nodes answer alike, each having read what the other committed; then watch."""
    wait_until(lambda: len({node.status(token) for node in nodes}) == 1)
    return _statuses_for(1, nodes, token)


PARTITIONED = pytest.mark.parametrize(
    "silent", [True, False], ids=["packets are lost", "connections break"]
)


@PARTITIONED
def test_a_partition_lets_no_revoked_token_in(together: list[Node], silent: bool) -> None:
    """One node loses Redis, the other the database; a logout at the first is 503, or it holds.

    After a 2xx neither node accepts the token, during the partition (a 503 is allowed there) and
    after it. After a 503 it may be revoked or not, but alike at both once they are whole again.
    """
    one, two = together
    assert one.to_redis is not None
    token = one.sign_in()["access_token"]
    live = two.sign_in()["access_token"]
    assert (one.status(token), two.status(token)) == (200, 200)
    two.to_database.cut(silent=silent)
    time.sleep(1)  # it goes on by Redis alone
    one.to_redis.cut(silent=silent)
    try:
        answer = one.post("/logout", token)
        assert answer.status_code in {200, 503}, answer.text
        during = _statuses_for(WATCHED_SECONDS, together, token)
    finally:
        one.to_redis.mend()
        two.to_database.mend()
    if answer.status_code == 200:
        assert during <= {401, 503}, "a revoked token was accepted after the 2xx"
    wait_until(lambda: [node.ready()["status"] for node in together] == ["ok", "ok"])
    after = _agreed_on(token, together)
    assert after in ({200}, {401}), after
    assert answer.status_code == 503 or after == {401}
    assert _statuses_for(0.2, together, live) == {200}


@PARTITIONED
def test_a_node_whose_own_redis_hangs_lets_no_revoked_token_in(
    apart: list[Node], silent: bool
) -> None:
    """Its embedded Redis is stopped, the other node has lost the database: 503, or it holds."""
    one, two = apart
    token = one.sign_in()["access_token"]
    assert (one.status(token), two.status(token)) == (200, 200)
    two.to_database.cut(silent=silent)
    time.sleep(1)
    redis = one.serving.redis()
    os.kill(redis, signal.SIGSTOP)
    try:
        answer = one.post("/logout", token)
        assert answer.status_code in {200, 503}, answer.text
        during = _statuses_for(WATCHED_SECONDS, apart, token)
    finally:
        os.kill(redis, signal.SIGCONT)
        two.to_database.mend()
    if answer.status_code == 200:
        assert during <= {401, 503}, "a revoked token was accepted after the 2xx"
    wait_until(lambda: all(node.ready()["database"] == "ok" for node in apart))
    after = _agreed_on(token, apart)
    assert after in ({200}, {401}), after
    assert answer.status_code == 503 or after == {401}
