"""What remembering verified access tokens costs in memory and in time.

    python -m benchmarks.remembered

20,000 genuine tokens, each of another user and session, read once by the JWT manager of an
application; then the time of reading one again, beside verifying it. Memory is what tracemalloc
counts, and what the resident set of a process of its own grows by.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from flask import Flask

from api.auth import keypairs, tokens
from api.auth.claims import AccessIdentity
from api.auth.tokens import RolecallJWTManager, mint_access
from api.db.models import new_id
from api.json import StrictJSON
from benchmarks.figures import Figures, keep

TOKENS = 20_000
ROUNDS = 5
SAFE = keypairs.Safe("benchmarks")
# What a token says of roles and permissions: of a user of a small service, and of an operator
# of one with many roles.
KINDS = {
    "a user": (("user",), ()),
    "an operator": (
        tuple(f"department-{n}" for n in range(8)),
        tuple(f"area-{n}:{verb}" for n in range(12) for verb in ("read", "write")),
    ),
}


class Ring:
    """A key ring with one key, which never changes."""

    changes = 0

    def __init__(self, kid: str, sealed: bytes) -> None:
        row: Any = SimpleNamespace(kid=kid, algorithm="EdDSA", private=sealed)
        self.current = SAFE.open(row)

    def find(self, kid: str) -> keypairs.Key | None:
        """Return the key."""
        return self.current if kid == self.current.kid else None


def application(kid: str, sealed: bytes) -> tuple[Flask, RolecallJWTManager]:
    """Return an application that mints and reads tokens, and needs no database."""
    app = Flask(__name__)
    app.json = StrictJSON(app)
    app.config.update(
        JWT_ALGORITHM="EdDSA",
        JWT_DECODE_ALGORITHMS=["EdDSA"],
        JWT_ENCODE_ISSUER="rolecall",
        JWT_DECODE_ISSUER="rolecall",
        JWT_ENCODE_AUDIENCE="rolecall",
        JWT_DECODE_AUDIENCE="rolecall",
        JWT_TOKEN_LOCATION=["headers", "cookies"],
    )
    ring: Any = Ring(kid, sealed)
    return app, tokens.install(app, ring)


def mint(kind: str, path: Path) -> None:
    """Write a key and access tokens, each of another user and session."""
    kid, sealed = SAFE.make("EdDSA")
    roles, permissions = KINDS[kind]
    with application(kid, sealed)[0].app_context():
        texts = [
            mint_access(
                AccessIdentity(
                    new_id(), new_id(), f"user{n:06}", roles, permissions, 1, by_cookie=True
                ),
                timedelta(hours=1),
                fresh=True,
            )
            for n in range(TOKENS)
        ]
    path.write_text("\n".join([kid, sealed.hex(), *texts]))


def measure(path: Path, what: str) -> dict[str, float]:
    """Read the tokens, and then some of them again; return what that took by name."""
    # each becomes a text that nobody keeps, as that of a request; nothing large is freed before
    # the resident set is looked at, for that would be used again
    kid, sealed, *raw = path.read_bytes().split(b"\n")
    app, manager = application(kid.decode(), bytes.fromhex(sealed.decode()))
    length = statistics.mean(map(len, raw))
    with app.app_context():
        gc.collect()
        if what == "traced":
            tracemalloc.start()
        before = psutil.Process().memory_info().rss
        took = _read_all(manager, raw)
        gc.collect()
        if what == "traced":
            return {"traced": tracemalloc.get_traced_memory()[0] / TOKENS}
        grown = (psutil.Process().memory_info().rss - before) / TOKENS
        random.Random(1).shuffle(raw)
        again = statistics.median(_read_all(manager, raw) for _ in range(ROUNDS))
    return {"length": length, "resident": grown, "verify": took, "recall": again}


def _read_all(manager: RolecallJWTManager, raw: list[bytes]) -> float:
    """Return how many microseconds it takes to read a token."""
    began = time.perf_counter()
    for text in raw:
        manager.read(text.decode())
    return (time.perf_counter() - began) / len(raw) * 1e6


def main() -> None:
    """Measure each kind in processes of their own, and keep the figures."""
    found: Figures = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokens"
            _process("mint", kind, str(path))
            each = {
                name: float(value)
                for what in ("traced", "resident")
                for name, value in json.loads(_process("measure", str(path), what)).items()
            }
        found |= {
            f"{kind}: bytes of the token": round(each["length"]),
            f"{kind}: bytes remembered, by tracemalloc": round(each["traced"]),
            f"{kind}: bytes remembered, by the resident set": round(each["resident"]),
            f"{kind}: us to verify and remember": round(each["verify"], 1),
            f"{kind}: us to recall": round(each["recall"], 1),
        }
    keep("remembered", f"{TOKENS:,} access tokens that are remembered, for each", found)


def _process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.remembered", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["mint", kind, path]:
            mint(kind, Path(path))
        case ["measure", path, what]:
            print(json.dumps(measure(Path(path), what)))
        case _:
            main()
