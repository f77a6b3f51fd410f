"""What requests that arrive together share, and what they must not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from api.errors import Unavailable
from api.together import Together


class Doubling:
    """Doubles numbers, once it is let go on; keeps the lots that it was given. Fails once."""

    def __init__(self) -> None:
        self.lots: list[list[int]] = []
        self.go_on = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, asked: list[int]) -> Sequence[int]:
        self.lots.append(asked)
        await self.go_on.wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        return [2 * number for number in asked]


def together(work: Doubling, *, seconds: float = 5) -> Together[int, int]:
    """At most four at once."""
    return Together(work, most=4, seconds=seconds)


async def ask_all(one: Together[int, int], count: int) -> list[asyncio.Task[int]]:
    """Ask with each number under ``count``, and let the first lot begin."""
    tasks = [asyncio.create_task(one.ask(number)) for number in range(count)]
    await asyncio.sleep(0.01)
    return tasks


async def test_each_caller_gets_its_own_answer() -> None:
    """Seven at once are lots of four and three; a late one joins the second."""
    work = Doubling()
    one = together(work)
    tasks = await ask_all(one, 7)
    late = asyncio.create_task(one.ask(100))
    await asyncio.sleep(0)
    work.go_on.set()
    assert await asyncio.gather(*tasks, late) == [0, 2, 4, 6, 8, 10, 12, 200]
    assert work.lots == [[0, 1, 2, 3], [4, 5, 6, 100]]


async def test_one_alone_waits_for_nobody() -> None:
    """There is no window of time in which a lot is gathered."""
    work = Doubling()
    work.go_on.set()
    one = together(work)
    assert [await one.ask(1), await one.ask(2)] == [2, 4]
    assert work.lots == [[1], [2]]


async def test_who_was_cancelled_leaves_the_others_alone() -> None:
    """In the lot that is looked after, and in the one that is gathered: it is not even asked."""
    work = Doubling()
    tasks = await ask_all(together(work), 8)
    tasks[1].cancel()
    tasks[6].cancel()
    await asyncio.sleep(0)
    work.go_on.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [a for a in answers if isinstance(a, int)] == [0, 4, 6, 8, 10, 14]
    assert work.lots == [[0, 1, 2, 3], [4, 5, 7]]


async def test_nobody_can_tell_is_said_to_those_behind_too() -> None:
    """``Unavailable`` after a time limit: the next lot would wait for the same. One each."""
    work = Doubling()
    tasks = await ask_all(together(work), 6)
    work.failure = failure = Unavailable("The database is away.")
    work.go_on.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(a) for a in answers] == [str(failure)] * 6
    assert len({id(a) for a in answers}) == 6
    assert work.lots == [[0, 1, 2, 3]]


async def test_another_error_is_that_of_its_lot() -> None:
    """Those behind are looked after."""
    work = Doubling()
    tasks = await ask_all(together(work), 5)
    work.failure = ValueError("no")
    work.go_on.set()
    for failed in tasks[:4]:
        with pytest.raises(ValueError, match="no"):
            await failed
    assert await tasks[4] == 8


async def test_a_caller_whom_nobody_answers_is_given_up() -> None:
    """Not even one that should never be: the caller gets Unavailable, not a hung request."""
    work = Doubling()
    one = together(work, seconds=0.05)
    with pytest.raises(Unavailable):
        async with asyncio.timeout(5):
            await one.ask(1)
    work.go_on.set()
    await one.stop()
    assert await one.ask(2) == 4


async def test_stopping_waits_for_what_is_being_done() -> None:
    """Nobody waits for it any more, and still it must not outlive the loop."""
    work = Doubling()
    one = together(work)
    (task,) = await ask_all(one, 1)
    task.cancel()
    stopping = asyncio.create_task(one.stop())
    await asyncio.sleep(0.01)
    assert not stopping.done()
    work.go_on.set()
    await stopping
