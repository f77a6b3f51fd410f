"""Background work left over by changes that affect many rows."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base, new_id
from api.db.types import db_now


class CleanupTask(Base):
    """Rows to update or delete in batches; nothing that anybody may do depends on it.

    ``kind`` is ``user_sessions`` or ``client_sessions`` (of ``subject``, opened before ``seq``),
    or ``role`` (the assignments of a deleted role). ``reason`` is what ended the sessions.
    ``position`` is the last id that was done; the next batch starts after it.
    """

    __tablename__ = "cleanup_tasks"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=new_id)
    kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[UUID]
    seq: Mapped[int] = mapped_column(BigInteger, default=0)
    reason: Mapped[str] = mapped_column(String(32), default="")
    position: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(default=db_now())
