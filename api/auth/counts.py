"""Counts of one process, as a storage of the ``limits`` library."""

from __future__ import annotations

import time

from limits.aio.storage import Storage

# Expired counts are swept out when there are twice as many as the last sweep left, or this many.
SWEEP_AT_LEAST = 10_000


class LocalCounts(Storage):
    """Counts of this process. A count that is given back is forgotten; so is one that expired.

    ``limits.aio.storage.MemoryStorage`` walks over all its keys at every hit, on the loop.
    """

    STORAGE_SCHEME = None

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, tuple[int, float]] = {}
        self._sweep_at = SWEEP_AT_LEAST

    @property
    def base_exceptions(self) -> type[Exception]:
        """Nothing here raises."""
        return ValueError

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add ``amount``, which may be negative; the first begins a window of ``expiry``."""
        count, until = self._live(key) or (0, time.time() + expiry)
        self._counts[key] = (count := max(0, count + amount), until)
        if count == 0:
            del self._counts[key]
        if len(self._counts) > self._sweep_at:
            self._counts = {key: kept for key in self._counts if (kept := self._live(key))}
            self._sweep_at = max(SWEEP_AT_LEAST, 2 * len(self._counts))
        return count

    async def get(self, key: str) -> int:
        """Return the count, 0 where there is none."""
        return (self._live(key) or (0,))[0]

    async def get_expiry(self, key: str) -> float:
        """Return when the window ends, in seconds since the epoch."""
        return (self._live(key) or (0, time.time()))[1]

    async def check(self) -> bool:
        """Memory is always there."""
        return True

    async def reset(self) -> int | None:
        """Forget everything."""
        self._counts.clear()
        return None

    async def clear(self, key: str) -> None:
        """Forget one count."""
        self._counts.pop(key, None)

    def _live(self, key: str) -> tuple[int, float] | None:
        found = self._counts.get(key)
        return found if found is not None and found[1] > time.time() else None
