"""How long one hostile request holds the event loop: CPU time of the longest callback.

    python -m benchmarks.loop_holds [--limit MILLISECONDS] [part of a name ...]

Every route that takes a body, a query, cookies or odd headers is asked over ASGI with the worst of
64 KiB that is known. Only the thread of the loop is timed, so that a busy machine and the threads
that hash passwords do not count; of several rounds the fastest counts. The exit code is 1 where a
request is over the limit (20 ms).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.app import compose, create_app
from api.asgi import AsyncFlask
from api.db import migrate
from api.embedded import EmbeddedRedis
from api.routes import TABLE
from api.services import bootstrap
from api.settings import Settings

SIZE = 65_536
HEAD = 16_384
ROUNDS = 5
PAGE = 200
LIMIT_MILLISECONDS = 20.0
NOBODY = "01234567-89ab-7def-8123-456789abcdef"
SECRET = "kJ8vQ2nR5tXw9zB3fH6mP0sD4gL7yC1e"
JSON = (b"content-type", b"application/json")
FORM = (b"content-type", b"application/x-www-form-urlencoded")


@dataclass
class Case:
    """One request; ``headers`` go out beside the credentials."""

    name: str
    method: str
    path: str
    body: bytes = b""
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def filled(item: str, size: int = SIZE, before: str = "", after: str = "", by: str = ",") -> str:
    """Return as many of ``item`` as ``size`` bytes hold, between ``before`` and ``after``."""
    room = size - len((before + after).encode())
    count = room // len((item + by).encode())
    return before + by.join([item] * count) + after


def numbered(
    pattern: str, size: int = SIZE, before: str = "", after: str = "", by: str = ","
) -> str:
    """As ``filled``, with a number in each item."""
    items, room = [], size - len((before + after).encode())
    for number in range(size):
        item = pattern.format(number)
        room -= len((item + by).encode())
        if room < 0:
            break
        items.append(item)
    return before + by.join(items) + after


def bodies() -> Iterator[tuple[str, bytes]]:
    """JSON that costs the reader much, whatever the route."""
    deep = "[" * 900 + "]" * 900
    for name, text in {
        "members": numbered('"{:x}":0', before="{", after="}"),
        "one member again and again": filled('"a":0', before="{", after="}"),
        "64 members": numbered('"{:x}":0', 600, before="{", after="}"),
        "empty objects": filled("{}", before='{"username":[', after="]}"),
        "objects with a member": filled('{"a":0}', before='{"username":[', after="]}"),
        "empty lists": filled("[]", before='{"roles":[', after="]}"),
        "deep lists": filled(deep, before='{"username":[', after="]}"),
        "too deep": "[" * SIZE,
        "deep objects": '{"a":' * 900 + "0" + "}" * 900,
        "integers": filled("1" * 4_000, before='{"username":[', after="]}"),
        "floats": filled("1.7976931348623157e308", before='{"username":[', after="]}"),
        "one long number": '{"username":' + "1" * (SIZE - 20) + "}",
        "escapes": '{"username":"' + "\\u0301" * 10_000 + '"}',
        "odd unicode": '{"username":"' + "\ufdfa" * 21_000 + '"}',
        "a long name": '{"' + "a" * (SIZE - 10) + '":0}',
        "a list": filled("{}", before="[", after="]"),
        "a text": '"' + "a" * (SIZE - 2) + '"',
    }.items():
        yield name, text.encode()[:SIZE]


def of_routes() -> Iterator[Case]:
    """What single routes look at: each field at its worst."""

    def case(name: str, method: str, path: str, text: str) -> Case:
        return Case(f"{method} {path}: {name}", method, path, text.encode(), headers=[JSON])

    name256 = "\u03b1\u0313\u0300\u0345" * 64
    for text in (
        "\ufdfa" * 256,
        name256,
        "e\u0301" * 128,
        "\u1100\u1161" * 64,
        "a\u0300\u0316" * 85,
    ):
        for path in ("/login", "/register", "/admin/users"):
            body = {"username": text, "password": "p" * 256}
            yield case("a username to normalize", "POST", path, json.dumps(body))
    for password in ("a" * 256, "qwerty123" * 28, "aA1!" * 64, "\ufdfa" * 256, "password1" * 28):
        yield case(
            "a password",
            "POST",
            "/register",
            json.dumps({"username": "somebody", "password": password}),
        )
        yield case(
            "a password",
            "POST",
            "/me/password",
            json.dumps({"current_password": "x", "new_password": password}),
        )
        yield case(
            "a password", "PATCH", f"/admin/users/{NOBODY}", json.dumps({"password": password})
        )
    for email in (
        "a." * 120 + "a@example.org",
        "a@" + "a." * 125,
        '"' + "\\a" * 120 + '"@a.org',
        "a@" + "a-" * 125,
        "a" * SIZE,
    ):
        yield case("an address", "PATCH", "/me", json.dumps({"email": email}))
    lists = {
        "roles": [
            ("PUT", f"/admin/users/{NOBODY}/roles", "{{{}}}"),
            ("POST", "/admin/users", '{{"username":"x","password":"kumquat vienna 7",{}}}'),
        ],
        "permissions": [
            ("POST", "/admin/roles", '{{"name":"x",{}}}'),
            ("PATCH", "/admin/roles/probe", "{{{}}}"),
        ],
        "includes": [
            ("POST", "/admin/roles", '{{"name":"x",{}}}'),
            ("PATCH", "/admin/roles/probe", "{{{}}}"),
        ],
        "allowed_roles": [
            ("POST", "/admin/clients", '{{"name":"x","audiences":[],"grants":[],{}}}'),
            ("PATCH", f"/admin/clients/{NOBODY}", "{{{}}}"),
        ],
        "audiences": [
            ("POST", "/admin/clients", '{{"name":"x","allowed_roles":[],"grants":[],{}}}'),
            ("PATCH", f"/admin/clients/{NOBODY}", "{{{}}}"),
        ],
        "grants": [("PATCH", f"/admin/clients/{NOBODY}", "{{{}}}")],
    }
    for member, places in lists.items():
        for method, path, frame in places:
            for item in ('"!"', "0", "null", "{}", "[]", '"a{}"', '"p{}:read"'):
                for size in (SIZE, 512 * 7, 256 * 12, 64 * 6):
                    text = numbered(
                        item if "a" in item else item.replace("{}", "{{}}"),
                        size - 120,
                        f'"{member}":[',
                        "]",
                    )
                    yield case(
                        f"{member} of {item}, {size} bytes", method, path, frame.format(text)
                    )
    both = '{{"name":"x",{},{}}}'.format(
        numbered('"p{}:!"', 255 * 9, '"permissions":[', "]"),
        filled('"!"', 63 * 5, '"includes":[', "]"),
    )
    yield case("both lists at their limit", "POST", "/admin/roles", both)
    everything = {f"{n}" * 30: n for n in range(60)}
    yield case("unknown members", "POST", "/login", json.dumps(everything))
    for token in ("a." * 4_000, "eyJ" + "A" * 8_000 + ".e30.AA", "a" * 8_192, "." * 8_192):
        yield case("a token", "POST", "/admin/tokens/revoke", json.dumps({"token": token}))


def of_forms() -> Iterator[Case]:
    """OAuth's endpoints, with a client that is unknown and one that is not told."""
    texts = {
        "members": numbered("{:x}=1", by="&"),
        "bare members": filled("a", by="&"),
        "32 members": numbered("a{}=1", 200, by="&") + "&b=" + "%41" * 20_000,
        "semicolons": filled("a=1", by=";"),
        "escapes": "client_id=" + "%C3%A9" * 10_000,
        "plus": "client_id=" + "+" * 65_000,
        "scope": "client_id=x&grant_type=client_credentials&scope="
        + filled("a:b", 65_000, by="%20"),
        "a token": "client_id=x&token=" + "a." * 32_000,
    }
    for path in ("/oauth/token", "/oauth/introspect", "/oauth/revoke"):
        for name, text in texts.items():
            yield Case(f"POST {path}: {name}", "POST", path, text.encode()[:SIZE], headers=[FORM])


def of_heads(size: int) -> Iterator[Case]:
    """Query strings, cookies and headers of ``size`` bytes."""
    queries = {
        "names": numbered("{:x}", size, by="&"),
        "one name": filled("a", size, by="&"),
        "empty": "&" * size,
        "escapes": "q=" + "%C3%A9" * (size // 6),
        "permission": "permission=" + "a" * (size - 11),
    }
    gets = sorted(
        {
            (
                route.method,
                route.path.replace("<uuid:user_id>", NOBODY)
                .replace("<uuid:client_id>", NOBODY)
                .replace("<name>", "probe")
                .replace("<path:name>", "swagger-ui.css")
                .replace("<code>", "not_found")
                .replace("<uuid:session_id>", NOBODY),
            )
            for route in TABLE
            if route.method in {"GET", "DELETE"}
        }
    )
    for name, query in queries.items():
        for method, path in gets:
            if method == "GET" or path.startswith("/admin/roles"):
                yield Case(f"{method} {path}?: {name}, {size}", method, path, query=query.encode())
    kinds = {
        "cookie": (
            filled("a", size, by=";"),
            numbered("{:x}=1", size, by=";"),
            "=" * size,
            filled('a="\\101"', size, by=";"),
            'a="' + "\\101" * (size // 4),
            " ;" * (size // 2),
        ),
        "accept": (
            filled("a/b", size),
            filled("a/b;q=0.1", size),
            ";" * size,
            "," * size,
            filled("*/*;a=b", size),
            'a/b;a="' + "\\" * (size - 9),
        ),
        "accept-language": (filled("aa", size),),
        "if-match": (filled('""', size), filled('"a"', size), "," * size, '"' * size, "a" * size),
        "if-none-match": (filled('""', size), filled('W/"a"', size), "," * size, '"' * size),
        "if-modified-since": ("1 " * (size // 2), "(" * size, "Thu, " * (size // 5), ":" * size),
        "range": ("bytes=" + filled("0-1", size - 6), "bytes=" + "," * (size - 6)),
        "x-forwarded-for": (filled("1", size), "," * size, filled("::1", size)),
        "x-csrf-token": ("a" * size,),
        "user-agent": ("\xe9" * size,),
        "x-request-id": ("a" * size, "a" * 128 + "\xe9" * (size - 128)),
        "authorization": (
            "Bearer " + "a." * (size // 2),
            "Basic " + "A" * (size - 6),
            "," * size,
            "Bearer " + "." * size,
            "Bearer " + " " * size + "a",
        ),
        "access-control-request-headers": (filled("a", size), filled("authorization", size)),
        "origin": ("https://" + "a." * (size // 2), "https://app.example.org" + " " * size),
        "content-type": (
            "application/json" + ";a=b" * (size // 4),
            "a" * size,
            'application/json;a="' + "\\" * (size - 20),
            ";" * size,
        ),
        "content-encoding": ("a," * (size // 2),),
        "transfer-encoding": ("a," * (size // 2),),
        "traceparent": ("00-" * (size // 3),),
    }
    for header, values in kinds.items():
        for value in values:
            sent = [(header.encode(), value.encode("latin-1"))]
            where = (
                ("GET", "/me"),
                ("GET", "/admin/audit"),
                ("GET", "/docs/swagger-ui.css"),
                ("GET", "/.well-known/jwks.json"),
                ("POST", "/login"),
                ("OPTIONS", "/login"),
                ("PATCH", f"/admin/users/{NOBODY}"),
                ("POST", "/logout"),
                ("POST", "/oauth/token"),
            )
            for method, path in where:
                body = b'{"username":"a","password":"b"}' if path == "/login" else b""
                if method == "PATCH":
                    body = b'{"email":null}'
                more = [JSON] if body and header != "content-type" else []
                if path == "/oauth/token":
                    body, more = b"grant_type=client_credentials&client_id=x", [FORM]
                name = f"{method} {path}: {header} {value[:24]!r}, {size}"
                yield Case(name, method, path, body, headers=sent + more)
    many = [(f"x-{n:x}".encode(), b"1") for n in range(size // 8)]
    yield Case(f"GET /me: many headers, {size}", "GET", "/me", headers=many)
    yield Case(f"GET a path of slashes, {size}", "GET", "/" + "a/" * (size // 2))
    yield Case(f"GET a path of escapes, {size}", "GET", "/problems/" + "\xe9" * (size // 2))
    yield Case(f"GET a role, {size}", "GET", "/admin/roles/" + "a" * size)


def cases() -> Iterator[Case]:
    """Return every request there is to ask."""
    changing = [route for route in TABLE if route.method != "GET" and "/oauth/" not in route.path]
    for name, body in bodies():
        for route in changing:
            path = route.path
            for part in ("user_id", "client_id", "session_id"):
                path = path.replace(f"<uuid:{part}>", NOBODY)
            path = path.replace("<name>", "probe")
            yield Case(f"{route.method} {path}: {name}", route.method, path, body, headers=[JSON])
    yield from of_routes()
    yield from of_lists()
    yield from of_forms()
    yield from of_heads(HEAD)
    yield from of_heads(SIZE)


class Stopwatch:
    """The longest that a callback of the loop took, in seconds of its thread's CPU time."""

    def __init__(self) -> None:
        self.longest = 0.0

    @contextmanager
    def running(self) -> Iterator[Stopwatch]:
        """Time every callback inside the block; the loop must be asyncio's own."""
        run = asyncio.Handle._run  # type: ignore[attr-defined]  # noqa: SLF001

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.longest = max(self.longest, time.thread_time() - began)

        asyncio.Handle._run = timed  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            yield self
        finally:
            asyncio.Handle._run = run  # type: ignore[attr-defined]  # noqa: SLF001


async def ask(
    app: AsyncFlask, case: Case, credentials: list[tuple[bytes, bytes]]
) -> tuple[int, bytes]:
    """Carry one request; return its status and body."""
    names = {name for name, _ in case.headers}
    headers = [
        (b"host", b"testserver"),
        *case.headers,
        *([] if b"authorization" in names or b"cookie" in names else credentials),
    ]
    if case.body:
        headers.append((b"content-length", str(len(case.body)).encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": case.method,
        "scheme": "http",
        "path": case.path,
        "query_string": case.query,
        "root_path": "",
        "headers": headers,
        "client": ("192.0.2.7", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[Any] = []
    incoming = [{"type": "http.request", "body": case.body, "more_body": False}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app.asgi(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


async def seed(app: AsyncFlask, credentials: list[tuple[bytes, bytes]]) -> None:
    """Make a page of everything, each entry as large as it may be."""
    small = [f"s{number}" for number in range(40)]
    for name in (*small, "probe"):
        body = json.dumps({"name": name}).encode()
        await ask(app, Case("seed", "POST", "/admin/roles", body, headers=[JSON]), credentials)
    for number in range(PAGE):
        permissions = [f"a:{n:x}" for n in range(256)]
        for path, body in {
            "/admin/roles": {
                "name": f"role{number}",
                "permissions": permissions,
                "description": "d" * 255,
            },
            "/admin/users": {
                "username": f"user{number:03}" + "u" * 57,
                "roles": small,
                "password": "kumquat vienna 7",
                "email": f"u{number}@example.org",
            },
            "/admin/clients": {
                "name": f"c{number}",
                "allowed_roles": [f"role{number}", "user"],
                "audiences": [f"audience{n}" for n in range(8)],
                "grants": [],
            },
        }.items():
            case = Case("seed", "POST", path, json.dumps(body).encode(), headers=[JSON])
            status, answer = await ask(app, case, credentials)
            if status != 201:
                raise RuntimeError(answer.decode())
        case = Case(
            "seed",
            "POST",
            "/login",
            headers=[JSON],
            body=b'{"username":"testuser","password":"testpass","transport":"json"}',
        )
        await ask(app, case, [])


def of_lists() -> Iterator[Case]:
    """The longest page of every list."""
    for path in ("users", "roles", "clients", "sessions", "audit"):
        yield Case(f"GET /admin/{path}: a page", "GET", f"/admin/{path}", query=b"limit=200")
    yield Case(
        "GET /admin/users: searched", "GET", "/admin/users", query=b"limit=200&q=" + b"u" * 254
    )
    yield Case("GET /admin/stats: a year", "GET", "/admin/stats", query=b"days=366")
    ndjson = [(b"accept", b"application/x-ndjson")]
    yield Case("GET /admin/audit: all", "GET", "/admin/audit", headers=ndjson)


async def sign_in(app: AsyncFlask) -> list[tuple[bytes, bytes]]:
    """Return the header of an administrator's new session."""
    body = b'{"username":"admin","password":"adminpass","transport":"json"}'
    status, answer = await ask(app, Case("login", "POST", "/login", body, headers=[JSON]), [])
    if status != 200:
        raise RuntimeError(answer.decode())
    return [(b"authorization", f"Bearer {json.loads(answer)['access_token']}".encode())]


async def measure(app: AsyncFlask, words: list[str]) -> list[tuple[float, int, str]]:
    """Return milliseconds, status and name of each case, the longest first."""
    credentials = await sign_in(app)
    for path in ("/openapi.json", "/docs", "/me"):
        await ask(app, Case("warm", "GET", path), credentials)
    await seed(app, credentials)
    found = []
    for case in cases():
        if words and not any(word in case.name for word in words):
            continue
        best, status = float("inf"), 0
        for _ in range(ROUNDS):
            watch = Stopwatch()
            with watch.running():
                status, _ = await ask(app, case, credentials)
            best = min(best, watch.longest * 1_000)
            if best < LIMIT_MILLISECONDS / 8:
                break
        found.append((best, status, case.name))
        if case.path.startswith("/logout") or "/roles" in case.path:
            # the session may have ended, or its token be stale
            credentials = await sign_in(app)
    return sorted(found, reverse=True)


async def run(settings: Settings, words: list[str]) -> list[tuple[float, int, str]]:
    """Prepare a service, and measure it."""
    parts = compose(settings)
    await migrate.upgrade(parts.database)
    await parts.keys.load()
    await bootstrap.prepare(
        parts.database,
        parts.accounts,
        parts.users,
        demo=True,
        public=False,
        admin_username=None,
        admin_password=None,
    )
    await parts.blocklist.stop()
    parts.passwords.close()
    await parts.database.close()
    app = create_app(settings)
    async with app.running():
        return await measure(app, words)


def main() -> int:
    """Print the longest; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT_MILLISECONDS)
    parser.add_argument("--shown", type=int, default=40)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rch-") as folder, EmbeddedRedis(Path(folder)) as redis:
        settings = Settings(
            secret_key=SECRET,
            data_dir=Path(folder),
            redis_url=redis.url,
            database_url=f"sqlite+aiosqlite:///{folder}/rolecall.sqlite3",
            cookie_secure=False,
            cors_origins=("https://app.example.org",),
            registration_open=True,
            trusted_proxies=1,
            argon2_memory_kib=64,
            argon2_iterations=1,
            login_failures_pair=10**6,
            login_failures_account=10**6,
            login_failures_address=10**6,
        )
        found = asyncio.run(run(settings, options.words))
    for milliseconds, status, name in found[: options.shown]:
        print(f"{milliseconds:8.2f} ms  {status}  {name}")
    over = [one for one in found if one[0] > options.limit]
    print(f"{len(found)} requests, {len(over)} over {options.limit:g} ms")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
