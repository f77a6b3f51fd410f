"""Rolecall beside its peers, in one go: the same work, the same machine, in turns.

    python -m benchmarks.run [--quick] [--only TEXT] [--publish]

Each server is one process on one core; the load, and Redis for all of them, are on the other. All
are warmed up alike; rounds go round the contestants; medians, and the least and most of the rounds.
Every answer is checked, and a revoked token must be refused by everybody, before and after.
Writes benchmarks/results.json; --publish writes docs/benchmark.json, .md and .svg from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report
from benchmarks.contestants import BENCH, CONTESTANTS, Contestant
from benchmarks.load import CONNECTIONS, Measured, Next, load
from tests._redis import RedisServer

SERVER_CORE, LOAD_CORE = "0", "1"
FIRST_PORT = 18_100
TOKENS = 10_000
MIX = {"protected": 90, "list": 5, "refresh": 4, "login": 1}
OWN_VERSIONS = ("flask", "flask-jwt-extended", "hypercorn", "h11", "redis", "uvloop", "sqlalchemy")
BENCH_VERSIONS = (
    "fastapi", "fastapi-users", "flask", "flask-jwt-extended", "flask-security", "django",
    "django-ninja", "django-ninja-jwt", "pyjwt", "redis", "uvicorn", "hypercorn", "gunicorn",
    "granian", "uvloop", "httptools", "sqlalchemy",
)  # fmt: skip


@dataclass
class Running:
    """A contestant that is up, with what its requests need."""

    contestant: Contestant
    port: int
    process: psutil.Popen
    cold_start: float
    tokens: list[str] = field(default_factory=list)
    token: str = ""
    admin: str = ""
    refresh: list[str] = field(default_factory=list)


def main() -> None:
    """Run the rounds; print and write what came of them."""
    arguments = _arguments()
    chosen = [c for c in CONTESTANTS if arguments.only.lower() in c.label.lower()]
    rounds, seconds = (2, 0.5) if arguments.quick else (5, 1.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcb-")))
        environ = _environ(folder, stack)
        _prepare(chosen, environ)
        running = [
            stack.enter_context(_started(one, FIRST_PORT + n, environ))
            for n, one in enumerate(chosen)
        ]
        os.sched_setaffinity(0, {int(LOAD_CORE) % (os.cpu_count() or 1)})
        for one in running:
            _sign_in(one, environ, 200 if arguments.quick else TOKENS)
        _refuse_revoked(running)
        results = _measure(running, rounds, seconds)
        memory = {one.contestant.label: _memory(one.process) for one in running}
        _refuse_revoked(running)
        found = {
            "when": time.strftime("%Y-%m-%d"),
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
            "rounds": rounds,
            "seconds": seconds,
            "connections": CONNECTIONS,
            "versions": _versions(),
            "lacks": {c.label: c.lacks for c in chosen if c.lacks},
            "work": results,
            "memory_mib": memory,
            "cold_start_seconds": {r.contestant.label: r.cold_start for r in running},
        }
    Path("benchmarks/results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report.text(found))
    if arguments.publish:
        report.publish(found, Path("docs"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run")
    parser.add_argument("--quick", action="store_true", help="half a second a round: a trial")
    parser.add_argument("--only", default="", help="those whose name or server has this text")
    parser.add_argument("--publish", action="store_true", help="write docs/benchmark.*")
    return parser.parse_args()


def _environ(folder: Path, stack: ExitStack) -> dict[str, str]:
    redis = RedisServer(folder / "redis")
    redis.start()
    stack.callback(redis.stop)
    return os.environ | {
        "BENCH_DATA": str(folder),
        "BENCH_REDIS": redis.url,
        "REDIS_URL": redis.url,
        "ROLECALL_DATA_DIR": str(folder / "rolecall"),
        "ROLECALL_LOG_LEVEL": "WARNING",
        "JWT_COOKIE_SECURE": "false",
        "JWT_ACCESS_TOKEN_EXPIRES": "3600",
    }


def _prepare(chosen: list[Contestant], environ: dict[str, str]) -> None:
    for module, python in {(c.module, c.python) for c in chosen if c.module}:
        print(f"preparing {module} ...", flush=True)
        subprocess.run([python, "-m", str(module), "prepare"], env=environ, check=True)


@contextmanager
def _started(one: Contestant, port: int, environ: dict[str, str]) -> Iterator[Running]:
    began = time.perf_counter()
    command = ["taskset", "-c", SERVER_CORE, *one.command.format(port=port).split()]
    process = psutil.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        while not _answers(port, one.protected):
            if process.poll() is not None or time.perf_counter() - began > 60:
                raise SystemExit(f"{one.label} does not start: {' '.join(command)}")
            time.sleep(0.02)
        yield Running(one, port, process, round(time.perf_counter() - began, 2))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except psutil.TimeoutExpired:
            process.kill()


def _answers(port: int, path: str) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).read()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


# --- The requests ---


def _request(
    one: Contestant,
    method: str,
    path: str,
    token: str = "",
    body: bytes = b"",
    kind: str = "json",
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: application/json"]
    if token:
        lines.append(one.header + token)
    if method == "POST":
        lines += [f"Content-Length: {len(body)}"]
    if body:
        form = "application/x-www-form-urlencoded"
        lines += [f"Content-Type: {form if kind == 'form' else 'application/json'}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _login_request(one: Contestant, name: str) -> bytes:
    assert one.login is not None
    body, kind = one.credentials(name), "form" if one.form else "json"
    return _request(one, "POST", one.login, "", body, kind)


def _once(port: int, request: bytes) -> tuple[int, Any]:
    """Send one request on a connection of its own."""
    method, path, _ = request.split(b" ", 2)
    head, _, body = request.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path.decode()}",
        data=body if method == b"POST" else None,
        headers=headers,
        method=method.decode(),
    )
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        return error.code, None


def _tokens_of(one: Running, name: str) -> tuple[str, str]:
    status, answer = _once(one.port, _login_request(one.contestant, name))
    if status != 200:
        raise SystemExit(f"{one.contestant.label}: login answers {status}")
    flat = answer.get("response", {}).get("user", {}) | answer
    return flat[one.contestant.field], flat.get("refresh_token") or flat.get("refresh") or ""


def _sign_in(one: Running, environ: dict[str, str], count: int) -> None:
    contestant = one.contestant
    if contestant.is_limit:
        return
    minted = subprocess.run(
        [contestant.python, "-m", str(contestant.module), "mint", str(count)],
        env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    one.tokens = minted.stdout.split()
    one.token, _ = _tokens_of(one, "testuser")
    one.admin, _ = _tokens_of(one, "admin")
    if contestant.refresh:
        one.refresh = [_tokens_of(one, "testuser")[1] for _ in range(CONNECTIONS)]
    for token in (one.token, one.tokens[0], one.tokens[-1]):
        status, answer = _once(one.port, _request(contestant, "GET", contestant.protected, token))
        if status != 200 or "testuser" not in answer["logged_in_as"]:
            raise SystemExit(f"{contestant.label}: a good token is answered {status} {answer}")
    status, answer = _once(one.port, _request(contestant, "GET", str(contestant.users), one.admin))
    people = answer["items"] if isinstance(answer, dict) else answer
    if status != 200 or len(people) != 50:
        raise SystemExit(f"{contestant.label}: the list is not of 50")
    status, _ = _once(one.port, _request(contestant, "GET", str(contestant.users), one.token))
    if status != 403:
        raise SystemExit(f"{contestant.label}: the list is shown to anybody ({status})")


def _refuse_revoked(running: list[Running]) -> None:
    """End the run unless everybody refuses a token that was just revoked, also under load."""
    for one in running:
        contestant = one.contestant
        if contestant.is_limit:
            continue
        token, _ = _tokens_of(one, contestant.leaver)
        asking = _request(contestant, "GET", contestant.protected, token)
        load(one.port, lambda _n, _b, r=asking: r, 0.2)  # type: ignore[misc]
        status, _ = _once(one.port, _request(contestant, "POST", contestant.logout, token))
        if status not in {200, 204}:
            raise SystemExit(f"{contestant.label}: logout answers {status}")
        load(one.port, lambda _n, _b, r=asking: r, 0.3, expected=b"401")  # type: ignore[misc]


# --- The work ---


def _same(one: Running) -> Next:
    request = _request(one.contestant, "GET", one.contestant.protected, one.token)
    return lambda _number, _last: request


def _different(one: Running) -> Next:
    if one.contestant.is_limit:
        return _same(one)
    paths = cycle(
        [_request(one.contestant, "GET", one.contestant.protected, t) for t in one.tokens]
    )
    return lambda _number, _last: next(paths)


def _login(one: Running) -> Next:
    request = _login_request(one.contestant, "testuser")
    return lambda _number, _last: request


def _refresh(one: Running) -> Next:
    contestant = one.contestant
    assert contestant.refresh is not None

    def following(number: int, last: bytes) -> bytes:
        if last and contestant.name == "Rolecall":
            one.refresh[number] = json.loads(last)["refresh_token"]
        token = one.refresh[number]
        if contestant.refresh_in_body:
            body = json.dumps({"refresh": token}).encode()
            return _request(contestant, "POST", str(contestant.refresh), "", body)
        return _request(contestant, "POST", str(contestant.refresh), token)

    return following


def _list(one: Running) -> Next:
    request = _request(one.contestant, "GET", str(one.contestant.users), one.admin)
    return lambda _number, _last: request


def _mix(one: Running) -> Next:
    """Each connection draws by the same seed; its refresh answers are kept for its next refresh."""
    kinds = {"protected": _different(one), "list": _list(one), "login": _login(one)}
    if one.contestant.refresh:
        kinds["refresh"] = _refresh(one)
    draws = [random.Random(n) for n in range(CONNECTIONS)]
    last_kind = [""] * CONNECTIONS

    def following(number: int, last: bytes) -> bytes:
        body = last if last_kind[number] == "refresh" else b""
        if body and one.contestant.name == "Rolecall":
            one.refresh[number] = json.loads(body)["refresh_token"]
        (kind,) = draws[number].choices(list(MIX), list(MIX.values()))
        kind = kind if kind in kinds else "protected"
        last_kind[number] = kind
        return kinds[kind](number, b"")

    return following


WORK: dict[str, Callable[[Running], Next]] = {
    "protected": _same,
    "protected, 10,000 tokens": _different,
    "login": _login,
    "refresh": _refresh,
    "list of 50": _list,
    "mix": _mix,
}


def _can(one: Contestant, work: str) -> bool:
    if one.is_limit:
        return work.startswith("protected")
    return work != "refresh" or one.refresh is not None


def _measure(running: list[Running], rounds: int, seconds: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for work, make in WORK.items():
        able = [one for one in running if _can(one.contestant, work)]
        nexts = [make(one) for one in able]
        for one, following in zip(able, nexts, strict=True):
            load(one.port, following, min(1.0, seconds))
        found: dict[str, list[Measured]] = {one.contestant.label: [] for one in able}
        for _ in range(rounds):
            for one, following in zip(able, nexts, strict=True):
                found[one.contestant.label].append(load(one.port, following, seconds))
        results[work] = {label: _summary(measured) for label, measured in found.items()}
        print(f"measured: {work}", flush=True)
    return results


def _summary(measured: list[Measured]) -> dict[str, float]:
    rates = [m.rate for m in measured]
    return {
        "rate": round(statistics.median(rates), 1),
        "least": round(min(rates), 1),
        "most": round(max(rates), 1),
        "p50": round(statistics.median(m.p50 for m in measured), 2),
        "p99": round(statistics.median(m.p99 for m in measured), 2),
    }


def _memory(process: psutil.Popen) -> float:
    """Return the MiB that the largest process of a server holds for itself and its share."""
    family = [process, *process.children(recursive=True)]
    return round(max(p.memory_full_info().pss for p in family) / 2**20, 1)


def _versions() -> dict[str, dict[str, str]]:
    asked = (
        f"import importlib.metadata as m; print({{n: m.version(n) for n in {BENCH_VERSIONS!r}}})"
    )
    theirs = subprocess.run(
        [BENCH / "python", "-c", asked], check=True, capture_output=True, text=True
    )
    return {
        "rolecall": {name: version(name) for name in OWN_VERSIONS},
        "peers": json.loads(theirs.stdout.replace("'", '"')),
    }


if __name__ == "__main__":
    sys.exit(main())
