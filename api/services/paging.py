"""Keyset pages: a cursor names the last row seen, and the query that it belongs to."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar
from uuid import UUID

import orjson
from sqlalchemy import Select, bindparam, tuple_

from api.errors import ValidationFailed

Row = TypeVar("Row")
Shown = TypeVar("Shown")


@dataclass(frozen=True, slots=True)
class Page(Generic[Shown]):
    """``next_cursor`` is None on the last page."""

    items: list[Shown]
    next_cursor: str | None


def after(
    query: Select[Row],
    columns: Sequence[Any],
    cursor: str | None,
    *,
    scope: object,
    reverse: bool,
) -> Select[Row]:
    """Order ``query`` by ``columns`` (unique together) and begin it behind ``cursor``.

    ``scope`` is what the query asks for: a cursor of another query is refused (422).
    """
    seen = seen_by(cursor, scope, columns)
    return ordered(query, columns, reverse=reverse, begun=bool(seen)).params(seen)


def seen_by(cursor: str | None, scope: object, columns: Sequence[Any]) -> dict[str, Any]:
    """Return the values of an ``ordered`` query that has begun: the last row that was seen."""
    if cursor is None:
        return {}
    names = (_seen(column) for column in columns)
    return dict(zip(names, _opened(cursor, scope, columns), strict=True))


def ordered(
    query: Select[Row], columns: Sequence[Any], *, reverse: bool, begun: bool = False
) -> Select[Row]:
    """Order ``query`` by ``columns``; where it has ``begun``, behind the row that was seen."""
    if begun:
        key = tuple_(*columns)
        seen = tuple_(*(bindparam(_seen(column), type_=column.type) for column in columns))
        query = query.where(key < seen if reverse else key > seen)
    return query.order_by(*(c.desc() if reverse else c.asc() for c in columns))


def _seen(column: Any) -> str:
    return f"seen_{column.key}"


def page_of(
    rows: Sequence[Row],
    limit: int,
    *,
    scope: object,
    key: Callable[[Row], tuple[Any, ...]],
    present: Callable[[Row], Shown],
) -> Page[Shown]:
    """Make a page of ``limit`` from up to ``limit + 1`` rows: one more says that there are more."""
    more = len(rows) > limit
    shown = rows[:limit]
    cursor = _sealed(key(shown[-1]), scope) if more else None
    return Page([present(row) for row in shown], cursor)


def _sealed(values: tuple[Any, ...], scope: object) -> str:
    # asyncpg has a UUID of its own, which orjson does not know
    data = orjson.dumps([_fingerprint(scope), *values], default=str)
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _opened(cursor: str, scope: object, columns: Sequence[Any]) -> list[Any]:
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        fingerprint, *raw = orjson.loads(data)
        if fingerprint != _fingerprint(scope) or len(raw) != len(columns):
            raise ValueError(fingerprint)
        return [
            _typed(column.type.python_type, value)
            for column, value in zip(columns, raw, strict=True)
        ]
    except (ValueError, TypeError, OverflowError):
        raise ValidationFailed(
            errors=[{"field": "cursor", "message": "Not a cursor that this list gave."}]
        ) from None


def _typed(kind: type, value: Any) -> Any:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(value)
    if kind is datetime:
        parsed = datetime.fromisoformat(value)
        if parsed.tzinfo is None:
            raise ValueError(value)
        return parsed.astimezone(UTC)
    return UUID(value) if kind is UUID else value


def _fingerprint(scope: object) -> str:
    return hashlib.sha256(repr(scope).encode()).hexdigest()[:12]
