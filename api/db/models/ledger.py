"""The ledger of what was taken back: the truth that Redis is an index of."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base
from api.db.types import db_now


class Revocation(Base):
    """One entry: of ``kind`` ``jti`` or ``sid`` (revoked), or ``sub`` (``floor`` for ``ver``).

    It may be forgotten after ``expires_at``, when every token it speaks of has expired.
    """

    __tablename__ = "revocations"
    __table_args__ = (
        Index("ix_revocations_recorded_at", "recorded_at"),
        Index("ix_revocations_expires_at", "expires_at"),
    )

    kind: Mapped[str] = mapped_column(String(3), primary_key=True)
    subject: Mapped[str] = mapped_column(String(36), primary_key=True)
    floor: Mapped[int] = mapped_column(default=0)
    expires_at: Mapped[datetime]
    recorded_at: Mapped[datetime] = mapped_column(default=db_now())
