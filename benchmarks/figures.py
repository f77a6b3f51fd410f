"""What a trial found: printed, kept in benchmarks/limits.json, published as docs/limits.*."""

from __future__ import annotations

import json
import time
from pathlib import Path

KEPT = Path("benchmarks/limits.json")
Figures = dict[str, float | str]


def keep(trial: str, claim: str, figures: Figures) -> None:
    """Print a trial's figures and keep them beside those of the others."""
    print(f"\n{claim}")
    for words, value in figures.items():
        print(f"  {words:58}{value:>12,}")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept[trial] = {"when": time.strftime("%Y-%m-%d"), "claim": claim, "figures": figures}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def publish(folder: Path) -> None:
    """Write limits.json and limits.md of what was kept."""
    kept = json.loads(KEPT.read_text())
    (folder / "limits.json").write_text(KEPT.read_text())
    head = (
        "# Rolecall at its limits\n\n"
        "`make limits` and `make growth`, on 2 cores that others share: compare within a table. "
        "Every answer is checked.\n"
    )
    parts = [head]
    for one in kept.values():
        rows = "\n".join(f"| {words} | {value:,} |" for words, value in one["figures"].items())
        parts.append(f"## {one['claim']}\n\n{one['when']}\n\n| | |\n|---|---:|\n{rows}\n")
    (folder / "limits.md").write_text("\n".join(parts))


if __name__ == "__main__":
    publish(Path("docs"))
