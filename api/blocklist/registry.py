"""Which Redis server is the index, as the workers agree on it in the database.

Every worker has a row that names the server it trusts. No two may trust different servers: who
finds another one named trusts none, and the database answers there. A revocation is complete once
the one server has it. Whoever cannot write to that server itself waits until a worker that can has
read the revocation from the database (the worker's ``snapshot`` covers it), or nobody trusts the
server any more.

A worker that has lost the database cannot be asked. It may go on trusting Redis for
``TIMEOUT_SECONDS``; for so long its row counts.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database, db_now, snapshot
from api.db.models import IndexWorker, table_of
from api.db.snapshot import Snapshot

# Any number, as long as every process takes the same one.
ADVISORY_LOCK = 7_265_111
# How long a row counts after its worker's last heartbeat.
TIMEOUT_SECONDS = 300
TABLE = table_of(IndexWorker)
COLUMNS = TABLE.c
ALIVE = COLUMNS.last_heartbeat_at > db_now(-TIMEOUT_SECONDS)
TRUSTED = select(COLUMNS.run_id).where(COLUMNS.run_id.is_not(None), ALIVE).distinct()


@dataclass(frozen=True, slots=True)
class Membership:
    """How this worker stands among the others.

    ``may_trust``: no other worker trusts another server. ``builds`` are the hashes that others
    trust on this server.
    """

    may_trust: bool
    builds: frozenset[str]


class WorkerRegistry:
    """The row of this worker, and what the rows of the others say."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._id = secrets.token_hex(16)
        self._heartbeats = 0
        # the server that our row names
        self._named: str | None = None
        self._is_listed = False

    @property
    def named(self) -> str | None:
        """The server that our row names."""
        return self._named

    async def remove_dead_processes(self) -> None:
        """Remove the rows of workers of this machine that exited without doing so themselves."""
        rows = await self._database.rows(select(COLUMNS.id, COLUMNS.host, COLUMNS.pid))
        ended = [row.id for row in rows if _is_dead(row.host, row.pid)]
        if ended:
            await self._database.run(
                lambda db: db.execute(delete(TABLE).where(COLUMNS.id.in_(ended)))
            )

    async def register(self, run_id: str) -> Membership:
        """Name ``run_id`` in our row, unless another worker trusts another server.

        What was committed before this is seen by whoever reads the ledger afterwards. Raises
        ``Unavailable``.
        """
        await self.remove_dead_processes()
        async with self._database.write() as session:
            # whoever revokes holds it shared: no other server becomes the index meanwhile
            await self._database.one_at_a_time(session, ADVISORY_LOCK)
            await session.execute(delete(TABLE).where(~ALIVE))
            others = await session.execute(
                select(COLUMNS.run_id, COLUMNS.build).where(
                    COLUMNS.id != self._id, COLUMNS.run_id.is_not(None), ALIVE
                )
            )
            rows = others.all()
            may_trust = all(row.run_id == run_id for row in rows)
            await self._write(session, run_id if may_trust else None)
        self._heartbeats += 1
        self._named = run_id if may_trust else None
        return Membership(may_trust, frozenset(row.build for row in rows if row.build))

    async def heartbeat(self, build: str, seen: Snapshot) -> bool:
        """Record that all that ``seen`` covers is in the hash ``build`` of the server we named.

        False where the row is not as we left it: the database went back in time, or the row has
        expired. Raises ``Unavailable``.
        """
        # more heartbeats than we counted: the answer to one was lost
        as_left = (COLUMNS.id == self._id) & (COLUMNS.heartbeats >= self._heartbeats) & ALIVE
        query = (
            update(TABLE)
            .where(as_left, COLUMNS.run_id == self._named)
            .values(
                build=build,
                snapshot=str(seen),
                heartbeats=COLUMNS.heartbeats + 1,
                last_heartbeat_at=db_now(),
            )
            .returning(COLUMNS.heartbeats)
        )
        heartbeats = await self._database.run(lambda db: db.execute(query).scalar_one_or_none())
        if heartbeats is None:
            self._named = None
            return False
        self._heartbeats = heartbeats
        return True

    async def keep_alive(self) -> None:
        """Keep our row from expiring. Raises ``Unavailable``."""
        query = update(TABLE).where(COLUMNS.id == self._id).values(last_heartbeat_at=db_now())
        await self._database.run(lambda db: db.execute(query))

    async def untrust(self) -> None:
        """Name no server any more. Raises ``Unavailable``: then it is to be done again."""
        if self._named is not None:
            query = update(TABLE).where(COLUMNS.id == self._id).values(run_id=None, snapshot=None)
            await self._database.run(lambda db: db.execute(query))
            self._named = None

    async def unregister(self) -> None:
        """Remove our row, for good. Raises ``Unavailable``."""
        if self._is_listed:
            query = delete(TABLE).where(COLUMNS.id == self._id)
            await self._database.run(lambda db: db.execute(query))
            self._is_listed, self._named = False, None

    async def trusted_within(self, session: AsyncSession) -> frozenset[str]:
        """Return the servers that workers trust; none becomes another until the caller commits."""
        await self._database.one_at_a_time(session, ADVISORY_LOCK, shared=True)
        return frozenset(await session.scalars(TRUSTED))

    async def is_lost_within(self, session: AsyncSession) -> bool:
        """Return whether our row is not as we left it: the database was replaced by another copy.

        Nothing that rows say is true then: the others may trust a server all the same.
        """
        if self._named is None:
            return False
        as_left = (COLUMNS.id == self._id) & (COLUMNS.heartbeats >= self._heartbeats) & ALIVE
        return await session.scalar(select(COLUMNS.id).where(as_left)) is None

    async def trusted(self) -> frozenset[str]:
        """Return the servers that workers trust. Raises ``Unavailable``."""
        return frozenset(row.run_id for row in await self._database.rows(TRUSTED))

    async def is_known_to(self, run_id: str, transaction_ids: Iterable[int]) -> bool:
        """Return whether the server has what they revoked, or nobody trusts it any more.

        Raises ``Unavailable``.
        """
        query = select(COLUMNS.snapshot).where(COLUMNS.run_id == run_id, ALIVE)
        rows = await self._database.rows(query)
        seen = [snapshot.parse(row.snapshot or "") for row in rows]
        return not rows or any(
            one is not None and all(one.covers(each) for each in transaction_ids) for one in seen
        )

    async def _write(self, session: AsyncSession, run_id: str | None) -> None:
        values: dict[str, Any] = {
            "run_id": run_id, "build": None, "snapshot": None, "heartbeats": self._heartbeats + 1,
            "host": HOST, "pid": os.getpid(), "last_heartbeat_at": db_now(),
        }  # fmt: skip
        if self._is_listed:
            found = await session.execute(
                update(TABLE).where(COLUMNS.id == self._id).values(**values)
            )
            self._is_listed = bool(found.rowcount)  # type: ignore[attr-defined]
        if not self._is_listed:
            await session.execute(insert(TABLE).values(id=self._id, **values))
        self._is_listed = True


def _host() -> str:
    """Return a name for what process ids are unique in: this boot and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()[:100]} unknown"


HOST = _host()


def _is_dead(host: str, pid: int) -> bool:
    """Return whether a process has exited; False for one of another machine."""
    if host != HOST or host.endswith("unknown"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
