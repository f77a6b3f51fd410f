"""What was taken back: the database is the truth, Redis the index that answers for it.

``transaction`` takes back, ``check`` asks. Never open: where neither can tell, ``Unavailable``.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from redis import asyncio as aioredis
from sqlalchemy.ext.asyncio import AsyncSession

from api import metrics
from api.blocklist.index import (
    LEASE_SECONDS,
    LIMIT_SECONDS,
    MARK,
    Cold,
    Index,
    client,
    floor_of,
)
from api.blocklist.ledger import Entry, Ledger, Row, Subject
from api.blocklist.recovery import Reconciler
from api.db import STATEMENT_SECONDS, Database
from api.shielding import finished
from api.together import Together

log = structlog.get_logger("rolecall.blocklist")

BATCH = 256
GENERAL_CONNECTIONS = 6
RETRY_SECONDS = 0.05
REBUILD_SECONDS = 600.0
# Redis's limit and the database's, and a little for the queue.
WAIT_SECONDS = 6.0


class Verdict(enum.Enum):
    """What the blocklist says of a token."""

    VALID = "valid"
    REVOKED = "revoked"
    STALE = "stale"


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

    ``entries`` of each kind in the ledger; ``epoch`` is the run id of the Redis server, trusted
    for ``lease_seconds`` more; every row recorded before ``complete_until`` (by the database's
    clock, ``lag_seconds`` ago) is in it. ``fault`` says why Redis could not tell.
    """

    entries: dict[str, int]
    epoch: str | None
    lease_seconds: float
    complete_until: datetime | None
    lag_seconds: int | None
    fault: str | None


class RevokingTransaction:
    """A write transaction, and what it takes back: published once it is committed."""

    def __init__(self, session: AsyncSession, ledger: Ledger) -> None:
        self.session = session
        self._ledger = ledger
        self.entries: list[Entry] = []

    async def revoke_token(self, jti: str, expires_at: datetime) -> None:
        """Refuse one token."""
        await self._record([Row("jti", jti, 0, expires_at)])

    async def revoke_session(self, sid: UUID | str, expires_at: datetime) -> None:
        """Refuse every token of a session."""
        await self.revoke_sessions({sid: expires_at})

    async def revoke_sessions(self, sessions: Mapping[Any, datetime]) -> None:
        """Refuse every token of some sessions: their ids, and when the last token expires."""
        await self._record([Row("sid", str(sid), 0, until) for sid, until in sessions.items()])

    async def raise_floor(self, user_id: UUID | str, version: int, expires_at: datetime) -> None:
        """Call a user's access tokens stale whose ``ver`` is under ``version``."""
        await self.raise_floors({user_id: version}, expires_at)

    async def raise_floors(self, versions: Mapping[Any, int], expires_at: datetime) -> None:
        """Do so for many users: their ids, and each one's version."""
        await self._record([Row("sub", str(u), v, expires_at) for u, v in versions.items()])

    async def _record(self, rows: Sequence[Row]) -> None:
        self.entries += await self._ledger.record(self.session, rows)


class Blocklist:
    """One a process, on one event loop."""

    def __init__(self, database: Database, redis_url: str, *, prefix: str = "rolecall:") -> None:
        self._database = database
        self._ledger = Ledger(database)
        self._index = Index(redis_url, prefix)
        self._reconciler = Reconciler(self._index, self._ledger)
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
        """Return what is known of a token. Raises ``Unavailable`` where nobody can tell.

        ``claims`` needs ``jti``, ``sid``, ``sub``, ``ver`` and ``type``; only an access token
        can be stale.
        """
        jti, sid, sub = ("jti", claims["jti"]), ("sid", claims["sid"]), ("sub", claims["sub"])
        found = await self._lookups.ask((jti, sid, sub))
        if jti in found or sid in found:
            return Verdict.REVOKED
        if claims["type"] == "access" and claims["ver"] < found.get(sub, 0):
            return Verdict.STALE
        return Verdict.VALID

    @asynccontextmanager
    async def transaction(
        self, seconds: float = STATEMENT_SECONDS
    ) -> AsyncIterator[RevokingTransaction]:
        """Open a write transaction; on leaving, commit, and only then tell Redis.

        When this returns no worker accepts what was taken back: Redis has it, or nobody trusts
        Redis any more. Run it inside ``shielding.finished``.
        """
        async with self._database.write(seconds) as session:
            taken = RevokingTransaction(session, self._ledger)
            yield taken
        if taken.entries:
            await finished(self._publish(taken.entries))

    async def _publish(self, entries: list[Entry]) -> None:
        committed = time.monotonic()
        while True:
            try:
                await self._index.publish(entries)
            except Exception as error:  # noqa: BLE001  whatever ails Redis, the lease runs out
                self._index.fail(error)
            else:
                return
            # whoever extends the lease has replayed these rows (or reaches Redis, and no database:
            # the double fault that docs/architecture.md tells of)
            if time.monotonic() - committed > LEASE_SECONDS + LIMIT_SECONDS:
                log.warning("published_by_lease", entries=len(entries))
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def prune(self, most: int) -> int:
        """Forget up to ``most`` entries whose tokens have all expired; return how many."""
        return await self._ledger.prune(most)

    def status(self) -> Status:
        """Return what this process knows without asking."""
        return Status(self._index.is_open, self._index.reason, self._reconciler.last)

    async def report(self) -> Report:
        """Ask the ledger and Redis how they stand. Raises ``Unavailable``; Redis may be away."""
        entries, now = await self._ledger.count(), await self._ledger.now()
        try:
            run_id, _ = await self._index.server()
            until = await self._index.complete_until(run_id)
            lease = await self._index.lease_left()
        except Exception as error:  # noqa: BLE001  whatever ails Redis is what is reported
            return Report(entries, None, 0.0, None, None, f"{type(error).__name__}: {error}")
        complete = datetime.fromtimestamp(until, UTC) if until else None
        return Report(entries, run_id, lease, complete, now - until if until else None, None)

    async def rebuild(self) -> None:
        """Let Redis go cold and load the whole ledger into it anew, here or in another worker.

        Raises what redis-py raises where Redis is away, ``TimeoutError`` where it goes away.
        """
        await self._index.forget()
        async with asyncio.timeout(REBUILD_SECONDS):
            while not await self._reconciler.tick():  # noqa: ASYNC110  another worker may be at it
                await asyncio.sleep(RETRY_SECONDS)

    async def _look_up_all(
        self, asked: list[tuple[Subject, Subject, Subject]]
    ) -> Sequence[dict[Subject, int]]:
        found = await self._look_up(list({subject for one in asked for subject in one}))
        return [found] * len(asked)

    async def _look_up(self, subjects: list[Subject]) -> dict[Subject, int]:
        try:
            values = await self._index.look_up(subjects)
            found = _read(subjects, values)
        except Cold:
            metrics.count_check(by_redis=False)
            return await self._ledger.look_up(subjects)
        metrics.count_check(by_redis=True)
        return found


def _read(subjects: list[Subject], values: list[bytes | None]) -> dict[Subject, int]:
    found: dict[Subject, int] = {}
    for subject, value in zip(subjects, values, strict=True):
        if value is None:
            continue
        floor = floor_of(value) if subject[0] == "sub" else 0
        if floor is None or (subject[0] != "sub" and value != MARK):
            log.error("garbage_in_redis", kind=subject[0])
            raise Cold("garbage")
        found[subject] = floor
    return found
