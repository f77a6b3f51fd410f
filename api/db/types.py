"""Column types and SQL expressions that mean the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, DateTime, Dialect, Integer, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite keeps it as text that sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        """What a column of this type holds."""
        return datetime

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times: they mean another moment on another machine."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime cannot be stored")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def result_processor(
        self, dialect: Dialect, coltype: object
    ) -> Callable[[Any], datetime | None] | None:
        """Return what makes it aware; of SQLite's text in one step."""
        if dialect.name == "sqlite":
            return _of_text
        return super().result_processor(dialect, coltype)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Return it in UTC, whatever the server's time zone."""
        return value if value is None else value.astimezone(UTC)


def _of_text(value: str | None) -> datetime | None:
    return value if value is None else datetime.fromisoformat(f"{value}+00:00")


class db_now(FunctionElement[datetime]):  # noqa: N801  named as SQL functions are
    """The database's own clock, ``offset`` seconds from now (whole seconds, may be negative).

    Not the transaction's start, as CURRENT_TIMESTAMP is on PostgreSQL: who waited for a row's
    lock must see the time at which it got it.
    """

    # without it every statement that tells the time would be compiled anew each time
    inherit_cache = True
    type = UTCDateTime()

    def __init__(self, offset: int | ColumnElement[int] = 0) -> None:
        super().__init__(literal(offset, Integer) if isinstance(offset, int) else offset)


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    offset = compiler.process(element.clauses, **kwargs)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {offset} || ' seconds')"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    offset = compiler.process(element.clauses, **kwargs)
    return f"(clock_timestamp() + make_interval(secs => {offset}))"
