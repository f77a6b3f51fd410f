"""Alembic's environment: the connection is given by api/db/migrate.py, never made here."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context

from api.db.models import Base
from api.db.types import UTCDateTime


def _plain(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    # migrations outlive the code: they must not import its types
    if kind == "type" and isinstance(item, UTCDateTime):
        return "sa.DateTime(timezone=True)"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite cannot alter a column: Alembic copies the table instead
    render_as_batch=True,
    compare_type=True,
    render_item=_plain,
)
with context.begin_transaction():
    context.run_migrations()
