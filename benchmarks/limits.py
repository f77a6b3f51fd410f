"""One process of Rolecall at its limits, beside what limits it.

    python -m benchmarks.limits [login] [storm] [refresh] [idle]

Bare argon2 on as many threads; protected requests at rest; Keycloak's published figure; no idle
connections. Every answer's status is checked.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

from api.auth.passwords import Passwords
from benchmarks import work
from benchmarks.contestants import CONTESTANTS, PASSWORD
from benchmarks.figures import Figures, keep
from benchmarks.load import CONNECTIONS, Measured, load
from benchmarks.running import (
    FIRST_PORT,
    SERVER_CORE,
    Running,
    environment,
    family,
    memory,
    postgresql,
    prepare,
    started,
    tokens_of,
)  # fmt: skip

ROLECALL = next(one for one in CONTESTANTS if one.label == "Rolecall (hypercorn)")
ALL_CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))
ROUNDS = 5
SECONDS = 3.0
# Asking, in turn: fewer than a load, so that what is measured is no queue of their own.
FEW = 4
IDLE = 10_000
# https://www.keycloak.org/high-availability/multi-cluster/concepts-memory-and-cpu-sizing
KEYCLOAK_PER_VCPU = 120


@contextmanager
def _rolecall(
    *, cores: str = ALL_CORES, on_postgresql: bool = False, options: str = ""
) -> Iterator[Running]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcl-")))
        environ = environment(folder, stack)
        if on_postgresql:
            environ["DATABASE_URL"] = stack.enter_context(postgresql(folder / "pg"))
        prepare(str(ROLECALL.module), ROLECALL.python, environ)
        contestant = replace(ROLECALL, command=ROLECALL.command + options)
        one = stack.enter_context(started(contestant, FIRST_PORT, environ, cores))
        one.token, _ = tokens_of(one, "testuser")
        one.refresh = [tokens_of(one, "testuser")[1] for _ in range(CONNECTIONS)]
        yield one


def login() -> None:
    """Sign-ins beside the same argon2 in as many threads and nothing else."""
    with _rolecall() as one:
        load(one.port, work.login(one), 1)
        bare, served = [], []
        for _ in range(ROUNDS):
            bare.append(_bare(SECONDS))
            served.append(load(one.port, work.login(one), SECONDS).rate)
        ceiling, rate = statistics.median(bare), statistics.median(served)
    keep(
        "login",
        "Sign-ins beside bare argon2 of the same parameters in as many threads",
        {
            "argon2 alone, a second": round(ceiling, 1),
            "sign-ins, a second": round(rate, 1),
            "ratio": round(rate / ceiling, 2),
        },
    )


def _bare(seconds: float) -> float:
    hasher = Passwords().hasher
    hashed = hasher.hash(PASSWORD)
    began = time.perf_counter()

    def hashing(_thread: int) -> int:
        count = 0
        while time.perf_counter() - began < seconds:
            hasher.verify(hashed, PASSWORD)
            count += 1
        return count

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(hashing, range(threads))) / (time.perf_counter() - began)


def storm() -> None:
    """Protected requests at rest, and beside 32 connections that sign in over and over."""
    with _rolecall() as one:
        protected = work.same(one)
        load(one.port, protected, 1)
        rest, stormy = [], []
        for _ in range(ROUNDS):
            rest.append(load(one.port, protected, SECONDS, connections=FEW))
            # a process of its own, so that the one load does not wait for the other
            storming = multiprocessing.get_context("fork").Process(
                target=load, args=(one.port, work.login(one), SECONDS + 1)
            )
            storming.start()
            time.sleep(0.5)
            stormy.append(load(one.port, protected, SECONDS, connections=FEW))
            storming.join()
            if storming.exitcode != 0:
                raise SystemExit("a sign-in was refused in the storm")
    keep(
        "storm",
        "Protected requests at rest, and in a storm of sign-ins on 32 connections",
        _beside("at rest", rest, "in the storm", stormy),
    )


def refresh() -> None:
    """Refreshes a second on one core, and for each second of the processor."""
    found: Figures = {}
    for kind in ("SQLite", "PostgreSQL"):
        with _rolecall(cores=SERVER_CORE, on_postgresql=kind == "PostgreSQL") as one:
            load(one.port, work.refresh(one), 1)
            rates, per_second = [], []
            for _ in range(ROUNDS):
                before = _cpu(one)
                measured = load(one.port, work.refresh(one), SECONDS)
                rates.append(measured.rate)
                per_second.append(measured.count / (_cpu(one) - before))
        each = statistics.median(per_second)
        found |= {
            f"{kind}, a second": round(statistics.median(rates), 1),
            f"{kind}, for each second of its processor": round(each, 1),
            f"{kind}, times Keycloak's {KEYCLOAK_PER_VCPU}": round(each / KEYCLOAK_PER_VCPU, 1),
        }
    keep("refresh", "Refreshes on one core, beside what Keycloak publishes for a vCPU", found)


def _cpu(one: Running) -> float:
    times = [process.cpu_times() for process in family(one.process)]
    return sum(t.user + t.system for t in times)


def idle() -> None:
    """Protected requests beside connections that are kept alive and do nothing."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _rolecall(options=" --keep-alive 600") as one:
        protected = work.same(one)
        load(one.port, protected, 1)
        none = [load(one.port, protected, SECONDS, connections=FEW) for _ in range(ROUNDS)]
        before = memory(one.process)
        with ExitStack() as stack:
            lines = [HTTPConnection("127.0.0.1", one.port, timeout=10) for _ in range(IDLE)]
            for line in lines:
                stack.callback(line.close)
                _ask(line, one.token)
            after = memory(one.process)
            many = [load(one.port, protected, SECONDS, connections=FEW) for _ in range(ROUNDS)]
            for line in lines[::100]:
                _ask(line, one.token)
    found = _beside("with none", none, "beside them", many)
    found |= {"MiB with none": before, "MiB with them": after}
    keep("idle", f"Protected requests beside {IDLE:,} idle keep-alive connections", found)


def _ask(line: HTTPConnection, token: str) -> None:
    line.request("GET", "/protected", headers={"Authorization": f"Bearer {token}"})
    answer = line.getresponse()
    if answer.status != 200 or b"logged_in_as" not in answer.read():
        raise SystemExit(f"a connection that was idle was answered {answer.status}")


def _beside(one: str, few: list[Measured], other: str, many: list[Measured]) -> Figures:
    found: Figures = {}
    p99s = []
    for words, measured in ((one, few), (other, many)):
        for name, unit in (("rate", "a second"), ("p50", "p50 ms"), ("p99", "p99 ms")):
            median = statistics.median(getattr(m, name) for m in measured)
            found[f"{words}, {unit}"] = round(median, 2)
        p99s.append(median)
    return found | {"ratio of the p99": round(p99s[1] / p99s[0], 2)}


TRIALS = {trial.__name__: trial for trial in (login, storm, refresh, idle)}

if __name__ == "__main__":
    for name in sys.argv[1:] or TRIALS:
        TRIALS[name]()
