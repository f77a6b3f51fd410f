"""Every fault under load, in a short form; ``make chaos`` is the long one."""

from __future__ import annotations

import asyncio

import pytest

from tests.live._chaos import FAULTS, NEEDS_POSTGRESQL, Load, Row, forks, scene_on, trial

SECONDS = 0.8


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_fault_lets_a_revoked_token_in_or_shuts_a_live_one_out(database: str) -> None:
    """Two workers, six clients, one fault after the other, on one service (41 to 45, 55).

    What was revoked at any time before stays so, live tokens are accepted while the database can
    be read, nothing answers 500, and the service is healthy again by itself.
    """

    async def all_of_them() -> tuple[list[Row], int]:
        with scene_on(database) as scene:
            async with Load(scene.url) as load:
                await asyncio.sleep(SECONDS)
                rows = [
                    await trial(scene, load, name, SECONDS)
                    for name in FAULTS
                    if scene.postgres is not None or name not in NEEDS_POSTGRESQL
                ]
            return rows, await forks(scene.url, 2)

    rows, forked = asyncio.run(all_of_them())
    assert forked == 0, "one refresh token had two successors"
    for row in rows:
        tally = row.tally
        faulty = tally.revoked_accepted, tally.live_refused, tally.errors
        assert faulty == (0, 0, 0), f"{row.fault}: {tally.notes}"
        assert tally.revoked_asked > 10, f"{row.fault}: nothing was asked of the blocklist"
        if row.fault not in {"the database stopped", "SIGTERM and a new start"}:
            assert tally.unavailable == 0, f"{row.fault}: {tally.unavailable} answers of 503"
        if "killed" not in row.fault and "SIGTERM" not in row.fault:
            assert tally.dropped == 0, f"{row.fault}: {tally.dropped} requests dropped"
