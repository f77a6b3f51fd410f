"""The keys that sign tokens."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base
from api.db.types import db_now


class SigningKey(Base):
    """``private`` is PKCS #8 encrypted under SECRET_KEY; one key serves one ``algorithm``."""

    __tablename__ = "signing_keys"

    kid: Mapped[str] = mapped_column(String(43), primary_key=True)
    algorithm: Mapped[str] = mapped_column(String(8))
    private: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    retired_at: Mapped[datetime | None]
