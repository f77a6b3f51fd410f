"""The audit log read, exported, and sealed into a chain that shows what was altered or removed.

Rows are sealed in the background, some at a time, so that no sign-in waits for another's. A digest
is an HMAC under a key of the service's: who can write to the database cannot make one.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
import structlog
from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database
from api.db.models import AuditEvent, AuditSeal
from api.services.paging import Page, after, page_of

log = structlog.get_logger("rolecall.audit")

ADVISORY_LOCK = 7_265_110
BATCH = 1_000
# A row with an earlier id may be committed after a later one. So long back is looked every time;
# everywhere (an import may take an hour, a clock may be wrong) only now and then.
EVERYWHERE_SECONDS = 600.0
OVERLAP = timedelta(seconds=60)
NOTHING = "0" * 64
Link = tuple[AuditSeal, AuditEvent | None]


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which rows: by who did it, what it was, to whom, and when (``since`` <= at < ``until``)."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A link that does not hold: ``what`` is ``altered``, ``removed`` or ``missing``."""

    seq: int
    event_id: UUID | None
    what: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``verify`` found: how many are sealed, until when, and how many are not yet."""

    sealed: int
    sealed_until: datetime | None
    head: str
    unsealed: int
    faults: list[Fault]


class AuditLog:
    """Reads of the log, and its seals."""

    def __init__(self, database: Database, secret: str) -> None:
        self._database = database
        self._look_everywhere_at = 0.0
        self._key = hashlib.sha256(b"rolecall audit log\0" + secret.encode()).digest()

    async def page(self, which: AuditFilter, limit: int, cursor: str | None) -> Page[AuditEvent]:
        """Return one page, the newest first."""
        query = after(_filtered(which), (AuditEvent.id,), cursor, scope=which, reverse=True)
        async with self._database.read() as session:
            rows = (await session.scalars(query.limit(limit + 1))).all()
        return page_of(rows, limit, scope=which, key=lambda row: (row.id,), present=lambda row: row)

    async def export(self, which: AuditFilter) -> AsyncIterator[Sequence[AuditEvent]]:
        """Yield all rows, the oldest first, a batch at a time: no transaction stays open."""
        last: UUID | None = None
        while True:
            query = _filtered(which).order_by(AuditEvent.id).limit(BATCH)
            if last is not None:
                query = query.where(AuditEvent.id > last)
            async with self._database.read() as session:
                rows = (await session.scalars(query)).all()
            if rows:
                yield rows
            if len(rows) < BATCH:
                return
            last = rows[-1].id

    async def seal(self, most: int = BATCH) -> int:
        """Seal up to ``most`` rows that are not yet; return how many. One process at a time."""
        everywhere = time.monotonic() >= self._look_everywhere_at
        async with self._database.read() as session:
            if not (await session.scalars(await _unsealed(session, 1, everywhere))).all():
                self._look_everywhere_at = self._next_look(everywhere)
                return 0
        async with self._database.write() as session:
            await self._database.one_at_a_time(session, ADVISORY_LOCK)
            rows = (await session.scalars(await _unsealed(session, most, everywhere))).all()
            head = await session.scalar(select(AuditSeal).order_by(AuditSeal.seq.desc()).limit(1))
            seq, digest = (head.seq, head.digest) if head else (0, NOTHING)
            for row in rows:
                seq, digest = seq + 1, self.digest(digest, row)
                session.add(AuditSeal(seq=seq, event_id=row.id, digest=digest))
        if rows:
            # what is written elsewhere shows a log that was cut off at its end
            log.info("audit_sealed", seq=seq, digest=digest)
        return len(rows)

    def _next_look(self, everywhere: bool) -> float:
        return time.monotonic() + EVERYWHERE_SECONDS if everywhere else self._look_everywhere_at

    async def verify(self) -> Verification:
        """Follow the chain from its beginning, and say where it does not hold."""
        faults: list[Fault] = []
        seq, digest, until = 0, NOTHING, None
        while batch := await self._links(seq):
            for seal, event in batch:
                faults += [Fault(number, None, "missing") for number in range(seq + 1, seal.seq)]
                broken = seal.seq != seq + 1
                if event is None:
                    faults.append(Fault(seal.seq, seal.event_id, "removed"))
                elif not broken and not hmac.compare_digest(
                    seal.digest, self.digest(digest, event)
                ):
                    faults.append(Fault(seal.seq, seal.event_id, "altered"))
                seq, digest = seal.seq, seal.digest
                until = event.at if event else until
        async with self._database.read() as session:
            total = await session.scalar(select(func.count()).select_from(AuditEvent)) or 0
            sealed = await session.scalar(
                select(func.count())
                .select_from(AuditEvent)
                .where(AuditEvent.id.in_(select(AuditSeal.event_id)))
            )
        return Verification(seq, until, digest, total - (sealed or 0), faults)

    async def _links(self, seq: int) -> list[Link]:
        async with self._database.read() as session:
            return await links(session, seq)

    def digest(self, before: str, event: AuditEvent) -> str:
        """Return the seal of ``event`` under our key, where the one before it is ``before``."""
        at = event.at.astimezone(UTC).isoformat(timespec="microseconds")
        said: list[Any] = [before, str(event.id), at, event.actor, event.action, event.target]
        said += [event.ip, event.request_id, event.detail]
        data = orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
        return hmac.new(self._key, data, hashlib.sha256).hexdigest()


async def links(session: AsyncSession, seq: int) -> list[Link]:
    """Return the seals after ``seq`` and what they cover, so many as are read at once."""
    query = (
        select(AuditSeal, AuditEvent)
        .outerjoin(AuditEvent, AuditEvent.id == AuditSeal.event_id)
        .where(AuditSeal.seq > seq)
        .order_by(AuditSeal.seq)
        .limit(BATCH)
    )
    return [(row[0], row[1]) for row in await session.execute(query)]


def earliest_id(moment: datetime) -> UUID:
    """Return the least UUIDv7 of a moment (RFC 9562 section 5.7)."""
    milliseconds = max(0, int(moment.timestamp() * 1000))
    return UUID(int=milliseconds << 80)


async def _unsealed(session: AsyncSession, most: int, everywhere: bool) -> Select[AuditEvent]:
    query = select(AuditEvent).order_by(AuditEvent.id).limit(most)
    if everywhere:
        return query.where(AuditEvent.id.not_in(select(AuditSeal.event_id)))
    newest = select(AuditSeal.event_id).order_by(AuditSeal.event_id.desc()).limit(1)
    last = await session.scalar(newest)
    if last is None:
        return query
    # many ids at once run ahead of the clock: what is newest may lie in the future
    newest_at = datetime.fromtimestamp((last.int >> 80) / 1000, UTC)
    since = min(newest_at, datetime.now(UTC)) - OVERLAP
    sealed = select(AuditSeal.event_id).where(AuditSeal.event_id >= earliest_id(since))
    return query.where(AuditEvent.id >= earliest_id(since), AuditEvent.id.not_in(sealed))


def _filtered(which: AuditFilter) -> Select[AuditEvent]:
    query = select(AuditEvent)
    for name in ("actor", "action", "target"):
        value = getattr(which, name)
        if value is not None:
            query = query.where(getattr(AuditEvent, name) == value)
    return query.where(*_between(which.since, which.until))


def _between(since: datetime | None, until: datetime | None) -> list[ColumnElement[bool]]:
    # ids sort by the clock of the process that made them: they narrow the search, `at` decides
    conditions: list[ColumnElement[bool]] = []
    if since is not None:
        conditions += [AuditEvent.at >= since, AuditEvent.id >= earliest_id(since - OVERLAP)]
    if until is not None:
        conditions.append(AuditEvent.at < until)
    return conditions
