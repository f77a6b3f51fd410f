"""What hangs on SECRET_KEY, taken over to another one: signing keys, client secrets, seals."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database
from api.errors import StartupError
from api.services import audit
from api.services.audit import Origin
from api.services.audit_log import ADVISORY_LOCK, NOTHING, AuditLog, links
from api.services.clients import Clients
from api.services.signing_keys import SigningKeys

# A million seals take minutes; nobody else can write meanwhile.
LONG_SECONDS = 3_600.0


@dataclass(frozen=True, slots=True)
class Reencrypted:
    """How many of each were taken over, and how many seals do not hold."""

    keys: int
    clients: int
    seals: int
    faults: int


async def reencrypt(
    database: Database,
    keys: SigningKeys,
    clients: Clients,
    audit_log: AuditLog,
    former: str,
    origin: Origin,
) -> Reencrypted:
    """Take everything over from the secret ``former`` to that of the parts given.

    All of it or nothing, and audited. Raises ``StartupError`` where ``former`` opens no key. No
    other process may run: with the former secret it would go on sealing.
    """
    async with database.write(LONG_SECONDS) as session:
        resealed = await keys.reseal(session, former)
        if not resealed:
            raise StartupError("No key is under another SECRET_KEY than this one: nothing to do.")
        secrets = await clients.reseal(session, former)
        await database.one_at_a_time(session, ADVISORY_LOCK)
        async with _unlocked(session, database.dialect):
            seals, faults = await _reseal(session, AuditLog(database, former), audit_log)
        done = Reencrypted(resealed, secrets, seals, faults)
        audit.record(session, "keys.reencrypted", origin, **asdict(done))
    return done


async def _reseal(session: AsyncSession, former: AuditLog, ours: AuditLog) -> tuple[int, int]:
    """Make anew every seal that holds; one that does not is left, so that it is still found."""
    seq, before, now, seals, faults = 0, NOTHING, NOTHING, 0, 0
    while batch := await links(session, seq):
        for seal, event in batch:
            found = seal.digest
            # what follows a gap cannot be compared with anything: the gap is the fault
            gap = seal.seq != seq + 1
            if event and (gap or hmac.compare_digest(found, former.digest(before, event))):
                seal.digest = ours.digest(now, event)
                seals += 1
            faults += gap or seal.digest == found
            seq, before, now = seal.seq, found, seal.digest
        await session.flush()
        session.expunge_all()
    return seals, faults


@asynccontextmanager
async def _unlocked(session: AsyncSession, dialect: str) -> AsyncIterator[None]:
    """Let seals be changed in this transaction; no other one sees them unlocked."""
    if dialect == "postgresql":
        table = "ALTER TABLE audit_seals {} TRIGGER audit_seals_append_only"
        await session.execute(text(table.format("DISABLE")))
        yield
        await session.execute(text(table.format("ENABLE")))
        return
    query = text("SELECT sql FROM sqlite_master WHERE name = 'audit_seals_no_update'")
    trigger = (await session.execute(query)).scalar_one()
    await session.execute(text("DROP TRIGGER audit_seals_no_update"))
    yield
    await session.execute(text(trigger))
