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
from sqlalchemy import ColumnElement, Integer, Select, Uuid, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database
from api.db.models import AuditEvent, AuditSeal
from api.services.paging import Page, after, page_of

log = structlog.get_logger("rolecall.audit")

ADVISORY_LOCK = 7_265_110
BATCH = 1_000
# How many rows one statement reads while it searches for rows without a seal.
SLICE_ROWS = 20_000
# A row with an earlier id may be committed after a later one. The last OVERLAP of the log is
# searched all the time. The whole log (an import may take an hour, a clock may be wrong) is
# searched in slices, and again EVERYWHERE_SECONDS after that is done.
EVERYWHERE_SECONDS = 600.0
OVERLAP = timedelta(seconds=60)
NOTHING = "0" * 64
FIRST_ID, LAST_ID = UUID(int=0), UUID(int=(1 << 128) - 1)
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
        # where the next search begins; None for the beginning of the part that is searched
        self._recent: UUID | None = None
        self._everywhere: UUID | None = None
        self._everywhere_at = 0.0
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
        """Seal up to ``most`` rows that have no seal; return how many were sealed.

        One process at a time: where another one is at it, nothing is done, and 0 returned. Each
        call reads a bounded number of rows, and the next one continues where it stopped.
        """
        async with self._database.read() as session:
            if not await self._database.try_lock(session, ADVISORY_LOCK):
                return 0
            search = await self._search(session, 1)
        if search.unsealed:
            async with self._database.write() as session:
                if not await self._database.try_lock(session, ADVISORY_LOCK):
                    return 0
                search = await self._search(session, most)
                seq, digest = await self._add_seals(session, search.unsealed)
            if search.unsealed:
                # what is written elsewhere shows a log that was cut off at its end
                log.info("audit_sealed", seq=seq, digest=digest)
        self._continue_after(search)
        return len(search.unsealed)

    async def _add_seals(
        self, session: AsyncSession, rows: Sequence[AuditEvent]
    ) -> tuple[int, str]:
        head = await session.scalar(select(AuditSeal).order_by(AuditSeal.seq.desc()).limit(1))
        seq, digest = (head.seq, head.digest) if head else (0, NOTHING)
        for row in rows:
            seq, digest = seq + 1, self.digest(digest, row)
            session.add(AuditSeal(seq=seq, event_id=row.id, digest=digest))
        return seq, digest

    async def _search(self, session: AsyncSession, most: int) -> _Search:
        """Search one slice of the recent rows and, when it is due, one of all the others."""
        start = await _recent_start(session)
        unsealed, recent = await _search_slice(session, self._recent or start, LAST_ID, most)
        search = _Search(unsealed, recent, self._everywhere)
        is_due = self._everywhere is not None or time.monotonic() >= self._everywhere_at
        if is_due and len(unsealed) < most:
            more, search.everywhere = await _search_slice(
                session, self._everywhere or FIRST_ID, start, most - len(unsealed)
            )
            # the recent search may have begun before ``start``: no row twice
            search.unsealed = list({row.id: row for row in (*more, *unsealed)}.values())
            search.everywhere_done = search.everywhere is None
        return search

    def _continue_after(self, search: _Search) -> None:
        self._recent, self._everywhere = search.recent, search.everywhere
        if search.everywhere_done:
            self._everywhere_at = time.monotonic() + EVERYWHERE_SECONDS

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
        return Verification(seq, until, digest, await self._count_unsealed(), faults)

    async def _count_unsealed(self) -> int:
        count, after = 0, FIRST_ID
        while True:
            async with self._database.read() as session:
                until, more = await _slice_end(session, after, LAST_ID)
                of_slice = await session.scalar(COUNT_UNSEALED, {"after": after, "until": until})
            count += of_slice or 0
            if not more:
                return count
            after = until

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


@dataclass(slots=True)
class _Search:
    """Rows without a seal, and where the two searches continue (None: from the beginning)."""

    unsealed: Sequence[AuditEvent]
    recent: UUID | None
    everywhere: UUID | None
    everywhere_done: bool = False


async def _recent_start(session: AsyncSession) -> UUID:
    last = await session.scalar(NEWEST_SEALED)
    if last is None:
        return FIRST_ID
    # many ids at once run ahead of the clock: what is newest may lie in the future
    newest_at = datetime.fromtimestamp((last.int >> 80) / 1000, UTC)
    return earliest_id(min(newest_at, datetime.now(UTC)) - OVERLAP)


async def _search_slice(
    session: AsyncSession, after: UUID, until: UUID, most: int
) -> tuple[Sequence[AuditEvent], UUID | None]:
    """Return up to ``most`` unsealed rows of one slice, and where to continue; None at the end."""
    end, more = await _slice_end(session, after, until)
    found = {"after": after, "until": end, "most": most}
    rows = (await session.scalars(UNSEALED, found)).all()
    if len(rows) == most:
        return rows, rows[-1].id
    return rows, end if more else None


async def _slice_end(session: AsyncSession, after: UUID, until: UUID) -> tuple[UUID, bool]:
    """Return the last id of the slice after ``after``, and whether more follows up to ``until``."""
    end = await session.scalar(SLICE_END, {"after": after, "rows": SLICE_ROWS - 1})
    return (until, False) if end is None or end >= until else (end, True)


def _filtered(which: AuditFilter) -> Select[AuditEvent]:
    query = select(AuditEvent)
    for name in ("actor", "action", "target"):
        value = getattr(which, name)
        if value is not None:
            query = query.where(getattr(AuditEvent, name) == value)
    return query.where(*_between(which.since, which.until))


def _unsealed(*columns: Any) -> Select[Any]:
    """Select the rows of a slice that have no seal.

    An outer join, with both tables bounded by the slice. PostgreSQL has no good plan for NOT IN
    over a large table: it reads the whole subquery again for each row.
    """
    after, until = bindparam("after", type_=Uuid()), bindparam("until", type_=Uuid())
    of_slice = (AuditSeal.event_id > after) & (AuditSeal.event_id <= until)
    return (
        select(*columns)
        .select_from(AuditEvent)
        .outerjoin(AuditSeal, (AuditSeal.event_id == AuditEvent.id) & of_slice)
        .where(AuditEvent.id > after, AuditEvent.id <= until, AuditSeal.event_id.is_(None))
    )


NEWEST_SEALED = select(AuditSeal.event_id).order_by(AuditSeal.event_id.desc()).limit(1)
SLICE_END = (
    select(AuditEvent.id)
    .where(AuditEvent.id > bindparam("after", type_=Uuid()))
    .order_by(AuditEvent.id)
    .offset(bindparam("rows", type_=Integer))
    .limit(1)
)
UNSEALED = _unsealed(AuditEvent).order_by(AuditEvent.id).limit(bindparam("most", type_=Integer))
COUNT_UNSEALED = _unsealed(func.count())


def _between(since: datetime | None, until: datetime | None) -> list[ColumnElement[bool]]:
    # ids sort by the clock of the process that made them: they narrow the search, `at` decides
    conditions: list[ColumnElement[bool]] = []
    if since is not None:
        conditions += [AuditEvent.at >= since, AuditEvent.id >= earliest_id(since - OVERLAP)]
    if until is not None:
        # without the bound for ids, a page of long ago reads every newer row first
        conditions += [AuditEvent.at < until, AuditEvent.id < earliest_id(until + OVERLAP)]
    return conditions
