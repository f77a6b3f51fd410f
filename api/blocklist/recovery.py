"""Keeping Redis in step with the ledger: the lease, the replay, the rebuild."""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import UTC, datetime

import structlog

from api.background import Background
from api.blocklist.index import Index
from api.blocklist.ledger import Ledger
from api.errors import Unavailable

log = structlog.get_logger("rolecall.blocklist")

TICK_SECONDS = 0.5
# Longer than any transaction lives: a row that was recorded but not yet committed is seen later.
OVERLAP_SECONDS = 30
# A Redis that was away for longer is rebuilt, in batches.
REPLAYED_SECONDS = 300
BATCH = 5_000
TURN_SECONDS = 10.0


class Reconciler:
    """One a worker. ``tick`` is done twice a second, and at once after ``wake``."""

    def __init__(self, index: Index, ledger: Ledger) -> None:
        self._index = index
        self._ledger = ledger
        self._name = secrets.token_hex(8)
        self._background = Background(self.tick, TICK_SECONDS)
        self.last: datetime | None = None

    def start(self) -> None:
        """Begin in the background."""
        self._background.start()

    async def stop(self) -> None:
        """End, and wait for the end."""
        await self._background.stop()

    async def tick(self) -> bool:
        """Do one pass; whatever ails Redis or the database only makes Redis cold.

        Return whether Redis was seen to be complete.
        """
        try:
            return await self._pass()
        except asyncio.CancelledError:
            raise
        except Unavailable:
            log.warning("reconcile_without_database")
        except Exception as error:  # noqa: BLE001  a pass that fails leaves Redis cold, no more
            self._index.fail(error)
        return False

    async def _pass(self) -> bool:
        run_id, now = await self._index.server()
        until = await self._index.complete_until(run_id)
        if until is None or time.time() - until > REPLAYED_SECONDS:
            done = await self._rebuild(run_id)
        else:
            done = await self._replay(run_id, until, now)
        if done:
            self._index.open()
            self.last = datetime.now(UTC)
        return done

    async def _replay(self, run_id: str, until: int, since: int) -> bool:
        """Write the newest rows, then extend the lease from ``since``, Redis's time before it."""
        try:
            now = await self._ledger.now()
            await self._index.load(await self._ledger.recorded_since(until - OVERLAP_SECONDS))
        except Unavailable:
            # nothing can be committed now, so a Redis that was complete still is
            if self._index.is_open and await self._index.lease(run_id, since, until):
                return False
            raise
        if await self._index.lease(run_id, since, now):
            return True
        # that took longer than a lease stands: what came meanwhile is little
        here, since = await self._index.server()
        await self._index.load(await self._ledger.recorded_since(now - OVERLAP_SECONDS))
        return here == run_id and await self._index.lease(run_id, since, now)

    async def _rebuild(self, run_id: str) -> bool:
        """Write the whole ledger; False where another worker does, or Redis changed meanwhile."""
        if not await self._index.take_turn(self._name, TURN_SECONDS):
            return False
        began, count = time.monotonic(), 0
        now = await self._ledger.now()
        batch = await self._ledger.batch(None, BATCH)
        while batch:
            count += len(batch)
            after = (batch[-1].kind, batch[-1].subject)
            # the next one is read while this one is written
            _, batch = await asyncio.gather(
                self._index.load(batch), self._ledger.batch(after, BATCH)
            )
            if not await self._index.keep_turn(self._name, TURN_SECONDS):
                return False
            if count % (BATCH * 20) == 0:
                log.info("rebuilding", entries=count)
        here, since = await self._index.server()
        # what was recorded while it went on
        await self._index.load(await self._ledger.recorded_since(now - OVERLAP_SECONDS))
        if here != run_id:
            return False
        done = await self._index.lease(run_id, since, now, turn=self._name)
        await self._index.end_turn()
        log.info("rebuilt", entries=count, seconds=round(time.monotonic() - began, 2))
        return done
