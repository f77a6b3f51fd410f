"""Bring a database to the revision that this code speaks. Alembic does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from api.db.engine import Database
from api.errors import StartupError

MIGRATIONS = Path(__file__).parent / "migrations"
# any number, as long as every rolecall process takes the same one
ADVISORY_LOCK = 7_265_108
# An index of a large table takes long, and so does waiting for another process that makes one.
MIGRATION_SECONDS = 6 * 3_600.0


def configuration(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration; env.py works on ``connection``."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


async def upgrade(database: Database, revision: str = "head") -> None:
    """Apply what is missing; one process at a time. ``StartupError`` if newer than the code."""
    await _run(database, lambda config: command.upgrade(config, revision))


async def downgrade(database: Database, revision: str) -> None:
    """Go back to ``revision`` (``base`` empties the database)."""
    await _run(database, lambda config: command.downgrade(config, revision))


async def revision(database: Database, message: str) -> None:
    """Write a new migration from what the models say and the database lacks."""
    await _run(database, lambda config: command.revision(config, message, autogenerate=True))


async def current(database: Database) -> tuple[str | None, str | None]:
    """Return the database's revision and the code's. Raises ``Unavailable``."""
    return await database.look(_revisions)


async def _run(database: Database, action: Callable[[Config], object]) -> None:
    def locked(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
        _refuse_newer(connection)
        action(configuration(connection))

    try:
        async with database.begun(write=True) as connection:
            await database.raise_limits(connection, MIGRATION_SECONDS)
            await connection.run_sync(locked)
            await connection.commit()
    except OSError as error:
        raise StartupError(f"The database cannot be reached: {error.strerror or error}.") from None


def _revisions(connection: Connection) -> tuple[str | None, str | None]:
    here = MigrationContext.configure(connection).get_current_revision()
    return here, ScriptDirectory.from_config(configuration()).get_current_head()


def _refuse_newer(connection: Connection) -> None:
    here, _ = _revisions(connection)
    known = {
        script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()
    }
    if here is not None and here not in known:
        raise StartupError(
            f"The database is at revision {here}, which this version of Rolecall does not know: "
            "install the version that made it, or restore a backup."
        )
