"""Run a server of the peers' environment with Rolecall's own packages.

python -m benchmarks.borrow uvicorn|granian ARGUMENTS
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

# last, so that of what both have Rolecall's own locked version is taken
sys.path += map(str, Path(".venv/bench/lib").glob("python*/site-packages"))
MAINS = {"uvicorn": ("uvicorn.main", "main"), "granian": ("granian.cli", "entrypoint")}

if __name__ == "__main__":
    module, name = MAINS[sys.argv.pop(1)]
    getattr(import_module(module), name)()
