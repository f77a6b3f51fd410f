"""Keeping Redis complete: the lease, the replay of what has been committed, the rebuild."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import NoReturn, TypeVar

import structlog

from api.background import Background
from api.blocklist.ledger import Ledger, Subject, missed_rows
from api.blocklist.redis_index import LEASE_SECONDS, RedisIndex, RedisUntrusted, ServerState
from api.blocklist.registry import TIMEOUT_SECONDS, WorkerRegistry
from api.db import Database, sequence, snapshot
from api.db.snapshot import Snapshot
from api.errors import Unavailable

log = structlog.get_logger("rolecall.blocklist")

T = TypeVar("T")
TICK_SECONDS = 0.5
# For each look at the database: a lease must be extended long before it ends.
DATABASE_SECONDS = 0.6
# SQLite cannot fail over, and a long transaction of somebody's keeps a heartbeat waiting.
SQLITE_HEARTBEAT_SECONDS = 10.0
BATCH = 5_000
REBUILD_LOCK_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 30.0
# Less than our row counts: the last lease must have ended by then.
MAX_SECONDS_WITHOUT_DATABASE = TIMEOUT_SECONDS - 10 - LEASE_SECONDS
# A floor this far ahead of the clock is no number of ours.
LARGEST_LEAD_MILLISECONDS = 86_400_000
OTHER_INDEX = "another Redis server is the index of this database"


class Reconciler:
    """One a worker. ``tick`` is done twice a second."""

    def __init__(
        self, database: Database, index: RedisIndex, ledger: Ledger, registry: WorkerRegistry
    ) -> None:
        self._database = database
        self._index = index
        self._ledger = ledger
        self._registry = registry
        self._name = secrets.token_hex(8)
        self._background = Background(self.tick, TICK_SECONDS)
        self._pass_lock = asyncio.Lock()
        # the server and the hash that we keep complete, and what the database had at the last pass
        self._kept: tuple[str, str | None] | None = None
        self._seen: Snapshot | None = None
        # by this machine's own clock: the last heartbeat that the database took
        self._heartbeat_at = 0.0
        self.last: datetime | None = None

    def start(self) -> None:
        """Begin in the background."""
        self._background.start()

    async def stop(self) -> None:
        """End, and wait for the end."""
        await self._background.stop()
        self._index.stop()
        with suppress(Unavailable):
            await self._registry.unregister()

    async def tick(self) -> bool:
        """Do one pass; whatever is wrong with Redis or the database only closes the index.

        Return whether Redis was seen to be complete.
        """
        async with self._pass_lock:
            try:
                done = await self._pass()
            except asyncio.CancelledError:
                raise
            except Unavailable:
                log.warning("reconcile_without_database")
                return False
            except Exception as error:  # noqa: BLE001  a pass that fails closes the index, no more
                self._index.fail(error)
                done = False
            await self._untrust_if_closed()
            return done

    async def tell_others(self) -> None:
        """Tell the other workers that this one trusts no Redis, where that is so.

        A pass that goes on meanwhile does so at its end.
        """
        if not self._pass_lock.locked():
            async with self._pass_lock:
                await self._untrust_if_closed()

    async def _untrust_if_closed(self) -> None:
        if not self._index.is_open:
            try:
                await self._registry.untrust()
            except Unavailable:
                log.warning("reconcile_without_database")

    async def _pass(self) -> bool:
        state = await self._index.state()
        if state.evicts is not None:
            raise RedisUntrusted("may evict")
        try:
            return await self._complete(state)
        except Unavailable:
            if await self._extend_without_database():
                return False
            self._index.close("the database is away")
            raise

    async def _complete(self, state: ServerState) -> bool:
        """Bring Redis up to date and extend the lease; False where another worker is at it."""
        if self._registry.named != state.run_id or not self._keeps(state):
            self._index.close(self._index.reason or "another server")
            membership = await self._registry.register(state.run_id)
            # others must see at once that we keep the hash complete
            self._heartbeat_at = 0.0
            if not membership.may_trust:
                raise RedisUntrusted(OTHER_INDEX)
            state = await self._state_of(state.run_id)
            if not self._keeps(state) and state.build not in membership.builds:
                # nobody has kept it complete
                if not await self._rebuild(state):
                    return False
                state = await self._state_of(state.run_id)
        # by what the hash says itself: it may be an older copy, of a replica or a file
        before = snapshot.parse(state.snapshot or "")
        now = await _in_time(self._ledger.snapshot())
        if before is None or any(
            now.next_id < earlier.next_id for earlier in (before, self._seen) if earlier
        ):
            await self._start_again("the database went back in time")
        else:
            was_behind = await self._replay(before, now)
        if self._index.run_id != state.run_id:
            raise RedisUntrusted("another server")
        await self._catch_up_sequence(state)
        await self._heartbeat(str(state.build), now, is_due=was_behind)
        self._kept, self._seen = (state.run_id, state.build), now
        if not await self._index.lease(state, str(now)):
            return False
        self._index.open()
        self.last = datetime.now(UTC)
        return True

    async def _state_of(self, run_id: str) -> ServerState:
        state = await self._index.state()
        if state.run_id != run_id:
            raise RedisUntrusted("another server")
        return state

    def _keeps(self, state: ServerState) -> bool:
        """Return whether we keep this hash of this server complete."""
        return state.build is not None and self._kept == (state.run_id, state.build)

    async def _replay(self, before: Snapshot, now: Snapshot) -> bool:
        """Write the rows that ``now`` covers and ``before`` does not; return whether there were.

        A worker that was away for long has many: they are read in batches.
        """
        after: Subject | None = None
        condition = missed_rows(before, now)
        while batch := await _in_time(self._ledger.batch(after, BATCH, condition)):
            await self._index.load(batch)
            after = (batch[-1].kind, batch[-1].subject)
            if len(batch) < BATCH:
                break
        return after is not None

    async def _heartbeat(self, build: str, now: Snapshot, *, is_due: bool) -> None:
        """Record in the database how far Redis is complete."""
        began = _clock()
        often = self._database.dialect != "sqlite"
        if not (often or is_due) and began - self._heartbeat_at < SQLITE_HEARTBEAT_SECONDS:
            return
        if not await _in_time(self._registry.heartbeat(build, now)):
            await self._start_again("the registration was lost")
        self._heartbeat_at = began

    async def _start_again(self, reason: str) -> NoReturn:
        """Have Redis built anew: what it holds may be of another history of the database."""
        log.warning("index_discarded", reason=reason)
        self._kept = self._seen = None
        await self._index.forget()
        raise RedisUntrusted(reason)

    async def _extend_without_database(self) -> bool:
        """Extend the lease of a complete Redis: whoever revokes meanwhile waits for us."""
        state = await self._index.state()
        if not self._index.is_open or not self._keeps(state) or state.evicts is not None:
            return False
        held = snapshot.parse(state.snapshot or "")
        if held is None or self._seen is None or held.next_id < self._seen.next_id:
            return False  # an older copy
        if _clock() - self._heartbeat_at > MAX_SECONDS_WITHOUT_DATABASE:
            return False
        # what the hash says of itself stays as it is
        return await self._index.lease(state, str(held), extend_only=True)

    async def _catch_up_sequence(self, state: ServerState) -> None:
        """Advance the sequence to the highest floor in Redis.

        A failover may have lost the change that made it; without this, new tokens would be stale.
        """
        if state.highest > state.now + LARGEST_LEAD_MILLISECONDS:
            return
        if await _in_time(self._database.look(sequence.current)) < state.highest:
            async with self._database.write() as session:
                await sequence.advance_beyond(session, state.highest)

    async def _rebuild(self, state: ServerState) -> bool:
        """Write the whole ledger; False where another worker does, or Redis changed meanwhile."""
        if not await self._index.acquire_rebuild_lock(self._name, REBUILD_LOCK_SECONDS):
            self._index.close("being rebuilt")
            return False
        began, count, build = time.monotonic(), 0, secrets.token_hex(8)
        await self._index.begin_build(build)
        seen = await self._ledger.snapshot()
        async with self._kept_alive():
            batch = await self._ledger.batch(None, BATCH)
            while batch:
                count += len(batch)
                after = (batch[-1].kind, batch[-1].subject)
                # the next one is read while this one is written
                reading = asyncio.create_task(self._ledger.batch(after, BATCH))
                try:
                    await self._index.load(batch)
                except BaseException:
                    reading.cancel()
                    raise
                batch = await reading
                if not await self._index.extend_rebuild_lock(self._name, REBUILD_LOCK_SECONDS):
                    return False
                if count % (BATCH * 20) == 0:
                    log.info("rebuilding", entries=count)
        is_same = self._index.run_id == state.run_id
        if not is_same or not await self._index.end_build(build, str(seen)):
            return False
        await self._index.release_rebuild_lock()
        self._kept = (state.run_id, build)
        log.info("rebuilt", entries=count, seconds=round(time.monotonic() - began, 2))
        return True

    @asynccontextmanager
    async def _kept_alive(self) -> AsyncIterator[None]:
        """Keep our row from expiring: a rebuild of many millions takes longer than that."""
        background = Background(self._registry.keep_alive, KEEP_ALIVE_SECONDS)
        background.start()
        try:
            yield
        finally:
            await background.stop()


def _clock() -> float:
    """Return seconds that go on while the machine is suspended, where the system counts those."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


async def _in_time(look: Awaitable[T]) -> T:
    """Raise ``Unavailable`` where the database takes so long that a lease would end.

    A look that is given up ends by itself: closing its connection may take seconds.
    """
    task = asyncio.ensure_future(look)
    task.add_done_callback(_forget)
    try:
        async with asyncio.timeout(DATABASE_SECONDS):
            return await asyncio.shield(task)
    except TimeoutError:
        raise Unavailable from None
    finally:
        task.cancel()


def _forget(task: asyncio.Future[T]) -> None:
    if not task.cancelled():
        task.exception()
