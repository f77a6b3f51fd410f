"""What every table shares."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, cast
from uuid import UUID

import uuid6
from sqlalchemy import MetaData, Table
from sqlalchemy.orm import DeclarativeBase

from api.db.types import UTCDateTime


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can speak of it on both databases."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {datetime: UTCDateTime()}


def new_id() -> UUID:
    """Return a UUIDv7 (RFC 9562 section 5.7)."""
    return uuid6.uuid7()


def table_of(model: type[Base]) -> Table:
    """Return a model's table: statements of tables give rows, at a third of a model's price."""
    return cast(Table, model.__table__)
