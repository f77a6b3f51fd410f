"""No traceback shows the value of a local variable, however logging was set up (58)."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog
from flask import Response
from rich.console import Console
from rich.logging import RichHandler

from api import logs
from api.app import create_app
from api.asgi import AsyncFlask
from api.background import Background
from api.settings import Settings
from tests.unit._asgi import exchange, http_scope

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

# A traceback shows lines of source too, and this one is in none of them.
PASSWORD = "hunter2-secret"


def unconfigured(_stream: io.StringIO) -> None:
    """Leave structlog's defaults: they print local variables where ``rich`` is importable."""


def structlog_in_json(stream: io.StringIO) -> None:
    """Structured tracebacks, which hold local variables by default."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),
    )


def structlog_through_logging(stream: io.StringIO) -> None:
    """structlog hands its events to the standard library, where ``rich`` prints them."""
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.render_to_log_kwargs,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    rich_logging(stream)
    names = ("request_id", "exception")
    pattern = "%(message)s " + " ".join(f"%({name})s" for name in names)
    logging.getLogger().handlers[-1].setFormatter(
        logging.Formatter(pattern, defaults=dict.fromkeys(names, "-"))
    )


def rich_logging(stream: io.StringIO) -> None:
    """The standard library's records, with local variables in tracebacks."""
    console = Console(file=stream, width=400)
    logging.getLogger().addHandler(
        RichHandler(console=console, rich_tracebacks=True, tracebacks_show_locals=True)
    )


def ours(stream: io.StringIO) -> None:
    """What ``rolecall serve`` sets up."""
    logs.configure("DEBUG")
    logging.getLogger().handlers[0].setStream(stream)  # type: ignore[attr-defined]


@pytest.fixture(
    params=[unconfigured, structlog_in_json, structlog_through_logging, rich_logging, ours]
)
def output(
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Callable[[], str]]:
    """Set logging up in one of many ways; return all that was written since."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("rolecall", "api", "alembic")}
    structlog.reset_defaults()
    stream = io.StringIO()
    request.param(stream)

    def written() -> str:
        captured = capfd.readouterr()
        return stream.getvalue() + captured.out + captured.err + caplog.text

    yield written
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, kept in levels.items():
        logging.getLogger(name).setLevel(kept)
    structlog.reset_defaults()


def fail() -> Any:
    """Raise with a password among the local variables."""
    password = PASSWORD
    raise LookupError(f"{len(password)} characters")


@pytest.fixture
async def failing(settings: Settings) -> AsyncIterator[AsyncFlask]:
    """An application that fails in every place where an error is logged."""
    app = create_app(settings)

    async def view() -> Any:
        return fail()

    async def unhandled() -> Any:
        raise ConnectionAbortedError

    @app.errorhandler(ConnectionAbortedError)
    async def handler(_error: Exception) -> Any:
        return fail()

    async def stream() -> Any:
        async def chunks() -> AsyncIterator[str]:
            yield "part"
            fail()

        return Response(chunks())  # type: ignore[arg-type]

    @app.teardown_request
    async def teardown(_error: BaseException | None) -> None:
        if app.config.get("FAIL_AT_TEARDOWN"):
            fail()

    app.add_url_rule("/view", "view", view)
    app.add_url_rule("/handler", "handler", unhandled)
    app.add_url_rule("/stream", "stream", stream)
    app.add_url_rule("/fine", "fine", lambda: "fine")
    async with app.running():
        yield app


@on_sqlite
async def test_an_error_in_a_view(failing: AsyncFlask, output: Callable[[], str]) -> None:
    """The log names the error and the request id that the client was told, no variable."""
    one = await exchange(failing, http_scope("/view"))
    assert one.status == 500
    logged = output()
    assert "unexpected_error" in logged
    assert one.headers["x-request-id"] in logged
    assert json.loads(one.body)["request_id"] == one.headers["x-request-id"]
    assert "LookupError: 14 characters" in logged
    assert PASSWORD not in logged


@on_sqlite
@pytest.mark.parametrize("path", ["/handler", "/stream"])
async def test_an_error_in_a_handler_or_a_stream(
    failing: AsyncFlask, output: Callable[[], str], path: str
) -> None:
    """Whatever fails behind the view is logged in the same way."""
    one = await exchange(failing, http_scope(path))
    logged = output()
    assert one.headers["x-request-id"] in logged
    assert "LookupError: 14 characters" in logged
    assert PASSWORD not in logged


@on_sqlite
async def test_an_error_at_teardown(failing: AsyncFlask, output: Callable[[], str]) -> None:
    """Nothing is handed to the server, whose own log is not ours to format."""
    failing.config["FAIL_AT_TEARDOWN"] = True
    one = await exchange(failing, http_scope("/fine"))
    assert one.sent == []
    logged = output()
    assert "LookupError: 14 characters" in logged
    assert PASSWORD not in logged


async def test_an_error_in_periodic_work(output: Callable[[], str]) -> None:
    """Background work that fails is logged without its variables."""

    async def work() -> None:
        fail()

    await Background(work, 1)._once()
    logged = output()
    assert "background_work_failed" in logged
    assert "LookupError: 14 characters" in logged
    assert PASSWORD not in logged


@on_sqlite
async def test_an_error_at_start_and_at_shutdown(
    settings: Settings, output: Callable[[], str]
) -> None:
    """A lifespan that fails, at its beginning or at its end."""
    for begins in (False, True):
        app = create_app(settings)

        @asynccontextmanager
        async def lifespan(_app: Any, begins: bool = begins) -> AsyncIterator[None]:
            if not begins:
                fail()
            yield
            fail()

        app.lifespan = lifespan
        incoming = [{"type": f"lifespan.{what}"} for what in ("startup", "shutdown")]
        one = await exchange(app, {"type": "lifespan"}, incoming)
        assert one.sent[-1]["type"].endswith(".failed")
        logged = output()
        assert "LookupError: 14 characters" in logged
        assert PASSWORD not in logged


@on_sqlite
async def test_an_application_under_test_still_raises(failing: AsyncFlask) -> None:
    """With PROPAGATE_EXCEPTIONS the error reaches the caller as it is."""
    failing.config["PROPAGATE_EXCEPTIONS"] = True
    failing.config["FAIL_AT_TEARDOWN"] = True
    for path in ("/stream", "/fine"):
        with pytest.raises(LookupError, match="14 characters"):
            await exchange(failing, http_scope(path))


@on_sqlite
async def test_a_text_that_cannot_be_encoded(
    failing: AsyncFlask, output: Callable[[], str]
) -> None:
    """A lone surrogate in an error's message does not keep the line from being written."""

    async def odd() -> Any:
        raise ValueError("\ud800")

    failing.view_functions["view"] = odd
    one = await exchange(failing, http_scope("/view"))
    assert one.status == 500
    assert one.headers["x-request-id"] in output()
