"""One login is one session, with one current refresh token at a time."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base, new_id
from api.db.types import db_now

THROUGH_ONE = text("client_id IS NOT NULL")


class Session(Base):
    """``id`` is the ``sid`` claim, ``current_jti`` the one refresh token that may be spent.

    ``idle_expires_at`` moves with every refresh and never past ``expires_at``. ``client_id`` is the
    client app through which the user signed in: its roles bound theirs. ``opened_seq`` is the
    authorization sequence when it was opened.

    No foreign key: a user or a client app is deleted at once, and their sessions in batches.
    """

    __tablename__ = "sessions"
    __table_args__ = (
        Index("ix_sessions_user_id_id", "user_id", "id"),
        Index("ix_sessions_expires_at", "expires_at"),
        Index(
            "ix_sessions_client_id_id", "client_id", "id",
            sqlite_where=THROUGH_ONE, postgresql_where=THROUGH_ONE,
        ),
    )  # fmt: skip

    id: Mapped[UUID] = mapped_column(primary_key=True, default=new_id)
    user_id: Mapped[UUID]
    client_id: Mapped[UUID | None]
    opened_seq: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    current_jti: Mapped[str] = mapped_column(String(36))
    previous_jti: Mapped[str | None] = mapped_column(String(36))
    generation: Mapped[int] = mapped_column(default=1)
    rotated_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    last_used_at: Mapped[datetime] = mapped_column(default=db_now())
    idle_expires_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    revoked_reason: Mapped[str | None] = mapped_column(String(32))
    ip: Mapped[str | None] = mapped_column(String(45))
    user_agent: Mapped[str | None] = mapped_column(String(255))
