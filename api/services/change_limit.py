"""How often users may change their own account: each change is a row of the audit log for good."""

from __future__ import annotations

import sys
from uuid import UUID

from api.auth.counts import Counts
from api.auth.throttle import LoginThrottle, NetworkLimits

MOST_CHANGES = 20


class ChangeLimit:
    """``MOST_CHANGES`` by one user in ``window`` seconds, in all processes together."""

    def __init__(self, in_redis: Counts | None, *, window: float) -> None:
        self._throttle = LoginThrottle(
            in_redis,
            window=window,
            pair=NetworkLimits.of(MOST_CHANGES),
            account=MOST_CHANGES,
            # it is the same user wherever the requests come from
            address=NetworkLimits.of(sys.maxsize),
            namespace="change",
        )

    async def count(self, user_id: UUID) -> None:
        """Count a change that is about to be made. Raises ``TooManyRequests``."""
        async with self._throttle.attempt(str(user_id), None):
            # left as what a failed sign-in is: it stays in the count
            pass
