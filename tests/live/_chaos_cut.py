"""Changes of rights that are cut off half-way: by a kill, a stop, a hang, a full disk.

Whatever happens, a change was made or it was not, for everybody: after recovery all tokens of
before are refused, or all are accepted. Where the client was told that it is made (2xx), it is.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil

from tests.live._chaos import Scene, Tally
from tests.live._chaos_rights import CHANGES, Change, RightsLoad, Token

# A connection each, so that both workers are asked.
PROBES = 4
# Longer than two passes of whoever brings Redis up to date.
SETTLING_SECONDS = 1.2
# How long a transaction may be open before its commit.
LONG_SECONDS = 40.0
BEFORE, AFTER = "before-commit", "after-commit"


LONG = "worker killed after the commit of a long transaction"


async def _nothing(_scene: Scene) -> None: ...


@dataclass(frozen=True)
class Cut:
    """What happens at a fault point of `_chaos_app`, and how it is mended."""

    point: str
    strike: Callable[[Scene], Awaitable[None]] = _nothing
    mend: Callable[[Scene], Awaitable[None]] = _nothing


async def _stop_database(scene: Scene) -> None:
    assert scene.postgres is not None
    await asyncio.to_thread(scene.postgres.stop)


async def _start_database(scene: Scene) -> None:
    assert scene.postgres is not None
    await asyncio.to_thread(scene.postgres.start)


async def _hang_redis(scene: Scene) -> None:
    scene.redis.signal(signal.SIGSTOP)


async def _wake_redis(scene: Scene) -> None:
    scene.redis.signal(signal.SIGCONT)


async def _fill_disk(scene: Scene) -> None:
    if scene.postgres is not None:
        # its log cannot be written: it ends every connection and recovers by itself
        scene.postgres.limit_files(1)
    else:
        scene.limit_files(1)


async def _free_disk(scene: Scene) -> None:
    if scene.postgres is not None:
        await _start_database(scene)
    else:
        scene.limit_files(psutil.RLIM_INFINITY)


async def _linger(scene: Scene) -> None:
    # whoever looks only at what was recorded lately does not see it any more
    (scene.chaos / f"die-{AFTER}").touch()
    await asyncio.sleep(LONG_SECONDS)


CUTS = {
    "worker killed before the commit": Cut(f"die-{BEFORE}"),
    "worker killed after the commit": Cut(f"die-{AFTER}"),
    "database stopped before the commit": Cut(f"stall-{BEFORE}", _stop_database, _start_database),
    "database stopped after the commit": Cut(f"stall-{AFTER}", _stop_database, _start_database),
    "Redis hung before the commit": Cut(f"stall-{BEFORE}", _hang_redis, _wake_redis),
    "Redis hung after the commit": Cut(f"stall-{AFTER}", _hang_redis, _wake_redis),
    "no room on the disk at the commit": Cut(f"stall-{BEFORE}", _fill_disk, _free_disk),
    LONG: Cut(f"stall-{BEFORE}", _linger),
}
# It takes so long that one change is enough.
LONG_CHANGE = "a role changed"


def cuts_of(change: str, database: str) -> list[str]:
    """Return by what a change is cut off where ``database`` is in use."""
    names = [name for name in CUTS if database == "postgresql" or "database" not in name]
    return [name for name in names if name != LONG or change == LONG_CHANGE]


@dataclass
class Outcome:
    """What a cut left of a change: how many tokens of before were refused, how many accepted."""

    change: str
    cut: str
    database: str
    answer: int | None
    statuses: Counter[int | None] = field(default_factory=Counter)
    at_once: Counter[int | None] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)

    COLUMNS = ("change", "cut off by", "database", "answer", "then refused", "then accepted", "")

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        told = self.answer is not None and self.answer < 300
        if told and set(self.at_once) != {401}:
            found.append(f"after the 2xx tokens of before are answered {dict(self.at_once)}")
        if set(self.statuses) not in ({200}, {401}):
            found.append(f"neither made nor not made: {dict(self.statuses)}")
        elif told and set(self.statuses) != {401}:
            found.append("not made, but the client was told that it is")
        tally = self.tally
        if tally.revoked_accepted or tally.live_refused or tally.errors:
            found.append(f"afterwards: {dict(Counter(tally.notes))}")
        return found

    def cells(self) -> list[str]:
        """Return the row of the table."""
        refused, accepted = self.statuses[401], self.statuses[200]
        answer = "none" if self.answer is None else str(self.answer)
        return [
            self.change, self.cut, self.database, answer, str(refused), str(accepted),
            "; ".join(self.faults),
        ]  # fmt: skip


async def cut_off(scene: Scene, load: RightsLoad, name: str, by: str) -> Outcome:
    """Make a change, cut it off, mend it, see what came of it; undo the change."""
    cut, (change, undo) = CUTS[by], CHANGES[name](load.world)
    before = await _fresh_tokens(load)
    concerned = {number: before[number] for number in change.affects}
    load.reset()
    outcome = Outcome(name, by, scene.database, await _made(scene, load, change, cut))
    if change.answered is not None:
        outcome.at_once = await _statuses(load, concerned)
    await cut.mend(scene)
    await scene.healthy()
    await asyncio.sleep(SETTLING_SECONDS)
    outcome.statuses = await _statuses(load, concerned)
    # known now, so that the checker can tell of whatever follows
    if change.answered is None and set(outcome.statuses) == {401}:
        load.settle(change)
    elif change.answered is None:
        load.changes.remove(change)
    load.reset()  # what was unavailable in the midst is not counted
    await _go_on(load)
    assert await load.make(undo) == 200, f"{name}: it cannot be undone"
    await _go_on(load)
    outcome.tally = load.reset()
    return outcome


async def _fresh_tokens(load: RightsLoad) -> dict[int, Token]:
    """Return an access token of each holder, seen to be accepted."""
    found = {}
    for number, holder in enumerate(load.world.holders):
        await load.sign_in(number)
        if holder.is_narrowed and not holder.is_client:
            await load.renew(number)  # a sign-in knows no scope
        found[number] = holder.access[-1]
        assert await load.use(number, found[number]) == 200, f"{holder.name} is not let in"
    return found


async def _made(scene: Scene, load: RightsLoad, change: Change, cut: Cut) -> int | None:
    """Make a change with a cut in its midst; return its status."""
    point, stalled = scene.chaos / cut.point, scene.chaos / "stalled"
    point.touch()
    making = asyncio.create_task(load.make(change))
    async with asyncio.timeout(15):
        while point.exists():
            assert not making.done(), f"{await making}: nothing was written to `revocations`"
            await asyncio.sleep(0.005)
    if stalled.exists():
        await cut.strike(scene)
        stalled.unlink()
    return await making


async def _statuses(load: RightsLoad, tokens: dict[int, Token]) -> Counter[int | None]:
    probes = [load.status(token) for token in tokens.values() for _ in range(PROBES)]
    return Counter(await asyncio.gather(*probes))


async def _go_on(load: RightsLoad) -> None:
    """Let every holder refresh, and use what they got; the checker counts what is wrong."""
    for number, holder in enumerate(load.world.holders):
        if holder.refresh is None and not (holder.is_client and holder.access):
            await load.sign_in(number)
        await load.renew(number)
        for token in holder.access[-2:]:
            await load.use(number, token)
