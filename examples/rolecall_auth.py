"""`httpx.Client(auth=RolecallAuth(url, access, refresh))`: carries tokens, and refreshes them once.

Requests in parallel share one refresh; the same object serves sync clients or async ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator

import httpx

REPAIRED_BY_REFRESH = {"token_stale", "token_expired"}
Flow = Generator[httpx.Request, httpx.Response, None]


class RolecallAuth(httpx.Auth):
    """On 401 ``token_stale`` or ``token_expired``: one refresh, one more try.

    Where the refresh is refused the answer is the 401: sign in again.
    """

    requires_response_body = True

    def __init__(self, url: str, access_token: str, refresh_token: str) -> None:
        self._url = f"{url.rstrip('/')}/refresh"
        self.access_token, self.refresh_token = access_token, refresh_token
        self._lock, self._async_lock = threading.Lock(), asyncio.Lock()

    def sync_auth_flow(self, request: httpx.Request) -> Flow:
        """As httpx asks for it."""
        used = self._carry(request)
        answer = yield request
        answer.read()
        if not _is_repaired_by_refresh(answer):
            return
        with self._lock:
            if used == self.access_token:  # else another request has refreshed it meanwhile
                answer = yield self._refresh()
                answer.read()
                self._take(answer)
        self._carry(request)
        yield request

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """As httpx asks for it."""
        used = self._carry(request)
        answer = yield request
        await answer.aread()
        if not _is_repaired_by_refresh(answer):
            return
        async with self._async_lock:
            if used == self.access_token:
                answer = yield self._refresh()
                await answer.aread()
                self._take(answer)
        self._carry(request)
        yield request

    def _carry(self, request: httpx.Request) -> str:
        request.headers["Authorization"] = f"Bearer {self.access_token}"
        return self.access_token

    def _refresh(self) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.refresh_token}"}
        return httpx.Request("POST", self._url, headers=headers)

    def _take(self, answer: httpx.Response) -> None:
        if answer.is_success:
            tokens = answer.json()
            self.access_token, self.refresh_token = tokens["access_token"], tokens["refresh_token"]


def _is_repaired_by_refresh(answer: httpx.Response) -> bool:
    if answer.status_code != 401 or "json" not in answer.headers.get("Content-Type", ""):
        return False
    return answer.json().get("code") in REPAIRED_BY_REFRESH
