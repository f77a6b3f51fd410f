"""What a run found, as text, as Markdown and as a picture."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

LIMIT = "empty ASGI app (hypercorn)"
# On Hypercorn as it is, and as `rolecall serve` has it.
OWN = ("Rolecall (hypercorn)", "Rolecall (rolecall serve)")
FLASK = "Flask + flask-jwt-extended (hypercorn)"
FASTAPI = "FastAPI + PyJWT (hypercorn)"
TARGETS = (
    ("of the empty application's requests a second", LIMIT, 0.60),
    ("times Flask with flask-jwt-extended on Hypercorn", FLASK, 4.5),
    ("times FastAPI with PyJWT on Hypercorn", FASTAPI, 1.5),
)
ROW, LEFT, WIDTH = 26, 270, 720


def text(found: dict[str, Any]) -> str:
    """Return the tables for a terminal."""
    lines = []
    for work, rows in found["work"].items():
        lines.append(f"\n{work:42}{'req/s':>9}{'least':>9}{'most':>9}{'p50 ms':>9}{'p99 ms':>9}")
        for label, row in rows.items():
            numbers = "".join(f"{row[k]:9.1f}" for k in ("rate", "least", "most", "p50", "p99"))
            lines.append(f"{label:42}{numbers}")
    lines.append(f"\n{'':42}{'MiB':>9}{'start s':>9}")
    for label, mib in found["memory_mib"].items():
        lines.append(f"{label:42}{mib:9.1f}{found['cold_start_seconds'][label]:9.2f}")
    return "\n".join([*lines, "", *ratios(found)])


def ratios(found: dict[str, Any]) -> list[str]:
    """Return how a protected request of Rolecall compares, and with what it was to."""
    rows = found["work"]["protected"]
    return [
        f"{own}: {rows[own]['rate'] / rows[label]['rate']:.2f} {words} (aim: {aim})"
        for own in OWN
        for words, label, aim in TARGETS
        if own in rows and label in rows
    ]


def publish(found: dict[str, Any], folder: Path) -> None:
    """Write benchmark.json, benchmark.md and benchmark.svg."""
    (folder / "benchmark.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "benchmark.md").write_text(markdown(found))
    (folder / "benchmark.svg").write_text(svg(found["work"]["protected"]))


def markdown(found: dict[str, Any]) -> str:
    """Return the page of a run."""
    parts = [
        "# Rolecall beside its peers",
        _conditions(found),
        "![Protected requests a second](benchmark.svg)",
        "Protected requests:\n\n" + "\n".join(f"- {line}" for line in ratios(found)),
    ]
    for work, rows in found["work"].items():
        head = "| | requests/s | least | most | p50 ms | p99 ms |\n|---|" + "---:|" * 5
        body = "\n".join(
            f"| {label} | {r['rate']} | {r['least']} | {r['most']} | {r['p50']} | {r['p99']} |"
            for label, r in rows.items()
        )
        parts.append(f"## {work[0].upper()}{work[1:]}\n\n{head}\n{body}")
    start = found["cold_start_seconds"]
    parts.append(
        "## Memory and start\n\n| | MiB of the worker (PSS) | seconds to the first answer |\n"
        "|---|---:|---:|\n"
        + "\n".join(f"| {k} | {mib} | {start[k]} |" for k, mib in found["memory_mib"].items())
    )
    parts.append(
        "## What differs\n\n" + "\n".join(f"- {k}: {words}." for k, words in found["lacks"].items())
    )
    parts.append(
        "## Versions\n\n"
        + "\n".join(
            f"- {who}: " + ", ".join(f"{n} {v}" for n, v in names.items())
            for who, names in found["versions"].items()
        )
    )
    return "\n\n".join(parts) + "\n"


def _conditions(found: dict[str, Any]) -> str:
    return (
        f"`make bench` of {found['when']}: {found['machine']['cpus']} cores, Python "
        f"{found['machine']['python']}. Each server is one process on one core; the load "
        f"({found['connections']} keep-alive connections) and one Redis for all are on the other. "
        f"{found['rounds']} rounds of {found['seconds']:g} s, going round the contestants: "
        "medians, and the least and the most; one where each token comes for the first time. Every "
        "answer's status is checked, and before and after the run "
        "everybody had to refuse a token that was revoked under load. Passwords "
        "are argon2id (19 MiB, 2 passes, 1 lane) for all. The machine is noisy: compare within a "
        "table."
    )


def svg(rows: dict[str, dict[str, float]]) -> str:
    """Return bars of requests a second, with a line from the least to the most of the rounds."""
    most = max(row["most"] for row in rows.values())
    scale = (WIDTH - LEFT - 70) / most
    height = ROW * len(rows) + 10
    bars = []
    for n, (label, row) in enumerate(rows.items()):
        y = 8 + n * ROW
        kind = "own" if label.startswith("Rolecall") else "peer"
        least, top = (LEFT + row[k] * scale for k in ("least", "most"))
        width = row["rate"] * scale
        bars.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width:.1f}" height="18"/>'
            f'<path class="spread" d="M{least:.1f} {y + 9}H{top:.1f}"/>'
            f'<text x="{top + 6:.1f}" y="{y + 13}">{row["rate"]:.0f}</text>'
        )
    style = (
        "text{font:12px sans-serif;fill:#444}.own{fill:#2563eb}.peer{fill:#9ca3af}"
        ".spread{stroke:#111;stroke-width:1.5}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.spread{stroke:#eee}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>Protected requests a second, one core</title><style>{style}</style>"
        + "".join(bars)
        + "</svg>\n"
    )
