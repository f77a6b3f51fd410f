"""What a request to change something changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differing(before: object, changes: Mapping[str, Any]) -> set[str]:
    """Return the names of the attributes of ``before`` that ``changes`` gives another value.

    Order and repetition make no list another.
    """

    def is_other(name: str, wanted: Any) -> bool:
        had = getattr(before, name)
        return set(wanted) != set(had) if isinstance(wanted, list) else bool(wanted != had)

    return {name for name, wanted in changes.items() if is_other(name, wanted)}
