"""Audit events that a caller can repeat at will: written at a bounded rate, with a count.

The first event of its kind is written at once. Those that follow within the window are counted,
and written as one row with ``count`` when the window ends, or when the process stops. A process
that is killed loses these counts and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from api.db import Database
from api.services import audit
from api.services.audit import Origin

WINDOW_SECONDS = 60.0
# What is kept in memory of one process. Further kinds of an action are counted together.
MOST_KINDS = 1_000

Kind = tuple[Hashable, ...]


@dataclass(slots=True)
class _Repeated:
    """The events of one kind since the last row: how many, and what is written of them."""

    until: float
    action: str
    origin: Origin
    said: dict[str, Any]
    count: int = 0


class RepeatedEvents:
    """One a process. ``write_due`` is called every few seconds, ``write_all`` at the end."""

    def __init__(
        self, database: Database, *, window: float = WINDOW_SECONDS, most: int = MOST_KINDS
    ) -> None:
        self._database = database
        self._window = window
        self._most = most
        self._kinds: dict[Kind, _Repeated] = {}

    async def note(
        self,
        action: str,
        origin: Origin,
        *,
        target: UUID | str | None = None,
        distinct_by: Sequence[str] = (),
        **detail: Any,
    ) -> None:
        """Write or count an event that changed nothing. Raises ``Unavailable``.

        Events are of one kind that have the same action, actor, client app and target, and the
        same values of those of ``detail`` that ``distinct_by`` names. A row with a count has the
        address and the detail of the last of them.
        """
        distinct = [detail[name] for name in distinct_by]
        kind: Kind = (action, origin.actor, origin.client_id, str(target), *distinct)
        said = {"target": target, **detail}
        if kind not in self._kinds and len(self._kinds) >= self._most:
            kind, origin, said = (action,), Origin(), {}
        known = self._kinds.get(kind)
        if known is not None:
            known.count, known.origin, known.said = known.count + 1, origin, said
            return
        # before anything is awaited: those that come meanwhile are counted
        self._kinds[kind] = _Repeated(time.monotonic() + self._window, action, origin, said)
        try:
            await audit.note(self._database, action, origin, **said)
        except BaseException:
            # others may have come meanwhile, and have been told that theirs is counted
            if (seen := self._kinds.get(kind)) is not None and not seen.count:
                del self._kinds[kind]
            raise

    async def write_due(self) -> int:
        """Write the counts whose window has ended; return how many rows. Raises ``Unavailable``.

        A kind that was not repeated in its window is forgotten.
        """
        now = time.monotonic()
        return await self._write([k for k, seen in self._kinds.items() if seen.until <= now])

    async def write_all(self) -> int:
        """Write every count and forget every kind. Raises ``Unavailable``."""
        written = 0
        # events may be counted while others are written
        while rows := await self._write(list(self._kinds)):
            written += rows
        self._kinds.clear()
        return written

    async def _write(self, kinds: Sequence[Kind]) -> int:
        counted = {kind: self._kinds[kind].count for kind in kinds if self._kinds[kind].count}
        rows = [self._row(kind, count) for kind, count in counted.items()]
        if rows:
            await self._database.run(lambda db: db.execute(audit.INSERT, rows))
        for kind in kinds:
            seen = self._kinds.get(kind)
            if seen is None:
                continue
            # it may have been repeated while the rows were written
            seen.count -= counted.get(kind, 0)
            seen.until = time.monotonic() + self._window
            if kind not in counted and not seen.count:
                del self._kinds[kind]
        return len(rows)

    def _row(self, kind: Kind, count: int) -> dict[str, Any]:
        seen = self._kinds[kind]
        return audit.row(seen.action, seen.origin, **seen.said, count=count)
