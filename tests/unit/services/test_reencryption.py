"""Another SECRET_KEY: keys and seals are taken over, and no fault is covered up by it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError

from api.auth.client_secrets import ClientSecrets
from api.auth.keypairs import WrongSecret
from api.db import Database
from api.db.models import AuditEvent, AuditSeal, ClientSecret, SigningKey
from api.errors import StartupError
from api.services import audit
from api.services.audit import Origin
from api.services.audit_log import AuditLog
from api.services.clients import Clients
from api.services.reencryption import Reencrypted, reencrypt
from tests._keys import ring_on, ripen, store_on

FORMER, OURS = "f" * 40, "o" * 40
CONSOLE = Origin(actor="console")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database under FORMER, with an old key and twenty sealed rows."""
    database = Database(database_url)
    async with database.write() as session:
        await session.execute(delete(SigningKey))
    store = store_on(database, FORMER)
    await store.keep()
    await ripen(database)
    await store.rotate(CONSOLE)
    for number in range(20):
        await audit.note(database, "test.noted", Origin(), number=number)
    while await AuditLog(database, FORMER).seal():
        pass
    yield database
    await database.close()


async def take_over(database: Database, former: str = FORMER) -> Reencrypted:
    """Take over what is under ``former``."""
    ours = store_on(database, OURS), clients_under(database, OURS), AuditLog(database, OURS)
    return await reencrypt(database, *ours, former, CONSOLE)


def clients_under(database: Database, secret: str) -> Clients:
    """Return a service that seals under ``secret`` and does nothing else."""
    return Clients(database, None, None, ClientSecrets(secret))  # type: ignore[arg-type]


async def kept(database: Database) -> tuple[list[bytes | None], list[str]]:
    """Return everything that hangs on the secret."""
    async with database.read() as session:
        keys = await session.scalars(select(SigningKey.private).order_by(SigningKey.kid))
        seals = await session.scalars(select(AuditSeal.digest).order_by(AuditSeal.seq))
        return list(keys), list(seals)


async def test_keys_and_seals_are_taken_over(database: Database) -> None:
    """The same keys open under the new secret alone, the chain holds, the log says who did it."""
    before = ring_on(database, FORMER)
    await before.load()
    sealed = (await AuditLog(database, FORMER).verify()).sealed
    assert sealed >= 20
    assert await take_over(database) == Reencrypted(keys=3, clients=0, seals=sealed, faults=0)
    after = ring_on(database, OURS)
    await after.load()
    assert after.jwks() == before.jwks()
    with pytest.raises(WrongSecret):
        await ring_on(database, FORMER).load()
    log = AuditLog(database, OURS)
    assert await log.seal() == 1
    found = await log.verify()
    assert (found.sealed, found.unsealed, found.faults) == (sealed + 1, 0, [])
    async with database.read() as session:
        query = select(AuditEvent).where(AuditEvent.action == "keys.reencrypted")
        (row,) = (await session.scalars(query)).all()
    counts = {"keys": 3, "clients": 0, "seals": sealed, "faults": 0}
    assert (row.actor, row.detail) == ("console", counts)
    with pytest.raises(StartupError, match="nothing to do"):
        await take_over(database)


async def test_client_apps_keep_their_secrets(database: Database) -> None:
    """What was handed out under the former secret is good under ours, and under ours alone."""
    wanted = {"name": "x", "allowed_roles": [], "audiences": [], "grants": [], "public": False}
    _, secret = await clients_under(database, FORMER).create(
        wanted | {"access_token_expires": None}, CONSOLE
    )
    assert (await take_over(database)).clients == 1
    async with database.read() as session:
        (sealed,) = await session.scalars(select(ClientSecret.sealed))
    assert ClientSecrets(OURS).matches(sealed, str(secret))
    assert not ClientSecrets(FORMER).matches(sealed, str(secret))


@pytest.mark.parametrize("statement", ["UPDATE audit_seals SET seq = 9", "DELETE FROM audit_seals"])
async def test_seals_are_append_only_again_afterwards(database: Database, statement: str) -> None:
    """The triggers that it lifts stand again."""
    await take_over(database)
    with pytest.raises(DBAPIError, match="append-only"):
        async with database.write() as session:
            await session.execute(text(statement))


async def test_a_wrong_former_secret_changes_nothing(database: Database) -> None:
    """One sentence, and not a byte is written."""
    before = await kept(database)
    with pytest.raises(WrongSecret):
        await take_over(database, "w" * 40)
    assert await kept(database) == before


async def test_it_is_all_or_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seals that cannot be made leave the keys under the former secret."""
    before = await kept(database)

    def failing(*_: object) -> str:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(AuditLog, "digest", failing)
    with pytest.raises(RuntimeError):
        await take_over(database)
    assert await kept(database) == before
    monkeypatch.undo()
    await test_seals_are_append_only_again_afterwards(database, "DELETE FROM audit_seals")


async def test_what_was_tampered_with_is_still_found(database: Database) -> None:
    """Altered, removed and missing: verify says of them afterwards what it said before."""
    async with database.write() as session:
        seals = (await session.scalars(select(AuditSeal).order_by(AuditSeal.seq))).all()
        await _lift(session, database)
        rows = AuditEvent.__table__
        await session.execute(
            update(rows).where(rows.c.id == seals[3].event_id).values(action="test.other")
        )
        await session.execute(delete(rows).where(rows.c.id == seals[6].event_id))
        await session.execute(delete(AuditSeal).where(AuditSeal.seq == seals[9].seq))
        await session.execute(delete(AuditSeal).where(AuditSeal.seq == seals[10].seq))
    before = await AuditLog(database, FORMER).verify()
    assert [fault.what for fault in before.faults] == ["altered", "removed", "missing", "missing"]
    done = await take_over(database)
    assert done.faults == 3
    after = await AuditLog(database, OURS).verify()
    assert after.faults == before.faults
    assert after.sealed == before.sealed


async def _lift(session: object, database: Database) -> None:
    if database.dialect == "postgresql":
        for table in ("audit_events", "audit_seals"):
            await session.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))  # type: ignore[attr-defined]
        return
    for table in ("audit_events", "audit_seals"):
        for change in ("update", "delete"):
            await session.execute(text(f"DROP TRIGGER {table}_no_{change}"))  # type: ignore[attr-defined]
    # reencrypt lifts it itself, and must find it
    await session.execute(  # type: ignore[attr-defined]
        text(
            "CREATE TRIGGER audit_seals_no_update BEFORE UPDATE ON audit_seals "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        )
    )
