"""Who may sign in."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base, new_id
from api.db.types import db_now


class User(Base):
    """An account. ``username_key`` is the username folded, so that case tells nobody apart.

    ``username_skeleton`` is shared by names that are confusable (Unicode Technical Standard 39);
    None where an older account has a confusable name.
    ``version`` is the ``ver`` claim: how often what their tokens say was changed. Sessions whose
    ``opened_seq`` is below ``ended_below`` have ended.
    """

    __tablename__ = "users"
    __table_args__ = (
        Index("ix_users_created_at_id", "created_at", "id"),
        Index("ix_users_username_skeleton", "username_skeleton", unique=True),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=new_id)
    username: Mapped[str] = mapped_column(String(64))
    username_key: Mapped[str] = mapped_column(String(256), unique=True)
    username_skeleton: Mapped[str | None] = mapped_column(String(512))
    email: Mapped[str | None] = mapped_column(String(254))
    password_hash: Mapped[str] = mapped_column(String(255))
    is_active: Mapped[bool] = mapped_column(default=True)
    version: Mapped[int] = mapped_column(default=1)
    ended_below: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    updated_at: Mapped[datetime] = mapped_column(default=db_now(), onupdate=db_now())
    last_login_at: Mapped[datetime | None]
