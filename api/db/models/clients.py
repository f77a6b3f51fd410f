"""Client apps: what may ask for tokens, and for which roles and audiences."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import JSON, BigInteger, ForeignKey, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base, new_id
from api.db.types import db_now


class Client(Base):
    """``id`` is the ``client_id`` (RFC 6749 section 2.2).

    ``version`` is the ``ver`` claim of the client's own tokens. Sessions through it whose
    ``opened_seq`` is below ``ended_below`` have ended. ``audiences`` and ``grants`` are
    lists of text; no audiences means the service's own.
    """

    __tablename__ = "clients"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(64))
    is_public: Mapped[bool] = mapped_column(default=False)
    is_active: Mapped[bool] = mapped_column(default=True)
    audiences: Mapped[list[str]] = mapped_column(JSON, default=list)
    grants: Mapped[list[str]] = mapped_column(JSON, default=list)
    access_token_expires: Mapped[int | None]
    version: Mapped[int] = mapped_column(default=1)
    ended_below: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    updated_at: Mapped[datetime] = mapped_column(default=db_now(), onupdate=db_now())


class ClientRole(Base):
    """A role that tokens of the client, or of users who come through it, may hold."""

    __tablename__ = "client_roles"

    client_id: Mapped[UUID] = mapped_column(
        ForeignKey("clients.id", ondelete="CASCADE"), primary_key=True
    )
    role_id: Mapped[UUID] = mapped_column(
        ForeignKey("roles.id", ondelete="RESTRICT"), primary_key=True, index=True
    )


class ClientSecret(Base):
    """A secret of a confidential client, ``sealed``; one that is being replaced expires."""

    __tablename__ = "client_secrets"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=new_id)
    client_id: Mapped[UUID] = mapped_column(
        ForeignKey("clients.id", ondelete="CASCADE"), index=True
    )
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    expires_at: Mapped[datetime | None]
