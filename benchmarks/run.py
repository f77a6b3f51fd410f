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
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.contestants import BENCH, CONTESTANTS, Contestant
from benchmarks.load import CONNECTIONS, Measured, Next, load
from benchmarks.running import (
    FIRST_PORT,
    LOAD_CORE,
    Running,
    environment,
    memory,
    message,
    once,
    prepare,
    started,
    tokens_of,
)  # fmt: skip
from benchmarks.work import FIRST_SIGHT, MANY, WORK, can

TOKENS = 10_000
OWN_VERSIONS = ("flask", "flask-jwt-extended", "hypercorn", "h11", "redis", "uvloop", "sqlalchemy")
BENCH_VERSIONS = (
    "fastapi", "fastapi-users", "flask", "flask-jwt-extended", "flask-security", "django",
    "django-ninja", "django-ninja-jwt", "pyjwt", "redis", "uvicorn", "hypercorn", "gunicorn",
    "granian", "uvloop", "httptools", "sqlalchemy",
)  # fmt: skip


def main() -> None:
    """Run the rounds; print and write what came of them."""
    arguments = _arguments()
    chosen = [c for c in CONTESTANTS if arguments.only.lower() in c.label.lower()]
    rounds, seconds = (2, 0.5) if arguments.quick else (5, 1.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcb-")))
        environ = environment(folder, stack)
        _prepare(chosen, environ)
        running = [
            stack.enter_context(started(one, FIRST_PORT + n, environ))
            for n, one in enumerate(chosen)
        ]
        os.sched_setaffinity(0, {int(LOAD_CORE) % (os.cpu_count() or 1)})
        for one in running:
            _sign_in(one, environ, 200 if arguments.quick else TOKENS)
        _refuse_revoked(running)
        results = _measure(running, rounds, seconds)
        mebibytes = {one.contestant.label: memory(one.process) for one in running}
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
            "memory_mib": mebibytes,
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


def _prepare(chosen: list[Contestant], environ: dict[str, str]) -> None:
    for module, python in {(c.module, c.python) for c in chosen if c.module}:
        prepare(str(module), python, environ)


def _sign_in(one: Running, environ: dict[str, str], count: int) -> None:
    contestant = one.contestant
    if contestant.is_limit:
        return
    minted = subprocess.run(
        [contestant.python, "-m", str(contestant.module), "mint", str(count)],
        env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    one.tokens = minted.stdout.split()
    one.token, _ = tokens_of(one, "testuser")
    one.admin, _ = tokens_of(one, "admin")
    if contestant.refresh:
        one.refresh = [tokens_of(one, "testuser")[1] for _ in range(CONNECTIONS)]
    for token in (one.token, one.tokens[0], one.tokens[-1]):
        status, answer = once(one.port, message(contestant, "GET", contestant.protected, token))
        if status != 200 or "testuser" not in answer["logged_in_as"]:
            raise SystemExit(f"{contestant.label}: a good token is answered {status} {answer}")
    status, answer = once(one.port, message(contestant, "GET", str(contestant.users), one.admin))
    people = answer["items"] if isinstance(answer, dict) else answer
    if status != 200 or len(people) != 50:
        raise SystemExit(f"{contestant.label}: the list is not of 50")
    status, _ = once(one.port, message(contestant, "GET", str(contestant.users), one.token))
    if status != 403:
        raise SystemExit(f"{contestant.label}: the list is shown to anybody ({status})")


def _refuse_revoked(running: list[Running]) -> None:
    """End the run unless everybody refuses a token that was just revoked, also under load."""
    for one in running:
        contestant = one.contestant
        if contestant.is_limit:
            continue
        token, _ = tokens_of(one, contestant.leaver)
        asking = message(contestant, "GET", contestant.protected, token)
        load(one.port, lambda _n, _b, r=asking: r, 0.2)  # type: ignore[misc]
        status, _ = once(one.port, message(contestant, "POST", contestant.logout, token))
        if status not in {200, 204}:
            raise SystemExit(f"{contestant.label}: logout answers {status}")
        load(one.port, lambda _n, _b, r=asking: r, 0.3, expected=b"401")  # type: ignore[misc]


def _measure(running: list[Running], rounds: int, seconds: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for work, make in WORK.items():
        able = [one for one in running if can(one.contestant, work)]
        nexts = [make(one) for one in able]
        warming = {
            one.contestant.label: _warmed(one, following, work, min(1.0, seconds))
            for one, following in zip(able, nexts, strict=True)
        }
        if work == MANY:
            results[FIRST_SIGHT] = {
                one.contestant.label: _summary([warming[one.contestant.label]])
                for one in able
                if one.tokens
            }
        found: dict[str, list[Measured]] = {one.contestant.label: [] for one in able}
        for _ in range(rounds):
            for one, following in zip(able, nexts, strict=True):
                found[one.contestant.label].append(load(one.port, following, seconds))
        results[work] = {label: _summary(measured) for label, measured in found.items()}
        print(f"measured: {work}", flush=True)
    return results


def _warmed(one: Running, following: Next, work: str, seconds: float) -> Measured:
    """Warm up; where there are many tokens, until each has been seen. Return the first round."""
    first = load(one.port, following, seconds)
    seen = first.count
    while work == MANY and seen < len(one.tokens):
        seen += load(one.port, following, seconds).count
    return first


def _summary(measured: list[Measured]) -> dict[str, float]:
    rates = [m.rate for m in measured]
    return {
        "rate": round(statistics.median(rates), 1),
        "least": round(min(rates), 1),
        "most": round(max(rates), 1),
        "p50": round(statistics.median(m.p50 for m in measured), 2),
        "p99": round(statistics.median(m.p99 for m in measured), 2),
    }


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
