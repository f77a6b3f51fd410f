"""Every fault under load, in a short form; ``make chaos`` is the long one."""

from __future__ import annotations

import asyncio

import pytest

from tests.live._chaos import EVICTIONS, Load, Row, faults_on, forks, scene_on, trial
from tests.live._chaos_cut import Outcome, cut_off
from tests.live._chaos_rights import CHANGES, RightsLoad, holders_of, trial_of_rights

SECONDS = 0.8
EVICTION_SECONDS = 0.6
RIGHTS_SECONDS = 0.4
# `make chaos` cuts off every change in every way.
CUT_OFF = {
    "sqlite": {
        "a user disabled": "worker killed after the commit",
        "a user logged out everywhere": "Redis hung before the commit",
        "a client app disabled": "no room on the disk at the commit",
    },
    "postgresql": {
        "the roles of a user changed": "database stopped before the commit",
        "a client app disabled": "database stopped after the commit",
        "a role changed": "no room on the disk at the commit",
    },
}
MAY_BE_UNAVAILABLE = {"the database stopped", "no room on the disk", "SIGTERM and a new start"}


def _inflicted(database: str, names: list[str], seconds: float) -> list[Row]:
    """Inflict faults one after the other; what must be zero after each is looked at."""

    async def all_of_them() -> tuple[list[Row], int]:
        with scene_on(database) as scene:
            async with Load(scene.url) as load:
                await asyncio.sleep(SECONDS)
                rows = [await trial(scene, load, name, seconds) for name in names]
            return rows, await forks(scene.url, 2)

    rows, forked = asyncio.run(all_of_them())
    assert forked == 0, "one refresh token had two successors"
    for row in rows:
        tally = row.tally
        faulty = tally.revoked_accepted, tally.live_refused, tally.errors
        assert faulty == (0, 0, 0), f"{row.fault}: {tally.notes}"
        assert tally.revoked_asked > 10, f"{row.fault}: nothing was asked of the blocklist"
    return rows


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_fault_lets_a_revoked_token_in_or_shuts_a_live_one_out(database: str) -> None:
    """Two workers, six clients, one fault after the other, on one service (41 to 45, 55).

    What was revoked at any time before stays so, live tokens are accepted while the database can
    be read, nothing answers 500, and the service is healthy again by itself.
    """
    names = [name for name in faults_on(database) if name not in EVICTIONS]
    for row in _inflicted(database, names, SECONDS):
        tally = row.tally
        if row.fault not in MAY_BE_UNAVAILABLE:
            assert tally.unavailable == 0, f"{row.fault}: {tally.unavailable} answers of 503"
        if "killed" not in row.fault and "SIGTERM" not in row.fault:
            assert tally.dropped == 0, f"{row.fault}: {tally.dropped} requests dropped"


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_eviction_lets_a_revoked_token_in(database: str) -> None:
    """A Redis that another application fills evicts keys, by every policy there is (42).

    The policy is set while the service runs, and set back afterwards.
    """
    for row in _inflicted(database, list(EVICTIONS), EVICTION_SECONDS):
        assert (row.tally.unavailable, row.tally.dropped) == (0, 0), row.fault


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_token_made_before_a_change_of_rights_is_accepted_after_it(database: str) -> None:
    """Two workers, holders of every kind, one change of rights after the other (80).

    From the 2xx of a change on, no token of before passes a guard for what was lost, at any later
    moment; refreshed ones say what is held now; sessions that live are never refused a refresh,
    and those that were ended stay so when the user or the client app is enabled again.
    """

    async def all_of_them() -> list[Row]:
        with scene_on(database) as scene:
            async with holders_of(scene) as world, RightsLoad(scene.url, world) as load:
                await asyncio.sleep(RIGHTS_SECONDS)
                return [
                    await trial_of_rights(scene, load, name, RIGHTS_SECONDS) for name in CHANGES
                ]

    for row in asyncio.run(all_of_them()):
        tally = row.tally
        faulty = tally.revoked_accepted, tally.live_refused, tally.errors
        assert faulty == (0, 0, 0), f"{row.fault}: {tally.notes}"
        assert tally.revoked_asked > 10, f"{row.fault}: no token of before was tried"
        assert (tally.unavailable, tally.dropped) == (0, 0), row.fault


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_change_that_is_cut_off_is_made_for_everybody_or_for_nobody(database: str) -> None:
    """A worker killed, a database stopped, a Redis that hangs, a full disk, at the commit (43, 80).

    Afterwards the tokens of before are all refused or all accepted; where the client got a 2xx,
    they are refused from then on.
    """

    async def all_of_them() -> list[Outcome]:
        with scene_on(database) as scene:
            async with holders_of(scene) as world, RightsLoad(scene.url, world, idle=True) as load:
                return [
                    await cut_off(scene, load, name, by) for name, by in CUT_OFF[database].items()
                ]

    for outcome in asyncio.run(all_of_them()):
        assert not outcome.faults, f"{outcome.change}, {outcome.cut}: {outcome.faults}"
