"""Ways to talk to an AsyncFlask in tests: as a server would, and as a client would."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx

from api.asgi import AsyncFlask


def make_app(**config: Any) -> AsyncFlask:
    """An application that says nothing of errors it propagates, unless told to."""
    app = AsyncFlask("tests.unit", static_folder=None)
    app.secret_key = "a key for tests"
    app.config.update(config)
    return app


def http_scope(path: str = "/", method: str = "GET", **changes: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"testserver")],
        "client": ("192.0.2.7", 4321),
        "server": ("127.0.0.1", 8000),
    }
    return scope | changes


@dataclass
class Exchange:
    """One request as an ASGI server carries it: messages in, messages out."""

    incoming: list[dict[str, Any]] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    received: int = 0

    async def receive(self) -> dict[str, Any]:
        self.received += 1
        if self.incoming:
            return self.incoming.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode("latin-1") for k, v in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


def body_messages(*chunks: bytes, ends: bool = True) -> list[dict[str, Any]]:
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    return [*messages, {"type": "http.request", "body": b""}] if ends else messages


async def exchange(
    app: AsyncFlask, scope: dict[str, Any], incoming: list[dict[str, Any]] | None = None
) -> Exchange:
    """Carry one request; fails rather than hangs."""
    one = Exchange(incoming if incoming is not None else body_messages())
    async with asyncio.timeout(5):
        await app.asgi(scope, one.receive, one.send)
    return one


@dataclass
class Asker:
    """Asks an application over ASGI on this loop, or over WSGI through Flask's test client."""

    way: str

    async def __call__(
        self, app: AsyncFlask, path: str, method: str = "GET", **options: Any
    ) -> httpx.Response:
        if self.way == "asgi":
            transport = httpx.ASGITransport(app.asgi)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as c:
                return await c.request(method, path, **options)
        return await asyncio.to_thread(self._by_test_client, app, path, method, options)

    @staticmethod
    def _by_test_client(
        app: AsyncFlask, path: str, method: str, options: dict[str, Any]
    ) -> httpx.Response:
        options["data"] = options.pop("content", None)
        with app.test_client(use_cookies=False).open(
            path, method=method, buffered=True, **options
        ) as a:
            return httpx.Response(a.status_code, headers=list(a.headers), content=a.data)
