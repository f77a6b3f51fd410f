"""`rolecall serve` as processes: the README's walk, deaths, and what operators get wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import SECRET, PostgresServer, bearer
from tests.live import _serve
from tests.live._serve import BIN, ROOT, Serving, free_port, wait_until

Start = Callable[..., Serving]


@pytest.fixture
def start() -> Iterator[Callable[..., Serving]]:
    """Start servers; those still running at the end are stopped."""
    started: list[Serving] = []

    def starting(*arguments: object, **options: object) -> Serving:
        started.append(_serve.start(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield starting
    for serving in started:
        serving.stop()


@pytest.fixture
def serving(start: Start, tmp_path: Path) -> Serving:
    """Two workers with the demo accounts, on SQLite and an embedded Redis."""
    return start(tmp_path, "--demo", "--workers", "2")


def login(client: httpx.Client, username: str = "testuser", password: str = "testpass") -> dict:
    """Return the tokens of a new session."""
    body = {"username": username, "password": password, "transport": "json"}
    response = client.post("/login", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_every_shell_line_of_the_readme_works(start: Start, tmp_path: Path) -> None:
    """The README's walk, pasted block by block, does what it says: the examples' lines too."""
    serving = start(tmp_path, "--demo", "--workers", "2")
    text = (ROOT / "README.md").read_text()
    walk = text[text.index("## A walk with curl") : text.index("## Guard your own routes")]
    script = "\n".join(re.findall(r"```sh\n(.*?)```", walk, re.DOTALL))
    script = script.replace("http://127.0.0.1:8000", serving.url)
    # installed already, here and not in the working folder, and on ports that are free
    script = script.replace("make .venv/dev", "").replace(".venv/bin", str(BIN))
    for port in ("5001", "5002", "5003"):
        script = script.replace(port, str(free_port()))
    environ = os.environ | serving.environ | {"ROLECALL_URL": serving.url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environ
    )
    serving.stop()
    statuses = re.findall(r"^HTTP/1.1 (\d+)", done.stdout, re.MULTILINE)
    walked = ["200", "403", "200", "401", "200", "403", "200"]
    examples = ["200", "200", "200", "200", "200", "401"]
    assert statuses == walked + examples, done.stdout + done.stderr
    assert '"code":"token_revoked"' in done.stdout
    assert '"code":"csrf_failed"' in done.stdout
    assert done.stdout.count('"username":"admin"') >= 1
    assert done.stdout.count('"token_type":"Bearer","expires_in":300,"scope":""') == 1


@pytest.mark.parametrize("by_dotenv", [False, True])
def test_secrets_are_handed_to_nobody_who_needs_none(
    start: Start, tmp_path: Path, by_dotenv: bool
) -> None:
    """The first admin's password reaches no worker and no redis-server, a key no Redis (58)."""
    mine = {
        "ROLECALL_ADMIN_USERNAME": "root", "ROLECALL_ADMIN_PASSWORD": "harbour-Lantern-42",
        "SECRET_KEY_OLD": "Zp3kW8vQ2nR5tXw9zB3fH6mP0sD4gL7y",
    }  # fmt: skip
    needed = {"SECRET_KEY": SECRET}
    others = {"SOME_API_TOKEN": "token-of-another-service"}
    given = mine | needed | (others if not by_dotenv else {})
    if by_dotenv:
        folder = tmp_path / "cwd"
        folder.mkdir()
        (folder / ".env").write_text("".join(f"{k}={v}\n" for k, v in given.items()))
        serving = start(tmp_path, "--workers", "2", cwd=folder)
    else:
        serving = start(tmp_path, "--workers", "2", **given)
    environs = {pid: psutil.Process(pid).environ() for pid in serving.workers()}
    assert len(environs) == 2
    redis = psutil.Process(serving.redis()).environ()
    for environ in (*environs.values(), redis):
        assert not mine.keys() & environ.keys()
        assert not [value for value in environ.values() if value in mine.values()]
    assert not {"SECRET_KEY", "DATABASE_URL", "REDIS_URL", "SOME_API_TOKEN"} & redis.keys()
    assert SECRET not in redis.values()
    for environ in environs.values():
        assert by_dotenv or environ["SECRET_KEY"] == SECRET
    with serving.client() as client:
        token = login(client, "root", "harbour-Lantern-42")["access_token"]
        assert client.get("/admin/users", headers=bearer(token)).status_code == 200
    # a worker that is started later gets no more
    os.kill(min(environs), signal.SIGKILL)
    wait_until(lambda: len(serving.workers()) == 2 and set(serving.workers()) != set(environs))
    for pid in serving.workers():
        assert not mine.keys() & psutil.Process(pid).environ().keys()
    assert serving.stop() == 0


def test_the_walk_on_postgresql(
    start: Start, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    """Two workers on PostgreSQL migrate it, seed it, and refuse a revoked token in both."""
    host = postgres_server.directory
    name = f"live_{os.getpid()}"
    subprocess.run(
        [BIN / "python", "-c", _CREATE, host, name], check=True, capture_output=True, text=True
    )
    url = f"postgresql://postgres@/{name}?host={host}"
    serving = start(tmp_path, "--demo", "--workers", "2", DATABASE_URL=url)
    with serving.client() as client:
        tokens = login(client)
        assert client.get("/protected", headers=bearer(tokens["access_token"])).status_code == 200
        again = client.post("/refresh", headers=bearer(tokens["refresh_token"]))
        assert again.status_code == 200, again.text
        client.post("/logout", headers=bearer(tokens["access_token"]))
        assert_refused_everywhere(serving, tokens["access_token"])
    assert serving.stop() == 0


_CREATE = """
import asyncio, asyncpg, sys
async def main():
    connection = await asyncpg.connect(host=sys.argv[1], user="postgres", database="postgres")
    await connection.execute(f"CREATE DATABASE {sys.argv[2]}")
    await connection.close()
asyncio.run(main())
"""


def assert_refused_everywhere(serving: Serving, token: str) -> None:
    """Ask over many new connections, so that every worker is asked."""
    with serving.client() as client:
        for _ in range(20):
            answer = client.get("/protected", headers=bearer(token))
            assert (answer.status_code, answer.json()["code"]) == (401, "token_revoked")


def test_a_logout_holds_in_every_worker_at_once(serving: Serving) -> None:
    """After the 2xx of a logout no worker accepts the token (property 41)."""
    with serving.client() as client:
        for _ in range(5):
            tokens = login(client)
            client.post("/logout", headers=bearer(tokens["access_token"]))
            assert_refused_everywhere(serving, tokens["access_token"])


@pytest.mark.parametrize("fault", ["flush", "kill", "hang"])
def test_redis_faults_let_nothing_in_and_shut_nobody_out(serving: Serving, fault: str) -> None:
    """Flushed, killed or hung: revoked stays revoked, live stays live, no 5xx (property 42)."""
    with serving.client() as client:
        revoked, live = login(client), login(client)
        client.post("/logout", headers=bearer(revoked["access_token"]))
        redis = serving.redis()
        if fault == "flush":
            sock = next((Path(serving.log.parent) / "data" / "redis").glob("redis.sock"), None)
            assert sock is not None
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(sock))
                raw.sendall(b"FLUSHALL\r\n")
                assert raw.recv(100) == b"+OK\r\n"
        else:
            os.kill(redis, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        try:
            for _ in range(3):
                assert_refused_everywhere(serving, revoked["access_token"])
                for _ in range(10):
                    found = client.get("/protected", headers=bearer(live["access_token"]))
                    assert found.status_code == 200, found.text
            fallen = login(client)
            out = client.post("/logout", headers=bearer(fallen["access_token"]))
            assert out.status_code == 200, out.text
            assert_refused_everywhere(serving, fallen["access_token"])
        finally:
            if fault == "hang":
                os.kill(redis, signal.SIGCONT)
        assert_refused_everywhere(serving, fallen["access_token"])
        assert_refused_everywhere(serving, revoked["access_token"])


def test_a_killed_worker_is_replaced(serving: Serving) -> None:
    """One of two workers killed: the other serves, and soon there are two again (property 56)."""
    before = serving.workers()
    os.kill(before[0], signal.SIGKILL)
    with serving.client() as client:
        for _ in range(20):
            assert client.get("/health/live").status_code == 200
    wait_until(lambda: len(serving.workers()) == 2 and before[0] not in serving.workers())
    assert serving.process.poll() is None


def test_a_killed_supervisor_leaves_nobody_behind(start: Start, tmp_path: Path) -> None:
    """kill -9 of the supervisor ends the workers and Redis, and the port is free (56, 57)."""
    port = free_port()
    serving = start(tmp_path, "--demo", "--workers", "2", port=port)
    children = psutil.Process(serving.process.pid).children()
    assert len(children) == 3
    serving.process.kill()
    serving.process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    again = start(tmp_path, "--demo", port=port)
    assert httpx.get(f"{again.url}/health/ready").json()["database"] == "ok"
    assert again.stop() == 0


def test_sigterm_lets_requests_in_flight_finish(serving: Serving) -> None:
    """Logins under way at SIGTERM are answered 200, and the exit code is 0 (property 55)."""
    statuses: list[int] = []

    def sign_in() -> None:
        body = {"username": "testuser", "password": "testpass", "transport": "json"}
        statuses.append(httpx.post(f"{serving.url}/login", json=body, timeout=20).status_code)

    threads = [threading.Thread(target=sign_in) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(statuses) >= 1)
    serving.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert serving.process.wait(30) == 0
    assert statuses == [200] * 8


def test_data_outlive_a_restart(start: Start, tmp_path: Path) -> None:
    """A revoked token stays revoked, and a live one live, over a restart."""
    port = free_port()
    serving = start(tmp_path, "--demo", port=port)
    with serving.client() as client:
        revoked, live = login(client), login(client)
        client.post("/logout", headers=bearer(revoked["access_token"]))
    assert serving.stop() == 0
    serving = start(tmp_path, "--demo", port=port)
    assert_refused_everywhere(serving, revoked["access_token"])
    answer = httpx.get(f"{serving.url}/protected", headers=bearer(live["access_token"]))
    assert answer.status_code == 200
    serving.stop()


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (("--demo",), {"SECRET_KEY": "short"}, "SECRET_KEY"),
        (("--demo",), {"DATABASE_URL": "mysql://x", "ROLECALL_WORKERS": "many"}, "DATABASE_URL"),
        (("--demo",), {"ROLECALL_DATA_DIR": "/dev/null/here"}, "ROLECALL_DATA_DIR"),
        (("--demo", "--bind", "0.0.0.0:0"), {}, "loopback"),
        ((), {"ROLECALL_ADMIN_USERNAME": "root"}, "ROLECALL_ADMIN_PASSWORD"),
        ((), {"ROLECALL_ADMIN_USERNAME": "a", "ROLECALL_ADMIN_PASSWORD": "password"}, "too weak"),
    ],
)
def test_what_an_operator_gets_wrong_is_one_clear_sentence(
    start: Start, tmp_path: Path, arguments: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    """Exit code 1, the reason by name, no traceback."""
    serving = start(tmp_path, *arguments, wait=False, **environ)
    assert serving.process.wait(30) == 1
    log = serving.log.read_text()
    assert said in log
    assert "Traceback" not in log
    assert "short" not in log.replace("shorter", "")


def test_a_taken_port_and_a_served_folder_are_said(start: Start, tmp_path: Path) -> None:
    """A second server on the port, or on the data folder, exits 1 and says which."""
    first = start(tmp_path, "--demo")
    port = int(first.url.rpartition(":")[2])
    folder = start(tmp_path, "--demo", wait=False)
    assert folder.process.wait(30) == 1
    taken = start(tmp_path / "other", "--demo", port=port, wait=False)
    assert taken.process.wait(30) == 1
    assert "ROLECALL_DATA_DIR" in folder.log.read_text()
    assert "--bind" in taken.log.read_text()
    assert "Traceback" not in folder.log.read_text() + taken.log.read_text()
    assert first.stop() == 0


def test_a_database_newer_than_the_code_is_refused(start: Start, tmp_path: Path) -> None:
    """A revision that this code does not know: one sentence, exit code 1."""
    import sqlite3

    serving = start(tmp_path, "--demo")
    assert serving.stop() == 0
    with sqlite3.connect(tmp_path / "data" / "rolecall.sqlite3") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    again = start(tmp_path, "--demo", wait=False)
    assert again.process.wait(30) == 1
    assert "9999" in again.log.read_text()
    assert "Traceback" not in again.log.read_text()


def test_the_command_line_works_beside_a_running_service(serving: Serving) -> None:
    """Users are made, given roles, logged out and disabled; each bites on the next request."""
    environ = os.environ | {"ROLECALL_DATA_DIR": str(serving.log.parent / "data")}

    def rolecall(*arguments: str, password: str = "") -> str:
        done = subprocess.run(
            [BIN / "rolecall", *arguments],
            input=password,
            capture_output=True,
            text=True,
            env=environ,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with serving.client() as client:
        assert "Made alice" in rolecall("users", "create", "alice", password="kumquat vienna 77\n")
        tokens = login(client, "alice", "kumquat vienna 77")
        headers = bearer(tokens["access_token"])
        assert client.get("/protected", headers=headers).status_code == 200
        rolecall("users", "set-roles", "alice", "user", "admin")
        assert client.get("/protected", headers=headers).json()["code"] == "token_stale"
        fresh = client.post("/refresh", headers=bearer(tokens["refresh_token"])).json()
        headers = bearer(fresh["access_token"])
        assert client.get("/admin/users", headers=headers).status_code == 200
        assert "Ended 1 sessions" in rolecall("users", "logout", "alice")
        assert client.get("/protected", headers=headers).json()["code"] == "token_revoked"
        rolecall("users", "deactivate", "alice")
        body = {"username": "alice", "password": "kumquat vienna 77"}
        assert client.post("/login", json=body).json()["code"] == "bad_credentials"
    assert "alice" in rolecall("users", "list")
    taken_in = serving.log.parent / "users.jsonl"
    taken_in.write_text('{"username": "bob", "password": "kumquat vienna 78"}\n{"username": 1}\n')
    refused = subprocess.run(
        [BIN / "rolecall", "users", "import", taken_in],
        capture_output=True, text=True, env=environ, cwd=ROOT,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "line 2: " in refused.stderr
    assert "Traceback" not in refused.stderr
    taken_in.write_text('{"username": "bob", "password": "kumquat vienna 78"}\n')
    assert "Made 1 users; 0 lines were bad." in rolecall("users", "import", str(taken_in))
    given_out = serving.log.parent / "out.jsonl"
    assert "Wrote 4 users" in rolecall("users", "export", str(given_out))
    assert given_out.stat().st_mode & 0o777 == 0o600
    assert given_out.read_text().count("argon2id") == 4
    assert "admin" in rolecall("roles", "list")
    assert "database   ok" in rolecall("check")
    status = rolecall("blocklist", "status")
    assert re.search(r"^entries +2 \(0 sessions, 0 tokens, 2 floors\)$", status, re.MULTILINE), (
        status
    )
    server, index = re.findall(r"^(?:server|index) +([0-9a-f]{40})$", status, re.MULTILINE)
    assert server == index
    assert re.search(r"^lease +trusted for [01]\.\d s more$", status, re.MULTILINE)
    assert "Loaded; 2 entries." in rolecall("blocklist", "rebuild")
    assert_refused_everywhere(serving, fresh["access_token"])
    assert "Forgot 0 entries." in rolecall("blocklist", "prune")
    ready = httpx.get(f"{serving.url}/health/ready").json()
    assert ready["status"] in {"ok", "degraded"}
    assert 0 <= ready["lag_seconds"] < 5
    assert serving.stop() == 0
    assert "away" in rolecall("blocklist", "status")


def test_users_can_be_imported_before_the_first_start(tmp_path: Path) -> None:
    """`db upgrade` makes the roles that an import speaks of."""
    users = tmp_path / "users.jsonl"
    users.write_text('{"username": "zoe", "password": "correct-Harbour-93", "roles": ["user"]}\n')
    environ = os.environ | {"ROLECALL_DATA_DIR": str(tmp_path / "data")}
    for command in (["db", "upgrade"], ["users", "import", str(users)]):
        done = subprocess.run(
            [BIN / "rolecall", *command], env=environ, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "Made 1 users; 0 lines were bad." in done.stdout
