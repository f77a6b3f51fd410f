"""Every fault, every change of rights and every cut, as tables: ``make chaos``.

    python -m tests.live._chaos_all [SECONDS] [sqlite] [postgresql]

Exit code 1 where a number that must be zero is not.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence

import click

from tests.live._chaos import Load, Row, faults_on, forks, scene_on, trial
from tests.live._chaos_cut import Outcome, cut_off, cuts_of
from tests.live._chaos_rights import CHANGES, RightsLoad, holders_of, trial_of_rights

ROUNDS = 100


def _head(columns: Sequence[str]) -> None:
    click.echo("| " + " | ".join(columns) + " |")
    click.echo("|" + "---|" * len(columns))


def _show(row: Row) -> bool:
    """Print a row; return whether what must be zero is."""
    click.echo("| " + " | ".join(row.cells()) + " |")
    tally = row.tally
    for note, times in Counter(tally.notes).most_common(5):
        click.echo(f"  {times} x {note}", err=True)
    return not (tally.revoked_accepted or tally.live_refused or tally.errors)


async def faults(database: str, seconds: float) -> bool:
    """Inflict every fault on clients that sign in, refresh and log out."""
    with scene_on(database) as scene:
        async with Load(scene.url) as load:
            await asyncio.sleep(seconds)
            fine = [_show(await trial(scene, load, name, seconds)) for name in faults_on(database)]
        forked = await forks(scene.url, ROUNDS)
        click.echo(f"{database}: {ROUNDS} times 50 refreshes at once, {forked} forked")
    return all(fine) and not forked


async def rights(database: str, seconds: float) -> bool:
    """Change rights under those who hold them."""
    with scene_on(database) as scene:
        async with holders_of(scene) as world, RightsLoad(scene.url, world) as load:
            await asyncio.sleep(seconds)
            return all(
                [_show(await trial_of_rights(scene, load, name, seconds)) for name in CHANGES]
            )


async def cuts(database: str) -> bool:
    """Cut every change off in every way."""
    fine = True
    with scene_on(database) as scene:
        async with holders_of(scene) as world, RightsLoad(scene.url, world, idle=True) as load:
            for name in CHANGES:
                for by in cuts_of(name, database):
                    outcome = await cut_off(scene, load, name, by)
                    click.echo("| " + " | ".join(outcome.cells()) + " |")
                    fine = fine and not outcome.faults
    return fine


def main() -> None:
    """Print the tables."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 6.0
    databases = sys.argv[2:] or ["sqlite", "postgresql"]
    _head(Row.COLUMNS)
    fine = [asyncio.run(faults(database, seconds)) for database in databases]
    click.echo()
    _head(Row.COLUMNS)
    fine += [asyncio.run(rights(database, seconds)) for database in databases]
    click.echo()
    _head(Outcome.COLUMNS)
    fine += [asyncio.run(cuts(database)) for database in databases]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
