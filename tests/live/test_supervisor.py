"""api.server as processes, with a bare application: signals, deaths, and what does not start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from api.server import SETTINGS, ServerError, listen, load_config

ROOT = Path(__file__).parents[2]


class Service:
    """A supervisor of ``_server_app`` as a process; ``url`` once it is ready."""

    def __init__(
        self, tmp: Path, bind: str, workers: int, config: str, env: dict[str, str]
    ) -> None:
        self.out = tmp / f"out-{time.monotonic_ns()}"
        path = tmp / "h.toml"
        path.write_text(config)
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.live._server_app", bind, str(workers), str(path)],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=os.environ | env,
            )

    @property
    def said(self) -> str:
        return self.out.read_text()

    @property
    def url(self) -> str:
        wait_until(lambda: "ready " in self.said or self.process.poll() is not None)
        return self.said.partition("ready ")[2].split()[0]

    @property
    def workers(self) -> set[int]:
        children = psutil.Process(self.process.pid).children()
        return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}

    def get(self, path: str, timeout: float = 10) -> httpx.Response:
        return httpx.get(self.url + path, timeout=timeout)


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start services that are killed when the test is over."""
    started: list[Service] = []

    def start(workers: int = 1, bind: str = "127.0.0.1:0", config: str = "", **env: str) -> Service:
        started.append(Service(tmp_path, bind, workers, config, env))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.kill()
        service.process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.02)


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except httpx.HTTPError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def port_of(service: Service) -> int:
    return int(service.url.rpartition(":")[2])


def is_refused(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_sigterm_answers_what_is_in_flight_and_refuses_what_is_new(start: Start) -> None:
    """SIGTERM: a request under way gets its 200, a new one no connection, exit code 0 (55)."""
    service = start()
    port = port_of(service)
    thread, results = in_background(lambda: service.get("/slow?2").status_code)
    time.sleep(0.5)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: is_refused(port), 1)
    assert thread.is_alive()
    thread.join()
    assert results == [200]
    assert service.process.wait(5) == 0


def test_requests_longer_than_the_grace_are_cut_off(start: Start) -> None:
    """They hold up neither the end nor the exit code, and are told that the outcome is unknown."""
    service = start(config="graceful_timeout = 1")
    assert service.url
    thread, results = in_background(lambda: service.get("/slow?30", 40))
    time.sleep(0.5)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(4) == 0
    thread.join()
    (answer,) = results
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == "unavailable"
    assert "it may have been done" in answer.json()["detail"]
    assert "Traceback" not in service.said


def test_a_second_sigint_ends_at_once(start: Start) -> None:
    """The first SIGINT waits for requests, the second for nobody; exit code 130."""
    service = start()
    assert service.url
    thread, _ = in_background(lambda: service.get("/slow?30", 40))
    time.sleep(0.5)
    service.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert service.process.poll() is None
    service.process.send_signal(signal.SIGINT)
    # well before the thirty seconds of the request
    assert service.process.wait(15) == 130
    thread.join()


def test_a_killed_worker_is_replaced_while_the_other_serves(start: Start) -> None:
    """kill -9 of one of two: every request after it is answered, and there are two again (56)."""
    service = start(workers=2)
    assert service.url
    before = service.workers
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):  # it may be gone already
        psutil.wait_procs([psutil.Process(victim)], 2)
    pids = {int(service.get("/pid").text) for _ in range(30)}
    assert victim not in pids
    wait_until(lambda: len(service.workers) == 2)
    assert victim not in service.workers
    assert "SIGKILL" in service.said
    assert service.said.count("ready") == 1


def test_a_request_that_kills_its_worker_does_not_end_the_service(start: Start) -> None:
    """A worker that dies of every request, many times over, is always replaced."""
    service = start()
    for _ in range(4):
        with contextlib.suppress(httpx.HTTPError):
            service.get("/die")
        assert service.get("/pid").status_code == 200
    assert service.process.poll() is None


def test_a_worker_that_cannot_be_replaced_leaves_the_other_alone(
    start: Start, tmp_path: Path
) -> None:
    """Two workers, one dead and its replacements failing to start: the other goes on serving."""
    fault = tmp_path / "fault"
    service = start(workers=2, FAIL_FILE=str(fault))
    assert service.url
    fault.touch()
    os.kill(min(service.workers), signal.SIGKILL)
    wait_until(lambda: service.said.count("the database is away") >= 5)
    assert service.get("/pid").status_code == 200
    fault.unlink()
    wait_until(lambda: len(service.workers) == 2)
    assert service.process.poll() is None


def test_with_no_worker_left_that_starts_it_gives_up(start: Start, tmp_path: Path) -> None:
    """The only worker dead and its replacements failing: exit code 1 in seconds, port free."""
    fault = tmp_path / "fault"
    service = start(FAIL_FILE=str(fault))
    port = port_of(service)
    fault.touch()
    os.kill(min(service.workers), signal.SIGKILL)
    assert service.process.wait(15) == 1
    assert is_refused(port)


@pytest.mark.parametrize("busy", ["idle", "stalled"])
def test_a_killed_supervisor_leaves_nobody_behind(start: Start, busy: str) -> None:
    """kill -9 of the supervisor ends the workers, a stalled one too; the port serves again (56)."""
    service = start(workers=2)
    port, workers = port_of(service), service.workers
    if busy == "stalled":
        in_background(lambda: service.get("/block"))
        time.sleep(0.5)
    service.process.kill()
    service.process.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, workers)), 2)
    assert is_refused(port)
    again = start(bind=f"127.0.0.1:{port}")
    assert again.get("/pid").status_code == 200


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("startup", "the database is away"),
        ("raise", "the lifespan raised"),
        ("import", "no such luck"),
    ],
)
def test_an_application_that_does_not_start_is_one_line(
    start: Start, fault: str, reason: str
) -> None:
    """Whatever the number of workers: one line with the reason, no traceback, exit code 1."""
    service = start(workers=3, FAIL=fault)
    assert service.process.wait(10) == 1
    assert service.said.count("\n") == 1
    assert reason in service.said


def test_a_taken_port_is_said(start: Start) -> None:
    """The message names the address and the setting; nothing is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        service = start(bind=bind)
        assert service.process.wait(10) == 1
        assert f"refused: {bind} is taken" in service.said
        assert "--bind" in service.said
        assert service.said.count("\n") == 1


@pytest.mark.parametrize(
    "bind", ["nonsense", "127.0.0.1:http", "127.0.0.1:99999", "256.0.0.1:80", "203.0.113.1:80"]
)
def test_an_address_that_cannot_be_is_refused(bind: str) -> None:
    """Each is a ServerError that names the address."""
    with pytest.raises(ServerError, match=bind):
        listen(bind)


def test_unix_sockets(start: Start, short_tmp: Path) -> None:
    """A stale socket is taken over, a served one is not, and the file goes with the service."""
    path = short_tmp / "s.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    service = start(bind=f"unix:{path}")
    assert service.url == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://it/pid").status_code == 200
    with pytest.raises(ServerError, match="taken"):
        listen(f"unix:{path}")
    service.process.terminate()
    assert service.process.wait(5) == 0
    assert not path.exists()


def test_slow_headers_are_cut_off(start: Start) -> None:
    """Headers dripped a byte at a time do not outlive keep_alive_timeout."""
    port = port_of(start(config="keep_alive_timeout = 1"))
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(0.2)
        began = time.monotonic()
        client.sendall(b"GET /pid HTTP/1.1\r\nHost: it\r\nX-Slow: ")
        while True:
            assert time.monotonic() - began < 3
            with contextlib.suppress(TimeoutError):
                try:
                    client.sendall(b"x")
                    if client.recv(1) == b"":
                        break
                except ConnectionError:
                    break


def test_a_folder_named_api_where_one_stands_is_not_imported(tmp_path: Path) -> None:
    """Workers import what the supervisor imports, not the `api` of the project one stands in."""
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "__init__.py").write_text("raise SystemExit('the wrong api')")
    script = (
        f"import sys; sys.path[0:0] = [{str(ROOT)!r}]; sys.argv[1:] = ['127.0.0.1:0', '1', ''];"
        "from tests.live._server_app import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready http")
        process.terminate()


def test_the_built_in_settings_are_those_of_the_file() -> None:
    """An installation without hypercorn.toml is served like one with it."""
    assert tomllib.loads((ROOT / "hypercorn.toml").read_text()) == dict(SETTINGS)


@pytest.mark.parametrize("text", ["graceful_timeout = ", "gracefull_timeout = 3"])
def test_settings_that_cannot_be_are_refused(tmp_path: Path, text: str) -> None:
    """Neither broken TOML nor a misspelt name passes in silence."""
    path = tmp_path / "hypercorn.toml"
    path.write_text(text)
    with pytest.raises(ServerError, match=r"hypercorn\.toml"):
        load_config(path)
