"""Flask's documented behaviour, awaited: the same over ASGI and over WSGI."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import flask
import pytest
from flask import (
    Blueprint,
    Response,
    abort,
    after_this_request,
    current_app,
    flash,
    g,
    get_flashed_messages,
    redirect,
    request,
    session,
    stream_with_context,
)
from flask.views import MethodView, View
from werkzeug.exceptions import HTTPException, NotFound

from api.asgi import AsyncFlask, on_loop

from ._asgi import Asker, exchange, http_scope, make_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(params=["asgi", "wsgi"])
def ask(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)


def hook_into(target: AsyncFlask | Blueprint, name: str, seen: list[str]) -> None:
    """Register an async and a sync hook of each kind, which note that they ran."""

    @target.before_request
    async def before() -> None:
        await asyncio.sleep(0)
        seen.append(f"{name} before")

    @target.before_request
    def before_sync() -> None:
        seen.append(f"{name} before sync")

    @target.after_request
    async def after(response: Response) -> Response:
        await asyncio.sleep(0)
        seen.append(f"{name} after")
        return response

    @target.after_request
    def after_sync(response: Response) -> Response:
        seen.append(f"{name} after sync")
        return response

    @target.teardown_request
    async def teardown(exc: BaseException | None) -> None:
        await asyncio.sleep(0)
        seen.append(f"{name} teardown {exc!r}")


async def test_hooks_run_in_flasks_order(ask: Asker) -> None:
    """Before: app then blueprint, in order; after and teardown: the other way round."""
    app, blueprint, seen = make_app(), Blueprint("b", __name__), []
    hook_into(app, "app", seen)
    hook_into(blueprint, "bp", seen)

    @app.url_value_preprocessor
    def preprocess(endpoint: str | None, values: dict[str, Any] | None) -> None:
        seen.append(f"preprocess {endpoint} {values}")

    @app.teardown_appcontext
    async def teardown(exc: BaseException | None) -> None:
        seen.append("appcontext")

    @blueprint.get("/<int:n>")
    async def view(n: int) -> dict[str, int]:
        @after_this_request
        async def this(response: Response) -> Response:
            seen.append("after this")
            return response

        seen.append("view")
        return {"n": n}

    app.register_blueprint(blueprint)
    answer = await ask(app, "/7")
    assert answer.json() == {"n": 7}
    assert seen == [
        "preprocess b.view {'n': 7}",
        *("app before", "app before sync", "bp before", "bp before sync"),
        *("view", "after this"),
        *("bp after sync", "bp after", "app after sync", "app after"),
        *("bp teardown None", "app teardown None", "appcontext"),
    ]


@pytest.mark.parametrize("kind", ["async", "sync", "on_loop"])
async def test_before_request_that_answers_ends_the_request(ask: Asker, kind: str) -> None:
    """Neither a later hook nor the view runs; the after-request functions do."""
    app = make_app()

    async def answer_async() -> tuple[str, int]:
        return "stop", 418

    def answer_sync() -> tuple[str, int]:
        return "stop", 418

    hooks = {"async": answer_async, "sync": answer_sync, "on_loop": on_loop(answer_sync)}
    app.before_request(hooks[kind])
    app.before_request(lambda: pytest.fail("a later hook ran"))
    app.add_url_rule("/", "view", lambda: pytest.fail("the view ran"))

    @app.after_request
    async def mark(response: Response) -> Response:
        response.headers["X-After"] = "yes"
        return response

    answer = await ask(app, "/")
    assert (answer.status_code, answer.text, answer.headers["x-after"]) == (418, "stop", "yes")


@pytest.mark.parametrize("is_async", [True, False])
async def test_error_handlers(ask: Asker, is_async: bool) -> None:
    """The blueprint's handler comes before the app's, the nearest class before its base."""
    app, blueprint = make_app(), Blueprint("b", __name__, url_prefix="/b")

    def handler(text: str) -> Any:
        async def handle_async(error: Exception) -> tuple[str, int]:
            await asyncio.sleep(0)
            return f"{text} {type(error).__name__}", 400

        def handle(error: Exception) -> tuple[str, int]:
            return f"{text} {type(error).__name__}", 400

        return handle_async if is_async else handle

    app.register_error_handler(LookupError, handler("app"))
    app.register_error_handler(HTTPException, handler("http"))
    app.register_error_handler(404, handler("lost"))
    blueprint.register_error_handler(LookupError, handler("bp"))

    async def fail() -> str:
        raise KeyError("x")

    async def refuse() -> str:
        abort(403)

    app.add_url_rule("/fail", "fail", fail)
    app.add_url_rule("/refuse", "refuse", refuse)
    blueprint.add_url_rule("/fail", "fail", fail)
    app.register_blueprint(blueprint)
    for path, text in {
        "/fail": "app KeyError",
        "/b/fail": "bp KeyError",
        "/refuse": "http Forbidden",
        "/none": "lost NotFound",
    }.items():
        answer = await ask(app, path)
        assert (answer.status_code, answer.text) == (400, text)


async def test_unhandled_error_is_a_logged_500(
    ask: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    """The 500 handler shapes it, after-request runs, teardown sees the error, its text stays in."""
    app, torn = make_app(), []

    @app.get("/")
    async def view() -> str:
        raise ZeroDivisionError("secret words")

    @app.errorhandler(500)
    async def handle(error: Any) -> tuple[str, int]:
        return f"sorry for {type(error.original_exception).__name__}", 500

    @app.after_request
    async def mark(response: Response) -> Response:
        response.headers["X-After"] = "yes"
        return response

    @app.teardown_request
    async def teardown(exc: BaseException | None) -> None:
        torn.append(exc)

    answer = await ask(app, "/")
    assert (answer.status_code, answer.text) == (500, "sorry for ZeroDivisionError")
    assert answer.headers["x-after"] == "yes"
    assert "secret words" not in answer.text
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 1
    assert logged[0].startswith("Exception on / [GET]")
    assert "ZeroDivisionError: secret words" in logged[0]
    assert isinstance(torn[0], ZeroDivisionError)


async def test_an_error_at_teardown_is_logged_and_not_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Under ASGI and WSGI the server, whose log may show variables, is not given the exception."""
    app = make_app()
    app.add_url_rule("/", "view", lambda: "fine")

    @app.teardown_request
    async def teardown(_error: BaseException | None) -> None:
        raise ZeroDivisionError("torn")

    one = await exchange(app, http_scope())
    assert one.sent == []  # the server answers 500
    answer = await Asker("wsgi")(app, "/")
    assert answer.status_code == 500
    assert "torn" not in answer.text
    logged = [
        record for record in caplog.records if "A response failed on / [GET]" in record.message
    ]
    assert len(logged) == 2
    assert all("ZeroDivisionError: torn" in record.message for record in logged)
    assert not any(record.exc_info for record in logged)
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(ZeroDivisionError):
        await exchange(app, http_scope())
    with pytest.raises(ZeroDivisionError):
        await Asker("wsgi")(app, "/")


@pytest.mark.parametrize(
    "config", [{"TESTING": True}, {"PROPAGATE_EXCEPTIONS": True}, {"DEBUG": True}]
)
async def test_errors_propagate_where_configured(ask: Asker, config: dict[str, Any]) -> None:
    """TESTING, DEBUG and PROPAGATE_EXCEPTIONS hand the error to the caller; teardown still runs."""
    app, torn = make_app(**config), []
    app.teardown_request(torn.append)

    @app.get("/")
    async def view() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(app, "/")
    assert [type(exc) for exc in torn] == [ZeroDivisionError]


async def test_signals_reach_async_and_sync_receivers(ask: Asker) -> None:
    """Every signal of a request is sent, in order, and async receivers are awaited."""
    app, seen = make_app(), []
    names = [
        *("appcontext_pushed", "request_started", "got_request_exception", "request_finished"),
        *("request_tearing_down", "appcontext_tearing_down", "appcontext_popped"),
    ]

    def receivers(name: str) -> list[Any]:
        async def receive_async(sender: Any, **values: Any) -> None:
            await asyncio.sleep(0)
            seen.append(name)

        def receive(sender: Any, **values: Any) -> None:
            seen.append(name)

        return [receive_async, receive]

    kept = {name: receivers(name) for name in names}
    for name, pair in kept.items():
        for receiver in pair:
            getattr(flask, name).connect(receiver, app)

    @app.get("/")
    async def view() -> str:
        raise ZeroDivisionError

    assert (await ask(app, "/")).status_code == 500
    assert seen == [name for name in names for _ in range(2)]


async def test_session_flash_and_g(ask: Asker) -> None:
    """The session is opened and saved, flashed messages are read, `g` ends with the request."""
    app = make_app()

    @app.get("/set")
    async def set_it() -> str:
        session["user"] = "ada"
        flash("hello")
        g.mark = 1
        return f"{get_flashed_messages()} {g.mark}"

    @app.get("/get")
    async def get_it() -> str:
        return f"{session.get('user')} {'mark' in g} {current_app.name}"

    first = await ask(app, "/set")
    assert first.text == "['hello'] 1"
    cookie = first.headers["set-cookie"].partition(";")[0]
    second = await ask(app, "/get", headers={"Cookie": cookie})
    assert second.text == "ada False tests.unit"
    assert (await ask(app, "/get")).text == "None False tests.unit"


async def test_session_interface_of_ones_own_may_block_or_be_async(ask: Asker) -> None:
    """A session interface that waits does not hold up the loop."""
    app = make_app()

    class Sessions(flask.sessions.SessionInterface):
        def open_session(self, app: Any, request: Any) -> Any:
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            return flask.sessions.SecureCookieSession({"from": "thread"})

        async def save_session(self, app: Any, session: Any, response: Any) -> None:  # type: ignore[override]
            await asyncio.sleep(0)
            response.headers["X-Saved"] = session["from"]

    app.session_interface = Sessions()
    app.add_url_rule("/", "view", lambda: "ok")
    assert (await ask(app, "/")).headers["x-saved"] == "thread"


async def test_default_headers(ask: Asker) -> None:
    """They go out with every answer, errors too, once; what a view sets itself stands."""
    app = make_app()
    app.default_headers = {"X-Default": "default", "Cache-Control": "no-store"}

    @app.get("/own")
    async def own() -> Response:
        return Response("own", headers={"cache-control": "private"})

    for path, status, cache in (("/own", 200, "private"), ("/none", 404, "no-store")):
        answer = await ask(app, path)
        assert answer.status_code == status
        assert answer.headers.get_list("X-Default") == ["default"]
        assert answer.headers.get_list("Cache-Control") == [cache]


async def test_what_a_response_leaves_to_werkzeug(ask: Asker) -> None:
    """The length of a body in parts, a location that is not ASCII, no length on a 204."""
    app = make_app()

    @app.get("/parts")
    async def parts() -> Response:
        return Response(["a", "bc"])

    @app.get("/there")
    async def there() -> tuple[str, int, dict[str, str]]:
        return "", 302, {"Location": "/\u00fc"}

    @app.get("/nothing")
    async def nothing() -> Response:
        return Response("", 204)

    assert (await ask(app, "/parts")).headers["Content-Length"] == "3"
    assert (await ask(app, "/there")).headers["Location"] == "/%C3%BC"
    assert "Content-Length" not in (await ask(app, "/nothing")).headers


async def test_redirects_options_head_and_405(ask: Asker) -> None:
    """What Flask answers of itself is answered."""
    app = make_app()

    @app.get("/there/")
    async def there() -> str:
        return "there"

    @app.get("/go")
    async def go() -> Any:
        return redirect("/there/")

    assert (await ask(app, "/go")).headers["location"] == "/there/"
    assert (await ask(app, "/there")).status_code == 308
    options = await ask(app, "/there/", "OPTIONS")
    assert sorted(options.headers["allow"].split(", ")) == ["GET", "HEAD", "OPTIONS"]
    assert options.text == ""
    head = await ask(app, "/there/", "HEAD")
    assert (head.status_code, head.text, head.headers["content-length"]) == (200, "", "5")
    for method in ("POST", "FROBNICATE"):
        assert (await ask(app, "/there/", method)).status_code == 405


@pytest.mark.parametrize("status", [204, 304])
async def test_statuses_without_a_body(ask: Asker, status: int) -> None:
    """204 and 304 carry neither a body nor its length."""
    app = make_app()

    @app.get("/")
    async def view() -> tuple[str, int]:
        return "not to be seen", status

    answer = await ask(app, "/")
    assert (answer.status_code, answer.text) == (status, "")
    assert "content-length" not in answer.headers


async def test_class_based_views(ask: Asker) -> None:
    """Async and sync methods, an async dispatch, HEAD as GET, sync decorators: all answer."""
    app = make_app()

    class Item(MethodView):
        async def get(self, n: int) -> str:
            await asyncio.sleep(0)
            return f"got {n}"

        def put(self, n: int) -> str:
            return f"put {n}"

    class Whole(View):
        init_every_request = False

        async def dispatch_request(self) -> str:
            return "whole"

    def shout(view: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return current_app.ensure_sync(view)(*args, **kwargs).upper()

        return wrapper

    class Decorated(MethodView):
        decorators = (shout,)

        async def get(self) -> str:
            return "loud"

    app.add_url_rule("/item/<int:n>", view_func=Item.as_view("item"))
    app.add_url_rule("/whole", view_func=Whole.as_view("whole"))
    app.add_url_rule("/loud", view_func=Decorated.as_view("loud"))
    assert (await ask(app, "/item/1")).text == "got 1"
    assert (await ask(app, "/item/1", "HEAD")).status_code == 200
    assert (await ask(app, "/item/1", "PUT")).text == "put 1"
    assert (await ask(app, "/whole")).text == "whole"
    assert (await ask(app, "/loud")).text == "LOUD"


async def test_streams_of_every_kind(ask: Asker) -> None:
    """Generators, with context too, and async generators, with a status too, are streamed."""
    app, closed = make_app(), []

    @app.get("/plain")
    def plain() -> Iterator[str]:
        yield from ("a", "é")

    @app.get("/context")
    async def context() -> Response:
        def generate() -> Iterator[str]:
            yield request.args["name"]
            yield request.path

        response = Response(stream_with_context(generate()))
        response.call_on_close(lambda: closed.append("closed"))
        return response

    @app.get("/async")
    async def asynchronous() -> Any:
        async def generate() -> AsyncIterator[str | bytes]:
            yield "a"
            await asyncio.sleep(0)
            yield b"b"

        return generate(), 201, {"X-Kind": "async"}

    assert (await ask(app, "/plain")).text == "aé"
    assert (await ask(app, "/context?name=ada")).text == "ada/context"
    assert closed == ["closed"]
    answer = await ask(app, "/async")
    assert (answer.status_code, answer.text, answer.headers["x-kind"]) == (201, "ab", "async")


async def test_files_ranges_and_conditions(ask: Asker, tmp_path: Path) -> None:
    """A file is sent whole, in part, or not at all, as the request asks."""
    app = make_app()
    content = bytes(range(256)) * 1024
    (tmp_path / "file.bin").write_bytes(content)

    @app.get("/<name>")
    async def view(name: str) -> Response:
        return flask.send_from_directory(tmp_path, name, conditional=True)

    whole = await ask(app, "/file.bin")
    assert (whole.status_code, whole.content) == (200, content)
    part = await ask(app, "/file.bin", headers={"Range": "bytes=70000-200000"})
    assert (part.status_code, part.content) == (206, content[70000:200001])
    fresh = await ask(app, "/file.bin", headers={"If-None-Match": whole.headers["etag"]})
    assert (fresh.status_code, fresh.content) == (304, b"")
    head = await ask(app, "/file.bin", "HEAD")
    assert (head.content, head.headers["content-length"]) == (b"", str(len(content)))
    assert (await ask(app, "/none")).status_code == 404


async def test_a_hook_may_replace_the_error_by_a_response(ask: Asker) -> None:
    """An error in an after-request function is a 500, not a hang."""
    app = make_app()
    app.add_url_rule("/", "view", lambda: "ok")

    @app.after_request
    async def fail(response: Response) -> Response:
        raise NotFound if response.status_code == 200 else ZeroDivisionError

    assert (await ask(app, "/")).status_code == 500


def test_client_keeps_the_context_in_a_with_block() -> None:
    """`with client:` leaves request, session and g to be looked at, as Flask promises."""
    app = make_app()

    @app.get("/")
    async def view() -> str:
        session["n"] = 1
        g.n = 2
        return "ok"

    with app.test_client() as client:
        assert client.get("/?q=3").text == "ok"
        assert (session["n"], g.n, request.args["q"]) == (1, 2, "3")
    assert not flask.has_request_context()


def test_stock_contexts_and_commands_run_async_functions() -> None:
    """Contexts made by hand, and CLI commands, await async hooks on the background loop."""
    app, seen = make_app(), []
    hook_into(app, "app", seen)

    @app.get("/")
    async def view() -> str:
        return "ok"

    @app.cli.command("hello")
    def hello() -> None:
        async def inner() -> str:
            return current_app.name

        print(current_app.ensure_sync(inner)())  # noqa: T201

    with app.test_request_context("/"):
        assert app.full_dispatch_request().get_data(as_text=True) == "ok"
    assert seen[0] == "app before"
    assert seen[-1] == "app teardown None"
    assert app.test_cli_runner().invoke(args=["hello"]).output == "tests.unit\n"


async def test_context_left_on_a_loop_is_torn_down_after_it() -> None:
    """`with app.app_context()` in async code: async teardown follows, it is not lost."""
    app, seen = make_app(), []

    @app.teardown_appcontext
    async def teardown(exc: BaseException | None) -> None:
        seen.append(exc)

    with app.app_context():
        pass
    await asyncio.sleep(0.01)
    assert seen == [None]
