"""Work that requests which arrive together share: done once for all of them.

While one lot is being looked after the next gathers, so that the more there are the less each
costs, and one alone waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

from api.errors import Unavailable

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Together(Generic[Asked, Answer]):
    """One a process, on one event loop.

    ``work`` is given what up to ``most`` callers ask and returns an answer for each, in order;
    what it raises every one of them raises. It limits its own waiting; ``seconds`` is how long a
    caller waits at most, queueing included. A caller that is cancelled leaves the others alone,
    and the work goes on.
    """

    def __init__(
        self,
        work: Callable[[list[Asked]], Awaitable[Sequence[Answer]]],
        *,
        most: int,
        seconds: float,
    ) -> None:
        self._work = work
        self._most = most
        self._seconds = seconds
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Answer:
        """Join the lot that is gathered now. Raises ``Unavailable`` when nobody answers."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((asked, future))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._answer())
        # a tenth of what asyncio.timeout costs, on every request there is
        limit = loop.call_later(self._seconds, _give_up, future)
        try:
            return await future
        finally:
            limit.cancel()

    async def stop(self) -> None:
        """Let what is being done end: it must not outlive the loop."""
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=self._seconds)

    async def _answer(self) -> None:
        while self._waiting:
            # who has gone meanwhile is not looked after
            waiting = [one for one in self._waiting if not one[1].done()]
            lot, self._waiting = waiting[: self._most], waiting[self._most :]
            if not lot:
                return
            try:
                answers = await self._work([asked for asked, _ in lot])
            except Unavailable as error:
                # nobody can tell: those behind must not wait for the same, one lot after another
                lot, self._waiting = lot + self._waiting, []
                _fail((future for _, future in lot), error)
            except Exception as error:  # noqa: BLE001  every caller raises it
                _fail((future for _, future in lot), error)
            else:
                for (_, future), answer in zip(lot, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)


def _give_up(future: asyncio.Future[Answer]) -> None:
    if not future.done():
        future.set_exception(Unavailable())


def _fail(futures: Iterable[asyncio.Future[Answer]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            # one each: an exception that many raise gathers all their tracebacks
            one = Unavailable(error.detail) if isinstance(error, Unavailable) else error
            future.set_exception(one)
