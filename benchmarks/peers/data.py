"""What every peer serves: the same people, in SQLite in the folder BENCH_DATA, and one Redis."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(os.environ.get("BENCH_DATA", "."))
REDIS_URL = os.environ.get("BENCH_REDIS", "redis://127.0.0.1:6379")
SECRET = "kJ8vQ2nR5tXw9zB3fH6mP0sD4gL7yC1e"
PEOPLE = [f"person{n:02}" for n in range(60)]
ACCESS_SECONDS = 3_600
# argon2id as Rolecall has it, wherever a peer lets its user choose
ARGON2 = {"time_cost": 2, "memory_cost": 19_456, "parallelism": 1}
