"""`httpx.Client(auth=RolecallAuth(url, access, refresh))`: carries tokens, and refreshes them once.

Requests in parallel share one refresh, threads of a sync client as well as tasks of an async one
(of one event loop).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Generator

import httpx

REPAIRED_BY_REFRESH = {"token_stale", "token_expired"}
Flow = Generator[httpx.Request, httpx.Response, None]


class RolecallAuth(httpx.Auth):
    """On 401 ``token_stale`` or ``token_expired``: one refresh, one more try.

    Where the refresh is refused the answer is the 401: sign in again. So it is for sessions of a
    confidential client app, which are refreshed at ``/oauth/token`` and not at ``/refresh``.
    """

    def __init__(self, url: str, access_token: str, refresh_token: str) -> None:
        self._url = f"{url.rstrip('/')}/refresh"
        self.access_token, self.refresh_token = access_token, refresh_token
        self._refused = ""
        self._lock, self._async_lock = threading.Lock(), asyncio.Lock()

    def sync_auth_flow(self, request: httpx.Request) -> Flow:
        """As httpx asks for it."""
        request.read()  # it may have to be sent twice
        used = self._carry(request)
        answer = yield request
        if answer.status_code != 401 or not _is_repaired_by_refresh(answer.read()):
            return
        with self._lock:
            if self._needs_refresh(used):
                answer = yield self._refresh()
                answer.read()
                self._take(answer)
        self._carry(request)
        yield request

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """As httpx asks for it."""
        await request.aread()
        used = self._carry(request)
        answer = yield request
        if answer.status_code != 401 or not _is_repaired_by_refresh(await answer.aread()):
            return
        async with self._async_lock:
            if self._needs_refresh(used):
                answer = yield self._refresh()
                await answer.aread()
                self._take(answer)
        self._carry(request)
        yield request

    def _carry(self, request: httpx.Request) -> str:
        request.headers["Authorization"] = f"Bearer {self.access_token}"
        return self.access_token

    def _needs_refresh(self, used: str) -> bool:
        # else another request has refreshed it meanwhile, or was told that nothing can
        return used == self.access_token != self._refused

    def _refresh(self) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.refresh_token}"}
        return httpx.Request("POST", self._url, headers=headers)

    def _take(self, answer: httpx.Response) -> None:
        if answer.is_success:
            tokens = answer.json()
            self.access_token, self.refresh_token = tokens["access_token"], tokens["refresh_token"]
        elif answer.status_code == 401:
            self._refused = self.access_token


def _is_repaired_by_refresh(body: bytes) -> bool:
    try:
        return json.loads(body)["code"] in REPAIRED_BY_REFRESH
    except (ValueError, KeyError, TypeError):
        return False  # not Rolecall's answer
