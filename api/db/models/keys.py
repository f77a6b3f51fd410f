"""The keys that sign tokens."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base
from api.db.types import db_now


class SigningKey(Base):
    """``private`` is PKCS #8 encrypted under SECRET_KEY; one key serves one ``algorithm``.

    A key is published (``created_at``) before it signs (``activated_at``), and verifies after it
    was replaced (``replaced_at``) until ``verifies_until``; when it is retired its private half
    is destroyed, and the row stays to tell what it was.
    """

    __tablename__ = "signing_keys"

    kid: Mapped[str] = mapped_column(String(43), primary_key=True)
    algorithm: Mapped[str] = mapped_column(String(8))
    private: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    activated_at: Mapped[datetime | None]
    replaced_at: Mapped[datetime | None]
    verifies_until: Mapped[datetime | None]
    retired_at: Mapped[datetime | None]

    @property
    def state(self) -> str:
        """``next``, ``current``, ``old`` or ``retired``."""
        if self.retired_at is not None:
            return "retired"
        if self.replaced_at is not None:
            return "old"
        return "next" if self.activated_at is None else "current"
