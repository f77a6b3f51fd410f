"""What was revoked: the database is the truth, Redis the index that answers for it.

``transaction`` revokes, ``check`` asks. Never open: where neither can tell, ``Unavailable``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from redis import asyncio as aioredis
from sqlalchemy.ext.asyncio import AsyncSession

from api import metrics
from api.blocklist.ledger import (
    CLIENT_ENDED,
    JTI,
    SID,
    USER_ENDED,
    Entry,
    Found,
    Key,
    Ledger,
    Subject,
)
from api.blocklist.reconciler import OTHER_INDEX, Reconciler
from api.blocklist.redis_index import LIMIT_SECONDS, RedisIndex, RedisUntrusted, client
from api.blocklist.registry import WorkerRegistry
from api.blocklist.verdict import Verdict, keys_of, verdict_of
from api.db import Database, sequence, snapshot
from api.errors import Unavailable
from api.shielding import finished
from api.together import Together

__all__ = ["OTHER_INDEX", "Blocklist", "Report", "RevokingTransaction", "Status", "Verdict"]

log = structlog.get_logger("rolecall.blocklist")

BATCH = 256
GENERAL_CONNECTIONS = 6
RETRY_SECONDS = 0.1
REBUILD_SECONDS = 600.0
# Redis's limit and the database's, and a little for the queue.
WAIT_SECONDS = 6.0
# How long a revocation waits until every worker knows of it: ten passes of theirs.
PUBLISH_SECONDS = 5.0
UNCONFIRMED = (
    "The change was committed, but a node may not know of it for up to five minutes. "
    "Repeat the request to have it confirmed."
)


@dataclass(frozen=True, slots=True)
class Status:
    """Whether requests ask Redis, why not, and when it was last seen to be complete."""

    is_warm: bool
    reason: str | None
    last_reconcile: datetime | None

    @property
    def lag_seconds(self) -> float | None:
        """How long ago that was."""
        last = self.last_reconcile
        return None if last is None else (datetime.now(UTC) - last).total_seconds()


@dataclass(frozen=True, slots=True)
class Report:
    """How the ledger and Redis stand.

    ``entries`` of each kind in the ledger; ``server`` is the run id of the Redis server that we
    reach, trusted for ``lease_seconds`` more, ``trusted`` are those that running workers trust.
    ``fault`` says why Redis could not tell.
    """

    entries: dict[str, int]
    trusted: frozenset[str]
    server: str | None
    lease_seconds: float
    fault: str | None

    @property
    def is_other_index(self) -> bool:
        """Whether running workers trust another server than the one we reach."""
        return bool(self.trusted) and self.server is not None and self.server not in self.trusted


@dataclass(slots=True)
class RevokingTransaction:
    """A write transaction, and what it revokes: published once it is committed."""

    session: AsyncSession
    entries: list[Entry] = field(default_factory=list)
    unconfirmed: list[Subject] = field(default_factory=list)
    unconfirmed_kinds: set[str] = field(default_factory=set)
    _sequence: int | None = None

    def revoke_token(self, jti: str, expires_at: datetime) -> None:
        """Refuse one token."""
        self._add(JTI, jti, 0, expires_at)

    def revoke_session(self, sid: UUID, expires_at: datetime) -> None:
        """Refuse every token of a session; ``expires_at`` is when the last one expires."""
        self._add(SID, str(sid), 0, expires_at)

    async def raise_floor(
        self, kind: str, subject: UUID | str, expires_at: datetime, *, exempt: UUID | None = None
    ) -> int:
        """Refuse every token below the number that the authorization sequence has from now on.

        ``kind`` is one of the ledger's floors, ``exempt`` a session that it does not concern.
        Return the number. Do it last: other changes of rights wait from here on.
        """
        if self._sequence is None:
            self._sequence = await sequence.advance(self.session)
        self._add(kind, str(subject), self._sequence, expires_at, exempt)
        return self._sequence

    def confirm(self, *subjects: Subject, kinds: Collection[str] = ()) -> None:
        """Wait, after the commit, until every worker knows of what was revoked before.

        For a change that is there already: its first request may have had no answer. ``kinds``
        are those of which everything is meant.
        """
        self.unconfirmed += subjects
        self.unconfirmed_kinds.update(kinds)

    def _add(
        self, kind: str, subject: str, floor: int, until: datetime, exempt: UUID | None = None
    ) -> None:
        session = str(exempt) if exempt is not None else None
        self.entries.append(Entry(kind, subject, floor, until.timestamp(), session))


class Blocklist:
    """One a process, on one event loop."""

    def __init__(self, database: Database, redis_url: str, *, prefix: str = "rolecall:") -> None:
        self._database = database
        self._ledger = Ledger(database)
        self._index = RedisIndex(redis_url, prefix)
        self._registry = WorkerRegistry(database)
        self._reconciler = Reconciler(database, self._index, self._ledger, self._registry)
        self._lookups = Together(self._look_up_all, most=BATCH, seconds=WAIT_SECONDS)
        # for whoever asks whether Redis is there at all
        self.redis: aioredis.Redis = client(redis_url, LIMIT_SECONDS, GENERAL_CONNECTIONS)

    async def start(self) -> None:
        """Begin keeping Redis in step; a Redis that is away does not hinder the start."""
        await self._reconciler.tick()
        self._reconciler.start()

    async def stop(self) -> None:
        """End it, and close the connections."""
        await self._reconciler.stop()
        await self._lookups.stop()
        await self._index.aclose()
        await self.redis.aclose()

    async def check(self, claims: Mapping[str, Any]) -> Verdict:
        """Return what is known of a token. Raises ``Unavailable`` where nobody can tell."""
        asked = keys_of(claims)
        return verdict_of(claims, asked, await self._lookups.ask(asked))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[RevokingTransaction]:
        """Open a write transaction; on leaving, commit, and only then tell Redis.

        When this returns no worker accepts what was revoked: the Redis that workers trust has it,
        or nobody trusts one. Run it inside ``shielding.finished``. Raises ``Unavailable`` where
        that cannot be confirmed: it is committed then, and may be repeated.
        """
        transaction_id, trusted, is_lost = 0, frozenset[str](), False
        async with self._database.write() as session:
            tx = RevokingTransaction(session)
            yield tx
            if tx.entries:
                transaction_id = await session.run_sync(snapshot.transaction_id)
                await self._ledger.record(session, tx.entries, transaction_id)
                trusted = await self._registry.trusted_within(session)
                is_lost = await self._registry.is_lost_within(session)
        if is_lost:
            await finished(self._discard_index())
        if tx.entries:
            await finished(self._publish(tx.entries, [transaction_id], trusted))
        if tx.unconfirmed or tx.unconfirmed_kinds:
            await self.publish_again(tx.unconfirmed, tx.unconfirmed_kinds)

    async def _discard_index(self) -> None:
        """Have nobody trust Redis: the database is another than the one it was filled from."""
        log.error("database_replaced")
        try:
            await self._index.forget()
        except Exception as error:
            self._index.fail(error)
            raise Unavailable(UNCONFIRMED) from error

    async def publish_again(
        self, subjects: Collection[Subject] = (), kinds: Collection[str] = ()
    ) -> None:
        """Return once every worker knows of what was revoked before, and of all of ``kinds``.

        The worker that revoked it may have died between the database and Redis. Raises
        ``Unavailable``.
        """
        entries, transaction_ids = await self._ledger.recorded(subjects, kinds)
        if entries:
            trusted = await self._registry.trusted()
            await finished(self._publish(entries, transaction_ids, trusted))

    async def confirm_revoked(self, claims: Mapping[str, Any]) -> None:
        """Return once every worker refuses a token that is revoked. Raises ``Unavailable``."""
        subjects = [(JTI, claims["jti"]), (SID, claims["sid"]), (USER_ENDED, claims["sub"])]
        if "client_id" in claims:
            subjects.append((CLIENT_ENDED, claims["client_id"]))
        await self.publish_again(subjects)

    async def _publish(
        self, entries: list[Entry], transaction_ids: list[int], trusted: frozenset[str]
    ) -> None:
        began, dead_are_removed = time.monotonic(), False
        while trusted:
            try:
                if trusted == {await self._index.publish(entries)}:
                    return
            except Exception as error:  # noqa: BLE001  whatever is wrong with Redis
                self._index.fail(error)
                await self._reconciler.tell_others()
            with suppress(Unavailable):
                if not dead_are_removed:
                    await self._registry.remove_dead_processes()
                    dead_are_removed = True
                if await self._is_known(transaction_ids, trusted):
                    return
            if time.monotonic() - began > PUBLISH_SECONDS:
                log.error("revocation_unconfirmed", entries=len(entries))
                raise Unavailable(UNCONFIRMED)
            await asyncio.sleep(RETRY_SECONDS)

    async def _is_known(self, transaction_ids: list[int], trusted: frozenset[str]) -> bool:
        for run_id in trusted:
            if not await self._registry.is_known_to(run_id, transaction_ids):
                return False
        return True

    async def prune(self, most: int) -> int:
        """Delete up to ``most`` entries whose tokens have all expired; return how many."""
        return await self._ledger.prune(most)

    async def sweep(self, most: int) -> int:
        """Look at some ``most`` entries in Redis, and remove those that have expired.

        Return ``most`` while there are more to look at; 0 where Redis cannot be asked.
        """
        if not self._index.is_open:
            return 0
        try:
            return await self._index.sweep(most)
        except Exception as error:  # noqa: BLE001  the next look at Redis tells what is wrong
            log.warning("sweep_failed", error=type(error).__name__)
            return 0

    def status(self) -> Status:
        """Return what this process knows without asking."""
        return Status(self._index.is_open, self._index.reason, self._reconciler.last)

    async def is_other_index(self) -> bool:
        """Return whether running workers trust another Redis server than the one we reach.

        False where we reach none. Raises ``Unavailable``.
        """
        trusted = await self._registry.trusted()
        try:
            state = await self._index.state()
        except Exception:  # noqa: BLE001  whatever is wrong with Redis is said elsewhere
            return False
        return bool(trusted) and state.run_id not in trusted

    async def report(self) -> Report:
        """Ask the ledger and Redis how they stand. Raises ``Unavailable``; Redis may be away."""
        entries, trusted = await self._ledger.count(), await self._registry.trusted()
        try:
            state = await self._index.state()
            lease = await self._index.lease_left()
        except Exception as error:  # noqa: BLE001  whatever is wrong with Redis is reported
            return Report(entries, trusted, None, 0.0, f"{type(error).__name__}: {error}")
        return Report(entries, trusted, state.run_id, lease, None)

    async def rebuild(self) -> None:
        """Have the whole ledger loaded into Redis anew, here or by another worker.

        Raises what redis-py raises where Redis is away, ``TimeoutError`` where it goes away.
        """
        await self._index.forget()
        async with asyncio.timeout(REBUILD_SECONDS):
            while not await self._reconciler.tick():  # noqa: ASYNC110  another worker may be at it
                await asyncio.sleep(RETRY_SECONDS)

    async def _look_up_all(self, asked: list[tuple[Key, ...]]) -> Sequence[Mapping[Key, Found]]:
        found = await self._look_up(list({key for one in asked for key in one}))
        return [found] * len(asked)

    async def _look_up(self, keys: list[Key]) -> dict[Key, Found]:
        try:
            found = await self._index.look_up(keys)
        except RedisUntrusted:
            metrics.count_check(by_redis=False)
            return await self._ledger.look_up(keys)
        metrics.count_check(by_redis=True)
        return found
