"""What a protected request costs: Rolecall next to an empty ASGI application, same Hypercorn.

Servers on one core, the load on the other; rounds in turn; medians. Every answer is checked, and
before the end a revoked token must be refused under load. Prints a table, writes JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import Measured, load

ROUNDS = 5
SECONDS = 3.0
BIN = Path(sys.executable).parent
PORTS = {"empty": 18_081, "rolecall": 18_082}


def main() -> None:
    """Run the rounds and print the ratio of the medians."""
    with ExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(_server("empty", "benchmarks.empty:asgi", data))
        stack.enter_context(_server("rolecall", None, data))
        os.sched_setaffinity(0, {1 % (os.cpu_count() or 1)})
        tokens = _sign_in()
        requests = {
            "empty": _request("/", ""),
            "rolecall": _request("/protected", tokens["access_token"]),
        }
        for name in requests:
            asyncio.run(load(PORTS[name], requests[name], 1.0))
        measured: dict[str, list[Measured]] = {name: [] for name in requests}
        for _ in range(ROUNDS):
            for name, request in requests.items():
                measured[name].append(asyncio.run(load(PORTS[name], request, SECONDS)))
        _post("/logout", tokens["access_token"])
        asyncio.run(load(PORTS["rolecall"], requests["rolecall"], 1.0, b"401"))
    _report(measured)


def _report(measured: dict[str, list[Measured]]) -> None:
    rates = {name: statistics.median(m.rate for m in rounds) for name, rounds in measured.items()}
    print(f"{'':10} {'requests/s':>12} {'p50 ms':>8} {'p99 ms':>8}")
    for name, rounds in measured.items():
        p50, p99 = (statistics.median(getattr(m, p) for m in rounds) for p in ("p50", "p99"))
        print(f"{name:10} {rates[name]:12.0f} {p50:8.2f} {p99:8.2f}")
    ratio = rates["rolecall"] / rates["empty"]
    cost = (1 / rates["rolecall"] - 1 / rates["empty"]) * 1e6
    print(f"rolecall/empty: {ratio:.2f}; a protected request costs {cost:.0f} microseconds more")
    result = {"rates": rates, "ratio": ratio, "microseconds_more": cost}
    Path("benchmarks/protected.json").write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def _server(name: str, app: str | None, data: str) -> Iterator[None]:
    bind = f"127.0.0.1:{PORTS[name]}"
    if app:
        command = [str(BIN / "hypercorn"), "-c", "hypercorn.toml", "-b", bind, app]
    else:
        command = [str(BIN / "rolecall"), "serve", "--demo", "--bind", bind]
    environ = os.environ | {"ROLECALL_DATA_DIR": data}
    process = subprocess.Popen(
        ["taskset", "-c", "0", *command], env=environ, stdout=subprocess.DEVNULL
    )
    try:
        _wait(PORTS[name])
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def _wait(port: int) -> None:
    for _ in range(150):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=1).read()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"nothing answers on port {port}")


def _sign_in() -> Any:
    body = {"username": "testuser", "password": "testpass", "transport": "json"}
    return _post("/login", "", body)


def _post(path: str, token: str, body: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORTS['rolecall']}{path}",
        data=json.dumps(body or {}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        if token
        else {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def _request(path: str, token: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode()


if __name__ == "__main__":
    main()
