"""The bridge as an ASGI server sees it: scopes, headers, bodies and messages."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest
from flask import Response, g, request, stream_with_context
from werkzeug.exceptions import HTTPException

from api import asgi as bridge

from ._asgi import Exchange, body_messages, exchange, http_scope, make_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from api.asgi import AsyncFlask

CHUNKED = (b"transfer-encoding", b"chunked")


@pytest.fixture
def app() -> AsyncFlask:
    """Answers with what a view gets to see; errors are shaped, and marked by hooks."""
    app = make_app(MAX_CONTENT_LENGTH=100, BODY_TIMEOUT=0.05)

    @app.before_request
    async def note() -> None:
        g.id = "noted"

    @app.errorhandler(HTTPException)
    async def shape(error: HTTPException) -> tuple[dict[str, Any], int]:
        return {"code": error.code, "id": g.id}, error.code or 500

    @app.after_request
    async def mark(response: Response) -> Response:
        response.headers["X-After"] = "yes"
        return response

    @app.route("/", defaults={"path": ""}, methods=["GET", "POST"])
    @app.route("/<path:path>", methods=["GET", "POST"])
    async def view(path: str) -> dict[str, Any]:
        return {
            "path": request.path,
            "root": request.root_path,
            "url": request.url,
            "query": request.args.to_dict(),
            "remote": request.remote_addr,
            "body": request.get_data(as_text=True),
            "length": request.content_length,
            "headers": dict(request.headers),
        }

    return app


def test_the_application_is_a_coroutine_function(app: AsyncFlask) -> None:
    """By which uvicorn tells ASGI 3 from the ASGI of old: a bound method is none to it."""
    assert inspect.isfunction(app.asgi)
    assert inspect.iscoroutinefunction(app.asgi)
    assert app.asgi is app.asgi


async def seen(app: AsyncFlask, scope: dict[str, Any], *chunks: bytes) -> Any:
    answer = await exchange(app, scope, body_messages(*chunks))
    assert answer.status == 200, answer.body
    return app.json.loads(answer.body)


def headers(*pairs: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"headers": [(b"host", b"testserver"), *pairs]}


async def test_a_request_reads_as_it_was_sent(app: AsyncFlask) -> None:
    """Path, query, address and scheme arrive decoded."""
    scope = http_scope("/é/x", query_string=b"a=%C3%A9&b=1", scheme="https")
    got = await seen(app, scope)
    assert got["path"] == "/é/x"
    assert got["query"] == {"a": "é", "b": "1"}
    assert got["remote"] == "192.0.2.7"
    assert got["url"] == "https://testserver/é/x?a=é&b=1"


@pytest.mark.parametrize("path", ["/api/x", "/x"])
async def test_root_path_in_the_path_or_not(app: AsyncFlask, path: str) -> None:
    """Servers differ in whether `path` begins with `root_path`; the request is the same."""
    got = await seen(app, http_scope(path, root_path="/api"))
    assert (got["root"], got["path"], got["url"]) == ("/api", "/x", "http://testserver/api/x")
    got = await seen(app, http_scope("/apix", root_path="/api"))
    assert got["path"] == "/apix"


@pytest.mark.parametrize(
    ("server", "url"),
    [
        (None, "http://localhost/"),
        (("/run/app.sock", None), "http://localhost/"),
        (("::1", 8000), "http://[::1]:8000/"),
        (("10.0.0.1", 80), "http://10.0.0.1/"),
    ],
)
async def test_servers_without_an_address(app: AsyncFlask, server: Any, url: str) -> None:
    """Unix sockets, IPv6 and a missing client make a request all the same."""
    scope = http_scope(server=server, client=None, headers=[], http_version="1.0")
    got = await seen(app, scope)
    assert (got["url"], got["remote"]) == (url, None)


async def test_headers_join_and_underscores_are_dropped(app: AsyncFlask) -> None:
    """Repeated headers are joined, cookies with a semicolon; X_User never passes for X-User."""
    got = await seen(
        app,
        http_scope(
            **headers(
                (b"x_user", b"admin"),
                (b"x-list", b"a"),
                (b"x-list", b"b"),
                (b"cookie", b"a=1"),
                (b"cookie", b"b=2"),
                (b"x-latin", "é".encode("latin-1")),
                (b"content_length", b"7"),
            )
        ),
    )
    assert got["headers"] == {
        "Host": "testserver",
        "X-List": "a,b",
        "Cookie": "a=1; b=2",
        "X-Latin": "é",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "/a\0b"},
        {"path": "/a\ufffd"},
        {"path": "/\udc80"},
        {"path": "x"},
        {"path": "*"},
        {"path": ""},
        {"path": "http://testserver/x"},
        {"path": "testserver:443", "method": "CONNECT"},
        {"path": "/é\0"},
        headers((b"host", b"other")),
        headers((b"content-length", b"3"), (b"content-length", b"3")),
        headers((b"content-length", b"3"), CHUNKED),
        headers((b"content-length", b"-1")),
        headers((b"content-length", b"")),
        headers((b"content-length", b"\xb2")),
        headers((b"x-a", b"a\0b")),
        headers((b"x-a", b"a\r\nb: c")),
    ],
)
async def test_what_cannot_be_represented_is_400(app: AsyncFlask, changes: Any) -> None:
    """Refused in the application's own shape, hooks included; the view is not run."""
    answer = await exchange(app, http_scope(**changes))
    assert answer.status == 400
    assert app.json.loads(answer.body) == {"code": 400, "id": "noted"}
    assert answer.headers["x-after"] == "yes"
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "//x"},
        {"path": "///x/y"},
        {"path": "//é"},
        {"path": "/api//x", "root_path": "/api"},
        {"path": "//x", "root_path": "/api"},
        {"path": "//x", "raw_path": b"/%2fx"},
        {"path": "/x/y", "raw_path": b"/x%2Fy"},
        {"path": "/é/y", "raw_path": b"/%C3%A9%2fy"},
    ],
)
async def test_another_spelling_of_a_path_is_another_path(app: AsyncFlask, changes: Any) -> None:
    """Slashes that werkzeug takes away or a server decodes: 404, whatever a proxy made of them."""
    answer = await exchange(app, http_scope(**changes))
    assert answer.status == 404
    assert app.json.loads(answer.body) == {"code": 404, "id": "noted"}
    assert answer.headers["x-after"] == "yes"


async def test_a_percent_sign_is_no_slash(app: AsyncFlask) -> None:
    """What else is encoded, a sign encoded twice, or a query beside the raw path: read as ever."""
    for path, raw in (
        ("/a b", b"/a%20b"),
        ("/a%2fb", b"/a%252fb"),
        ("/a\\b", b"/a%5Cb"),
        ("/é", b"/%C3%A9?next=%2F"),
        ("/x", None),
        ("/x/", b"/x/"),
    ):
        assert (await seen(app, http_scope(path, raw_path=raw)))["path"] == path
    assert (await seen(app, http_scope("/api", root_path="/api")))["path"] == "/"


@pytest.mark.parametrize("key", ["REQUEST_URI", "RAW_URI"])
def test_another_spelling_of_a_path_is_another_path_for_wsgi(app: AsyncFlask, key: str) -> None:
    """By the path, and by the target where the server tells of it."""
    client = app.test_client()
    for path, target, status in (
        ("/x", "/x?a=%2f", 200),
        ("//x", "//x", 404),
        ("/x/y", "/x%2Fy", 404),
        ("/x/y", "/x/y", 200),
        ("/a b", "/a%20b", 200),
    ):
        environ = {"PATH_INFO": path, "REQUEST_URI": "", "RAW_URI": "", key: target}
        assert client.get("/", environ_overrides=environ).status_code == status, target


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"it", 200), (b"it:80", 200), (b"it:", 200), (b"[::1]:80", 200), (b"", 200),
        (b"a_b.%7e", 200), (b"*" * 300, 200), (b"a b", 400), (b"\xe9", 400), (b":::", 400),
        (b"[::1", 400), (b"a:b:c", 400), (b"a@b", 400), (b"a/b", 400), (b"a?b", 400),
        (b"it:x", 400),
        (b":80", 400), (b":", 400),
    ],
)  # fmt: skip
async def test_a_host_is_a_name_or_an_address(app: AsyncFlask, host: bytes, status: int) -> None:
    """Anything else is 400 (RFC 9112 section 3.2)."""
    answer = await exchange(app, http_scope("/seen", headers=[(b"host", host)]))
    assert answer.status == status


@pytest.mark.parametrize("path", ["", "*", "http://elsewhere/x", "//x//y", "/%2e%2e/", "/..", "x"])
async def test_no_path_is_a_500(app: AsyncFlask, path: str) -> None:
    """Request targets in every form are answered."""
    assert (await exchange(app, http_scope(path))).status < 500


async def test_chunked_bodies_read_like_announced_ones(app: AsyncFlask) -> None:
    """The view sees the same body and the same length either way."""
    announced = http_scope(method="POST", **headers((b"content-length", b"5")))
    chunked = http_scope(method="POST", **headers(CHUNKED))
    http2 = http_scope(method="POST", http_version="2")
    for scope in (announced, chunked, http2):
        got = await seen(app, scope, b"ab", b"", b"cde")
        assert (got["body"], got["length"]) == ("abcde", 5)
        assert "Transfer-Encoding" not in got["headers"]


async def test_bodies_up_to_the_limit(app: AsyncFlask) -> None:
    """Exactly the limit is read, forms too; one more is not."""
    scope = http_scope(
        method="POST",
        **headers(CHUNKED, (b"content-type", b"application/x-www-form-urlencoded")),
    )

    @app.post("/form")
    async def form() -> str:
        return request.form["a"]

    assert (await seen(app, scope, b"x" * 100))["length"] == 100
    answer = await exchange(app, scope | {"path": "/form"}, body_messages(b"a=" + b"x" * 98))
    assert answer.body == b"x" * 98
    assert (await exchange(app, scope, body_messages(b"x" * 100, b"x"))).status == 413


async def test_an_announced_oversize_is_413_at_once(app: AsyncFlask) -> None:
    """Nothing of the body is waited for; the answer is the application's; the connection closes."""
    for length in (b"101", b"9" * 18, b"9" * 5000):
        scope = http_scope(method="POST", **headers((b"content-length", length)))
        answer = await exchange(app, scope, [{"type": "http.disconnect"}])
        assert answer.status == 413
        assert app.json.loads(answer.body) == {"code": 413, "id": "noted"}
        assert answer.headers["connection"] == "close"
        assert answer.headers["x-after"] == "yes"


async def test_an_endless_body_is_413_at_the_limit(
    app: AsyncFlask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives beyond the limit is thrown away until the answer is out, and no longer."""
    monkeypatch.setattr(bridge, "LINGER", 0.05)
    answer = Exchange()

    async def endless() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    scope = http_scope(method="POST", **headers(CHUNKED))
    async with asyncio.timeout(5):
        await app.asgi(scope, endless, answer.send)
    assert (answer.status, answer.is_complete) == (413, True)
    assert answer.sent[1]["body"] == answer.body
    assert answer.sent[1]["more_body"] is True


async def test_a_server_whose_queue_is_full_is_emptied(app: AsyncFlask) -> None:
    """As with Hypercorn: the last send waits for room in the queue of unread body."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(2)
    answer = Exchange()

    async def feed() -> None:
        while True:
            await queue.put({"type": "http.request", "body": b"x" * 60, "more_body": True})
            # a queue is not fair: let whoever else waits for room have its turn
            await asyncio.sleep(0.001)

    async def send(message: dict[str, Any]) -> None:
        await answer.send(message)
        if message.get("more_body") is False:
            await queue.put({"type": "http.disconnect"})

    feeding = asyncio.create_task(feed())
    scope = http_scope(method="POST", **headers(CHUNKED))
    async with asyncio.timeout(5):
        await app.asgi(scope, queue.get, send)
    feeding.cancel()
    assert (answer.status, answer.is_complete) == (413, True)


@pytest.mark.parametrize("sent", [[], body_messages(b"x", ends=False)])
async def test_a_body_that_does_not_end_is_408(
    app: AsyncFlask, monkeypatch: pytest.MonkeyPatch, sent: list[Any]
) -> None:
    """One deadline for the whole body; the application shapes the answer."""
    monkeypatch.setattr(bridge, "LINGER", 0.05)
    scope = http_scope(method="POST", **headers((b"content-length", b"9")))
    answer = await exchange(app, scope, list(sent))
    assert answer.status == 408
    assert app.json.loads(answer.body) == {"code": 408, "id": "noted"}
    assert answer.headers["connection"] == "close"
    assert answer.is_complete


async def test_each_piece_of_a_dripped_body_does_not_buy_time(app: AsyncFlask) -> None:
    """Pieces that keep coming do not put the deadline off."""
    answer, drops = Exchange(), 0

    async def drip() -> dict[str, Any]:
        nonlocal drops
        drops += 1
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": drops < 90}

    scope = http_scope(method="POST", **headers((b"content-length", b"90")))
    async with asyncio.timeout(5):
        await app.asgi(scope, drip, answer.send)
    assert answer.status == 408


async def test_refusals_over_http2_name_no_connection(app: AsyncFlask) -> None:
    """HTTP/2 forbids the Connection header."""
    scope = http_scope(method="POST", http_version="2", **headers((b"content-length", b"101")))
    answer = await exchange(app, scope)
    assert answer.status == 413
    assert "connection" not in answer.headers


async def test_a_client_that_leaves_while_sending_is_forgotten(app: AsyncFlask) -> None:
    """No hook, no view, no answer, no error."""
    app.before_request_funcs[None].insert(0, lambda: pytest.fail("a hook ran"))
    scope = http_scope(method="POST", **headers((b"content-length", b"9")))
    answer = await exchange(
        app, scope, [*body_messages(b"x", ends=False), {"type": "http.disconnect"}]
    )
    assert answer.sent == []


async def test_a_hook_that_reads_a_refused_body_meets_the_refusal() -> None:
    """It is the 413, not an empty body."""
    app = make_app(MAX_CONTENT_LENGTH=3)

    @app.before_request
    async def read() -> Any:
        return {"read": request.get_data(as_text=True)}

    scope = http_scope(method="POST", **headers(CHUNKED))
    assert (await exchange(app, scope, body_messages(b"abcd"))).status == 413
    assert (await exchange(app, scope, body_messages(b"abc"))).body == b'{"read":"abc"}\n'


async def test_no_limit_means_one_mebibyte() -> None:
    """MAX_CONTENT_LENGTH = None is not an open door."""
    app = make_app(MAX_CONTENT_LENGTH=None)
    scope = http_scope(method="POST", **headers((b"content-length", b"1048577")))
    assert (await exchange(app, scope)).status == 413


async def test_streams_are_sent_as_they_come_and_closed() -> None:
    """A chunk is out before the next is made, and call_on_close comes last."""
    app, log = make_app(), []

    @app.get("/sync")
    async def sync() -> Response:
        @stream_with_context
        def generate() -> Iterator[str]:
            for chunk in ("one", "", "two"):
                log.append(f"made {chunk}")
                yield chunk + request.args.get("end", "")

        response = Response(generate())
        response.call_on_close(lambda: log.append("closed"))
        return response

    @app.get("/async")
    async def asynchronous() -> Response:
        async def generate() -> AsyncIterator[str]:
            for chunk in ("one", "two"):
                log.append(f"made {chunk}")
                yield chunk

        return Response(generate())  # type: ignore[arg-type]

    class Logged(Exchange):
        async def send(self, message: dict[str, Any]) -> None:
            log.append(f"sent {message.get('body', b'').decode()}")
            await super().send(message)

    one = Logged(body_messages())
    await app.asgi(http_scope("/sync"), one.receive, one.send)
    made_and_sent = ["sent ", "made one", "sent one", "made ", "made two", "sent two", "sent "]
    assert log == [*made_and_sent, "closed"]
    log.clear()
    await app.asgi(http_scope("/async"), one.receive, one.send)
    assert log == ["sent ", "made one", "sent one", "made two", "sent two", "sent "]
    assert one.is_complete


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_stream_that_fails_is_never_completed(
    is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged, and the server, which sees no end of the body, cuts the connection."""
    app, closed = make_app(), []

    def generate() -> Iterator[str]:
        yield "part"
        raise ZeroDivisionError

    async def generate_async() -> AsyncIterator[str]:
        for chunk in generate():
            yield chunk

    @app.get("/")
    async def view() -> Response:
        response = Response(generate_async() if is_async else generate())  # type: ignore[arg-type]
        response.call_on_close(lambda: closed.append(True))
        return response

    one = Exchange(body_messages())
    await app.asgi(http_scope(), one.receive, one.send)
    assert (one.body, one.is_complete, closed) == (b"part", False, [True])
    assert "A response failed on / [GET]" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_stream_ends_when_its_client_leaves(is_async: bool) -> None:
    """An endless stream is closed at the disconnect, and its finally clauses run."""
    app, log = make_app(), []

    async def generate_async() -> AsyncIterator[str]:
        try:
            yield "tick"
            await asyncio.Event().wait()
        finally:
            log.append("ended")

    def generate() -> Iterator[str]:
        try:
            while True:
                yield "tick"
        finally:
            log.append("ended")

    @app.get("/")
    async def view() -> Response:
        return Response(generate_async() if is_async else generate())  # type: ignore[arg-type]

    one, left = Exchange(body_messages()), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if one.incoming:
            return await one.receive()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        await one.send(message)
        if message.get("body"):
            left.set()

    async with asyncio.timeout(5):
        await app.asgi(http_scope(), receive, send)
    assert log == ["ended"]
    assert not one.is_complete


async def test_head_of_a_stream_has_no_body_and_closes_it() -> None:
    """The generator is closed unread."""
    app, closed = make_app(), []

    @app.get("/")
    async def view() -> Response:
        response = Response(iter(["never"]))
        response.call_on_close(lambda: closed.append(True))
        return response

    answer = await exchange(app, http_scope(method="HEAD"))
    assert (answer.body, answer.is_complete, closed) == (b"", True, [True])


async def test_headers_of_a_response_cannot_be_injected() -> None:
    """A line break in a value is an error of the view, never a second header."""
    app = make_app()

    @app.get("/")
    async def view() -> Response:
        return Response("x", headers={"X-A": request.args["v"]})

    answer = await exchange(app, http_scope(query_string=b"v=a%0d%0aSet-Cookie:%20b"))
    assert answer.status == 500
    assert "set-cookie" not in answer.headers


async def test_the_server_alone_says_the_date() -> None:
    """Werkzeug dates conditional answers; Hypercorn dates all, and twice is once too often."""
    app = make_app()

    @app.get("/kept")
    async def kept() -> Response:
        response = Response("kept")
        response.add_etag()
        return response.make_conditional(request)  # type: ignore[return-value]

    first = await exchange(app, http_scope("/kept"))
    etag = first.headers["etag"].encode()
    again = await exchange(app, http_scope("/kept", **headers((b"if-none-match", etag))))
    assert (first.status, again.status) == (200, 304)
    for one in (first, again):
        assert "date" not in one.headers


async def test_websockets_are_refused_politely(app: AsyncFlask) -> None:
    """One close, which servers answer with a 403; an unknown scope is an error."""
    one = Exchange([{"type": "websocket.connect"}])
    await app.asgi({"type": "websocket"}, one.receive, one.send)
    assert [message["type"] for message in one.sent] == ["websocket.close"]
    with pytest.raises(ValueError, match="smoke"):
        await app.asgi({"type": "smoke"}, one.receive, one.send)


def test_wsgi_bodies_are_capped_too(app: AsyncFlask) -> None:
    """Announced and unannounced bodies over WSGI meet the same limit, in the same shape."""
    client = app.test_client()
    assert client.post("/", data=b"x" * 100).get_json()["length"] == 100
    answer = client.post("/", data=b"x" * 101)
    assert (answer.status_code, answer.get_json()) == (413, {"code": 413, "id": "noted"})
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    for size, status in ((100, 200), (101, 413)):
        builder = {"input_stream": __import__("io").BytesIO(b"x" * size), "environ_base": chunked}
        answer = client.post("/", **builder)
        assert answer.status_code == status
    assert client.post("/", data=b"", headers={"X-A": "1"}).status_code == 200


def test_versions_of_http_that_there_are_not_are_refused() -> None:
    """h11 takes any two digits; and HTTP/1.0 has no chunks (RFC 9112 section 6.1)."""
    for version, more, status in (
        ("1.1", (), 200), ("1.0", (), 200), ("2", (), 200), ("3", (), 200), ("2.0", (), 400),
        ("9.9", (), 400), ("0.9", (), 400), ("", (), 400),
        ("1.0", ((b"transfer-encoding", b"chunked"),), 400),
    ):  # fmt: skip
        scope = http_scope(http_version=version, **headers(*more))
        _, refused = bridge.build_environ(scope)
        assert (refused is None) == (status == 200), version
        assert refused is None or refused.code == status
