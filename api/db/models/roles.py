"""What users may do: roles, the permissions they hold, the roles they include."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base, new_id
from api.db.types import db_now

# The name of a deleted role, before its id: no role can be given such a name.
DELETED_NAME = "-deleted:"


class Role(Base):
    """A role: a name that guards ask for, and what comes with it.

    A role with ``deleted_at`` is deleted. Its row remains until its last assignment is gone, and
    includes the role that replaces it, if there is one.
    """

    __tablename__ = "roles"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    description: Mapped[str] = mapped_column(String(255), default="")
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    deleted_at: Mapped[datetime | None]


class RolePermission(Base):
    """A permission that a role holds itself: ``area:verb``, ``area:*`` or ``*``."""

    __tablename__ = "role_permissions"

    role_id: Mapped[UUID] = mapped_column(
        ForeignKey("roles.id", ondelete="CASCADE"), primary_key=True
    )
    permission: Mapped[str] = mapped_column(String(64), primary_key=True)


class RoleInclude(Base):
    """``role`` holds the name and the permissions of ``included`` as well."""

    __tablename__ = "role_includes"

    role_id: Mapped[UUID] = mapped_column(
        ForeignKey("roles.id", ondelete="CASCADE"), primary_key=True
    )
    included_id: Mapped[UUID] = mapped_column(
        ForeignKey("roles.id", ondelete="CASCADE"), primary_key=True
    )


class UserRole(Base):
    """A role given to a user."""

    __tablename__ = "user_roles"
    __table_args__ = (Index("ix_user_roles_role_id_user_id", "role_id", "user_id"),)

    user_id: Mapped[UUID] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), primary_key=True
    )
    role_id: Mapped[UUID] = mapped_column(
        ForeignKey("roles.id", ondelete="RESTRICT"), primary_key=True
    )
