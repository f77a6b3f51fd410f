"""Flask, awaited natively on the server's own event loop.

It imports nothing of `api` but `portal` and `tracebacks`. Each `async_x` here is Flask 3.1's `x`
with its calls awaited, so read them side by side with `flask/app.py`; Flask is pinned below 3.2 for
their sake.
"""

# ruff: noqa: SLF001  # the contexts that Flask drives in private are driven here in its place
from __future__ import annotations

import asyncio
import contextvars
import functools
import io
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from inspect import isawaitable
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import anyio
from flask import Flask, Response, request
from flask.ctx import AppContext, RequestContext
from flask.globals import _cv_app, _cv_request
from flask.signals import (
    appcontext_popped,
    appcontext_pushed,
    appcontext_tearing_down,
    got_request_exception,
    request_finished,
    request_started,
    request_tearing_down,
)
from werkzeug.datastructures import ImmutableDict
from werkzeug.exceptions import (
    BadRequest,
    BadRequestKeyError,
    HTTPException,
    InternalServerError,
    NotFound,
    RequestEntityTooLarge,
    RequestTimeout,
)
from werkzeug.routing import RoutingException
from werkzeug.wsgi import FileWrapper, get_input_stream

from .portal import (
    Home,
    Way,
    background,
    blocking,
    in_thread,
    is_async,
    is_async_view,
    iterate,
    on_loop,
    way_of,
)
from .tracebacks import plain_traceback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from blinker import Signal
    from flask import Request
    from flask.typing import ResponseReturnValue
    from werkzeug.routing import MapAdapter

    Message = MutableMapping[str, Any]
    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    Lifespan = Callable[["AsyncFlask"], AbstractAsyncContextManager[Any]]

__all__ = ["REQUEST_ID", "AsyncFlask", "on_loop", "request_context", "request_globals"]

DEFAULT_MAX_CONTENT_LENGTH = 1024 * 1024
FILE_CHUNK = 64 * 1024
# In the environ: the id of the request, for the log, where the application gave it one.
REQUEST_ID = "rolecall.request_id"
LINGER = 1.0  # seconds a refused body is still read, so that its sender gets to see the answer

MAX_LENGTH_DIGITS = 18
# As ASGI servers spell them. h11 takes any two digits for a version.
VERSIONS = frozenset({"1.0", "1.1", "2", "3"})

_REWRITTEN = frozenset({b"location", b"content-location"})
_GIVEN_ONCE = frozenset({"CONTENT_LENGTH", "HTTP_HOST"})
_FORBIDDEN = re.compile(rb"[\0\r\n]").search
# RFC 9112 section 3.2: a name or an address, and a port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+,;=%-]+)(:\d*)?", re.ASCII)


def request_context() -> RequestContext:
    """The request context itself: each attribute of `request` costs a look-up of its own."""
    return _cv_request.get()


def request_globals() -> Any:
    """The object behind `g`."""
    return _cv_app.get().g


class AsyncFlask(Flask):
    """A Flask whose views, hooks and handlers may be `async def`, under ASGI and WSGI alike.

    `app.asgi` is the ASGI application, `app` the WSGI one. What is `async def` is awaited on the
    loop; what is sync runs in a worker thread and may block, unless it is marked `on_loop`.

    `lifespan(app)` gives the async context manager that is entered before the first request and
    left at shutdown, once for each event loop the application is used on.

    `default_headers` go out with every response that does not set them itself.

    Configuration: `MAX_CONTENT_LENGTH` (bytes, 1 MiB where None), `BODY_TIMEOUT` (seconds for the
    whole body, ASGI only), `SYNC_THREADS` (how many sync views and hooks run at once).
    """

    default_config = ImmutableDict(
        {
            **Flask.default_config,
            "MAX_CONTENT_LENGTH": DEFAULT_MAX_CONTENT_LENGTH,
            "BODY_TIMEOUT": 10.0,
            "SYNC_THREADS": 40,
        }
    )

    def __init__(self, *args: Any, lifespan: Lifespan | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lifespan = lifespan
        self.default_headers: Mapping[str, str] = {}
        self._homes: dict[asyncio.AbstractEventLoop, Home] = {}
        self._teardowns: set[asyncio.Task[None]] = set()

    # --- ASGI ---

    @functools.cached_property
    def asgi(self) -> Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]:
        """The ASGI application: `http` and `lifespan`; a `websocket` is refused with a 403."""

        # A function: uvicorn takes a method for the ASGI of old.
        async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
            await self._handle(scope, receive, send)

        return asgi

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._serve_lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000, "reason": ""})
        else:
            raise ValueError(f"unknown ASGI scope type {scope['type']!r}")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        environ, refused = build_environ(scope)
        try:
            await self._settle()
            await self._answer(environ, refused, receive, send)
        except Exception as error:
            if self._propagates():
                raise
            # Not handed to the server, which would log the exception as it likes. It sees that
            # the response is not complete: it answers 500, or cuts the connection so that nobody
            # takes a part of a body for the whole.
            self._log_failure("A response failed", environ, error)

    async def _answer(
        self, environ: WSGIEnvironment, refused: HTTPException | None, receive: Receive, send: Send
    ) -> None:
        if refused is None and _may_have_body(environ):
            try:
                body = await self._read_body(environ, receive)
            except HTTPException as error:
                refused = error
                _attach_refusal(environ, error)
            else:
                if body is None:
                    return  # The client has gone, and nobody else asked.
                _attach(environ, body)
        response = await self._respond(environ, refused)
        await deliver(
            response,
            environ,
            receive,
            send,
            default_headers=self.default_headers,
            must_close=refused is not None,
        )

    async def _read_body(self, environ: WSGIEnvironment, receive: Receive) -> bytes | None:
        limit = self._max_body()
        if int(environ.get("CONTENT_LENGTH", 0)) > limit:
            raise RequestEntityTooLarge
        try:
            async with asyncio.timeout(self.config["BODY_TIMEOUT"]):
                return await read_body(receive, limit)
        except TimeoutError:
            raise RequestTimeout from None

    def _max_body(self) -> int:
        limit: int | None = self.config["MAX_CONTENT_LENGTH"]
        return DEFAULT_MAX_CONTENT_LENGTH if limit is None else limit

    # --- Start-up and shutdown ---

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncFlask]:
        """Start the application on this loop, and shut it down: what a server's lifespan does."""
        await self._settle()
        try:
            yield self
        finally:
            await self._leave()

    async def _settle(self) -> None:
        """Make sure that the lifespan has been entered on this loop, whoever asked first."""
        loop = asyncio.get_running_loop()
        home = self._homes.get(loop)
        if home is None:
            self._homes = {k: h for k, h in self._homes.items() if not k.is_closed()}
            lifespan = self.lifespan(self) if self.lifespan else None
            home = self._homes[loop] = Home(lifespan, self.config["SYNC_THREADS"])
        if not home.is_ready:
            try:
                await home.started()
            except Exception:
                self._homes.pop(loop, None)
                raise
        Home.current.set(home)

    async def _leave(self) -> None:
        home = self._homes.pop(asyncio.get_running_loop(), None)
        if home is not None:
            await home.end()

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._settle()
        except Exception as error:  # noqa: BLE001  # whatever a lifespan may raise
            self.logger.error("Start-up failed\n%s", plain_traceback(error))  # noqa: TRY400
            await send({"type": "lifespan.startup.failed", "message": _one_line(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            failure = await self._shut_down()
        await send(failure or {"type": "lifespan.shutdown.complete"})

    async def _shut_down(self) -> Message | None:
        try:
            await self._leave()
        except Exception as error:  # noqa: BLE001  # whatever a lifespan may raise
            self.logger.error("Shutdown failed\n%s", plain_traceback(error))  # noqa: TRY400
            return {"type": "lifespan.shutdown.failed", "message": _one_line(error)}
        return None

    # --- WSGI ---

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application: the request is handled on the background loop of this process."""
        target = environ.get("REQUEST_URI") or environ.get("RAW_URI") or ""
        refused = _check_path(environ.get("PATH_INFO", ""), target.encode("latin-1", "replace"))
        try:
            _attach(environ, read_wsgi_body(environ, self._max_body()))
        except HTTPException as error:
            refused = error
            _attach_refusal(environ, error)

        async def handle() -> Response:
            await self._settle()
            return await self._respond(environ, refused)

        response: Any
        try:
            response = background().call(handle)
        except Exception as error:
            if self._propagates():
                raise
            self._log_failure("A response failed", environ, error)
            response = InternalServerError().get_response(environ)
        if isinstance(response.response, AsyncIterable):
            response.response = iterate(aiter(response.response))
        for name, value in self.default_headers.items():
            response.headers.setdefault(name, value)
        return response(environ, start_response)  # type: ignore[no-any-return]

    # --- One request ---

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Flask's; where nothing but the path decides, without asking the environ all over."""
        config, url_map = self.config, self.url_map
        if request is None or config["SERVER_NAME"] or config["TRUSTED_HOSTS"] is not None:
            return super().create_url_adapter(request)
        if url_map.host_matching or self.subdomain_matching:
            return super().create_url_adapter(request)
        return url_map.bind(
            request.host,
            script_name=request.root_path,
            subdomain=url_map.default_subdomain,
            url_scheme=request.scheme,
            default_method=request.method,
            path_info=request.path,
            query_args=request.query_string.decode("utf-8", "replace"),
        )

    async def _respond(self, environ: WSGIEnvironment, refused: HTTPException | None) -> Response:
        """Flask's `wsgi_app` up to the response: contexts pushed, dispatched, torn down."""
        ctx = self.request_context(environ)
        error: BaseException | None = None
        try:
            try:
                await self._push(ctx)
                return await self.async_full_dispatch_request(refused)
            except Exception as exc:  # noqa: BLE001  # whatever a view may raise
                error = exc
                return await self.async_handle_exception(exc)
            except BaseException as exc:
                error = exc
                raise
        finally:
            if "werkzeug.debug.preserve_context" in environ:
                environ["werkzeug.debug.preserve_context"](_cv_app.get())
                environ["werkzeug.debug.preserve_context"](_cv_request.get())
            if error is not None and self.should_ignore_error(error):
                error = None
            await self._pop(ctx, error)

    async def _push(self, ctx: RequestContext) -> None:
        app_ctx: AppContext | None = _cv_app.get(None)
        if app_ctx is None or app_ctx.app is not self:
            app_ctx = self.app_context()
            app_ctx._cv_tokens.append(_cv_app.set(app_ctx))
            ctx._cv_tokens.append((_cv_request.set(ctx), app_ctx))
            await self._signal(appcontext_pushed)
        else:
            ctx._cv_tokens.append((_cv_request.set(ctx), None))
        if ctx._session is None:
            interface = self.session_interface
            ctx._session = await self._call(interface.open_session, self, ctx.request)
            if ctx._session is None:
                ctx._session = interface.make_null_session(self)
        if ctx.url_adapter is not None:
            ctx.match_request()

    async def _pop(self, ctx: RequestContext, exc: BaseException | None) -> None:
        try:
            await self.async_do_teardown_request(exc)
            ctx.request.close()
        finally:
            token, app_ctx = ctx._cv_tokens.pop()
            _cv_request.reset(token)
            ctx.request.environ["werkzeug.request"] = None
            if app_ctx is not None:
                await self._pop_app(app_ctx, exc)

    async def _pop_app(self, app_ctx: AppContext, exc: BaseException | None) -> None:
        try:
            await self.async_do_teardown_appcontext(exc)
        finally:
            _cv_app.reset(app_ctx._cv_tokens.pop())
        await self._signal(appcontext_popped)

    async def async_full_dispatch_request(self, refused: HTTPException | None = None) -> Response:
        """Flask's, awaited. What the bridge `refused` is raised where the view would be called."""
        self._got_first_request = True
        try:
            await self._signal(request_started)
            rv = await self.async_preprocess_request()
            if rv is None:
                if refused is not None:
                    raise refused
                rv = await self.async_dispatch_request()
        except Exception as error:  # noqa: BLE001  # whatever a view may raise
            rv = await self.async_handle_user_exception(error)
        return await self.async_finalize_request(rv)

    async def async_preprocess_request(self) -> ResponseReturnValue | None:
        req = request_context().request
        names = (None, *reversed(req.blueprints))
        for name in names:
            for preprocess in self.url_value_preprocessors.get(name, ()):
                preprocess(req.endpoint, req.view_args)
        for name in names:
            for before in self.before_request_funcs.get(name, ()):
                rv: ResponseReturnValue | None = await self._call(before)
                if rv is not None:
                    return rv
        return None

    async def async_dispatch_request(self) -> ResponseReturnValue:
        req = request_context().request
        if req.routing_exception is not None:
            self.raise_routing_exception(req)
        rule = req.url_rule
        if getattr(rule, "provide_automatic_options", False) and req.method == "OPTIONS":
            return self.make_default_options_response()
        view = self.view_functions[rule.endpoint]  # type: ignore[union-attr]
        if way_of(view) is Way.IN_THREAD and is_async_view(view, req.method):
            return await view(**req.view_args)  # type: ignore[misc, arg-type, no-any-return]
        return await self._call(view, **req.view_args)  # type: ignore[arg-type, no-any-return]

    async def async_handle_user_exception(
        self, error: Exception
    ) -> HTTPException | ResponseReturnValue:
        if isinstance(error, BadRequestKeyError) and (
            self.debug or self.config["TRAP_BAD_REQUEST_ERRORS"]
        ):
            error.show_exception = True
        is_http = isinstance(error, HTTPException) and not self.trap_http_exception(error)
        # Proxied and routing exceptions are answers, not errors.
        if is_http and (error.code is None or isinstance(error, RoutingException)):  # type: ignore[attr-defined]
            return error  # type: ignore[return-value]
        handler = self._find_error_handler(error, request.blueprints)
        if handler is not None:
            return await self._call(handler, error)  # type: ignore[no-any-return]
        if is_http:
            return error  # type: ignore[return-value]
        raise error

    async def async_handle_exception(self, error: Exception) -> Response:
        await self._signal(got_request_exception, exception=error)
        if self._propagates():
            raise error
        self.log_exception((type(error), error, error.__traceback__))
        rv: Any = InternalServerError(original_exception=error)
        handler = self._find_error_handler(rv, request.blueprints)
        if handler is not None:
            rv = await self._call(handler, rv)
        return await self.async_finalize_request(rv, from_error_handler=True)

    def _propagates(self) -> bool:
        propagate: bool | None = self.config["PROPAGATE_EXCEPTIONS"]
        return self.testing or self.debug if propagate is None else propagate

    def log_exception(self, exc_info: Any) -> None:
        """Flask's, with a traceback that shows no local variables."""
        self._log_failure("Exception", request.environ, exc_info[1])

    def _log_failure(self, what: str, environ: WSGIEnvironment, error: BaseException) -> None:
        self.logger.error(
            "%s on %s [%s] request_id=%s\n%s",
            what,
            environ["PATH_INFO"],
            environ["REQUEST_METHOD"],
            environ.get(REQUEST_ID, "-"),
            plain_traceback(error),
        )

    async def async_finalize_request(
        self, rv: ResponseReturnValue | HTTPException, from_error_handler: bool = False
    ) -> Response:
        response = self.make_response(rv)
        try:
            response = await self.async_process_response(response)
            await self._signal(request_finished, response=response)
        except Exception as error:
            if not from_error_handler:
                raise
            self._log_failure("Error while an error was handled,", request.environ, error)
        return response

    async def async_process_response(self, response: Response) -> Response:
        ctx = _cv_request.get()
        for func in ctx._after_request_functions:
            response = await self._call(func, response)
        for name in chain(ctx.request.blueprints, (None,)):
            for func in reversed(self.after_request_funcs.get(name, ())):
                response = await self._call(func, response)
        session: Any = ctx._session
        if not self.session_interface.is_null_session(session):
            await self._call(self.session_interface.save_session, self, session, response)
        return response

    async def async_do_teardown_request(self, exc: BaseException | None) -> None:
        funcs = self._request_teardowns()
        await self._tear_down(funcs, request_tearing_down, exc)

    async def async_do_teardown_appcontext(self, exc: BaseException | None) -> None:
        funcs = self.teardown_appcontext_funcs[::-1]
        await self._tear_down(funcs, appcontext_tearing_down, exc)

    def do_teardown_request(self, exc: BaseException | None = None) -> None:
        """Flask's, for contexts that sync code pops; see `_deferred`."""
        if not self._deferred(self._request_teardowns(), self.async_do_teardown_request, exc):
            super().do_teardown_request(exc)

    def do_teardown_appcontext(self, exc: BaseException | None = None) -> None:
        """Flask's, for contexts that sync code pops; see `_deferred`."""
        funcs = self.teardown_appcontext_funcs
        if not self._deferred(funcs, self.async_do_teardown_appcontext, exc):
            super().do_teardown_appcontext(exc)

    def _request_teardowns(self) -> list[Callable[..., Any]]:
        funcs = self.teardown_request_funcs
        if not funcs:
            return []
        names = chain(request.blueprints, (None,))
        return [func for name in names for func in reversed(funcs.get(name, ()))]

    async def _tear_down(
        self, funcs: list[Callable[..., Any]], signal: Signal, exc: BaseException | None
    ) -> None:
        if funcs or signal.receivers:
            with anyio.CancelScope(shield=True):
                for func in funcs:
                    await self._call(func, exc)
                await self._signal(signal, exc=exc)

    def _deferred(
        self,
        funcs: Iterable[Callable[..., Any]],
        teardown: Callable[[BaseException | None], Coroutine[Any, Any, None]],
        exc: BaseException | None,
    ) -> bool:
        """Where a `with app.app_context()` ends on a loop, async teardown follows as a task."""
        if asyncio._get_running_loop() is None or not any(map(is_async, funcs)):
            return False
        task = asyncio.create_task(teardown(exc))
        self._teardowns.add(task)
        task.add_done_callback(self._teardowns.discard)
        return True

    # --- Calling what the application registered ---

    async def _call(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        way = way_of(func)
        if way is Way.AWAITED:
            return await func(*args, **kwargs)
        if way is Way.IN_PLACE:
            result = func(*args, **kwargs)
        else:
            result = await in_thread(func, *args, **kwargs)
        if result is None or isinstance(result, Response):  # what hooks give: asked first
            return result
        # A sync wrapper around an async function gives what that gave: an awaitable.
        return await result if isawaitable(result) else result

    async def _signal(self, signal: Signal, **values: Any) -> None:
        if signal.receivers:
            for receiver in signal.receivers_for(self):
                await self._call(receiver, self, **values)

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """On a loop: `func` itself, whose coroutine the caller awaits. In a thread: it blocks."""
        if asyncio._get_running_loop() is not None or not is_async(func):
            return func
        return self.async_to_sync(func)

    def async_to_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """A sync function that runs `func` on the request's loop, or on the background loop."""
        return blocking(func)

    def make_response(self, rv: Any) -> Response:
        """Flask's, and an async generator is a streamed body as a generator is."""
        body = rv[0] if isinstance(rv, tuple) and rv else rv
        if isinstance(body, AsyncIterator):
            streamed = self.response_class(body)  # type: ignore[arg-type]
            rv = (streamed, *rv[1:]) if isinstance(rv, tuple) else streamed
        return super().make_response(rv)


# --- From ASGI to WSGI's environ, which werkzeug reads ---


@functools.lru_cache(maxsize=512)
def _environ_key(name: bytes) -> str | None:
    """The environ's name of a header; None where it would pass for another header's."""
    key = name.decode("latin-1").upper()
    if "_" in key:
        return None
    key = key.replace("-", "_")
    return key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{key}"


def build_environ(scope: Scope) -> tuple[WSGIEnvironment, HTTPException | None]:
    """The WSGI environ of an ASGI request, and what it is refused with before any view is run."""
    server = scope.get("server") or ("localhost", None)
    scheme = scope.get("scheme", "http")
    version = scope.get("http_version", "1.1")
    root, path, is_text = _split_path(scope)
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": root,
        "PATH_INFO": path,
        "QUERY_STRING": scope.get("query_string", b"").decode("latin-1"),
        "SERVER_NAME": server[0] if server[1] is not None else "localhost",
        "SERVER_PORT": str(server[1] or (443 if scheme == "https" else 80)),
        "SERVER_PROTOCOL": f"HTTP/{version if version in VERSIONS else '1.1'}",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": _FileBody,
        "asgi.scope": scope,
    }
    if client := scope.get("client"):
        environ["REMOTE_ADDR"] = client[0]
        environ["REMOTE_PORT"] = str(client[1])
    refused = _add_headers(environ, scope["headers"])
    refused = refused or _check_path(path, scope.get("raw_path") or b"")
    if not is_text or version not in VERSIONS or not scope["path"].startswith("/"):
        refused = BadRequest()
    if refused is not None:
        _attach_refusal(environ, refused)
    return environ, refused


def _split_path(scope: Scope) -> tuple[str, str, bool]:
    """SCRIPT_NAME, PATH_INFO, and whether the path was UTF-8 text without NUL.

    Some servers leave `root_path` at the start of `path`, others take it away.
    """
    root = scope.get("root_path", "").rstrip("/")
    path: str = scope["path"]
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    if path.isascii() and root.isascii() and "\0" not in path:
        return root, path, True
    clean = path.replace("\0", "\ufffd").encode("utf-8", "replace")
    # Servers decode what is not UTF-8 to U+FFFD, which nobody sends on purpose.
    is_text = clean.decode() == path and "\ufffd" not in path
    return root.encode("utf-8", "replace").decode("latin-1"), clean.decode("latin-1"), is_text


def _check_path(path: str, raw: bytes) -> HTTPException | None:
    """Refuse what would become another path than a proxy in front has seen.

    werkzeug takes leading slashes away, and of an encoded slash PATH_INFO cannot tell.
    """
    if path.startswith("//") or (b"%" in raw and b"%2f" in raw.partition(b"?")[0].lower()):
        return NotFound()
    return None


def _add_headers(
    environ: WSGIEnvironment, headers: Iterable[tuple[bytes, bytes]]
) -> HTTPException | None:
    refused: HTTPException | None = None
    for name, raw in headers:
        key = _environ_key(name)
        if key is None:
            continue
        if _FORBIDDEN(raw) or (key in environ and key in _GIVEN_ONCE):
            refused = BadRequest("A header is malformed or given twice.")
        elif key in environ:
            separator = "; " if key == "HTTP_COOKIE" else ","
            environ[key] += separator + raw.decode("latin-1")
        else:
            environ[key] = raw.decode("latin-1")
    if environ.get("HTTP_HOST") == "":
        del environ["HTTP_HOST"]  # no authority is the server's own
    if "HTTP_HOST" in environ and not _is_host(environ["HTTP_HOST"]):
        refused = BadRequest("The Host header names no host.")
    return refused or _check_framing(environ)


@functools.lru_cache(maxsize=512)
def _is_host(value: str) -> bool:
    return bool(_HOST.fullmatch(value))


def _check_framing(environ: WSGIEnvironment) -> HTTPException | None:
    length = environ.get("CONTENT_LENGTH")
    if "HTTP_TRANSFER_ENCODING" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        # RFC 9112 section 6.1: whoever passed it on need not have understood it.
        return BadRequest("HTTP/1.0 has no Transfer-Encoding.")
    if length is None:
        return None
    if not (length.isascii() and length.isdigit()):
        return BadRequest("The Content-Length header is not a number.")
    if "HTTP_TRANSFER_ENCODING" in environ:
        # RFC 9112 section 6.3: two framings of one body are how requests are smuggled.
        return BadRequest("A body has either a Content-Length or a Transfer-Encoding.")
    return RequestEntityTooLarge() if len(length) > MAX_LENGTH_DIGITS else None


# --- The body of the request ---


def _may_have_body(environ: WSGIEnvironment) -> bool:
    """HTTP/1 announces a body in its headers, later versions need not."""
    length = environ.get("CONTENT_LENGTH")
    if length is not None:
        # Not int(): a refused request may hold anything here.
        return bool(length.strip("0"))
    return "HTTP_TRANSFER_ENCODING" in environ or not environ["SERVER_PROTOCOL"].startswith(
        "HTTP/1"
    )


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None where the client left; more than `limit` bytes are never kept."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        if chunk := message.get("body", b""):
            size += len(chunk)
            if size > limit:
                raise RequestEntityTooLarge
            chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def read_wsgi_body(environ: WSGIEnvironment, limit: int) -> bytes:
    """The whole body of a WSGI request, read where blocking is allowed."""
    # One more than the limit: werkzeug cuts an unannounced body off there without a word.
    body: bytes = get_input_stream(environ, max_content_length=limit + 1).read()
    if len(body) > limit:
        raise RequestEntityTooLarge
    return body


def _attach(environ: WSGIEnvironment, body: bytes) -> None:
    """Give the request its body, with the length it turned out to have."""
    environ["wsgi.input"] = io.BytesIO(body)
    if environ.pop("HTTP_TRANSFER_ENCODING", None) or body or environ.get("CONTENT_LENGTH"):
        environ["CONTENT_LENGTH"] = str(len(body))


def _attach_refusal(environ: WSGIEnvironment, error: HTTPException) -> None:
    """Let a hook that reads the body of a refused request meet the refusal, not an empty body."""
    environ["wsgi.input"] = _Refused(error)
    environ["wsgi.input_terminated"] = True


class _Refused(io.RawIOBase):
    def __init__(self, error: HTTPException) -> None:
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, _buffer: Any) -> int:
        raise self._error


# --- The response ---


class _FileBody(FileWrapper):
    """werkzeug's, in larger pieces: each is one trip to a worker thread."""

    def __init__(self, file: IO[bytes], _buffer_size: int = 0) -> None:
        super().__init__(file, FILE_CHUNK)


async def deliver(
    response: Response,
    environ: WSGIEnvironment,
    receive: Receive,
    send: Send,
    *,
    default_headers: Mapping[str, str],
    must_close: bool,
) -> None:
    """Send a response, then close it: its iterable, its file, its `call_on_close` functions."""
    context = contextvars.copy_context()
    try:
        headers = _headers(response, environ, default_headers)
        if must_close and environ["SERVER_PROTOCOL"].startswith("HTTP/1"):
            headers.append((b"connection", b"close"))
        start: Message = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": headers,
        }
        if response.is_sequence or _is_bodiless(response, environ):
            body = b"" if _is_bodiless(response, environ) else b"".join(response.iter_encoded())
            await send(start)
            if must_close and _may_have_body(environ):
                await _send_and_linger(body, receive, send)
            else:
                await send(_body(body))
        else:
            await send(start)
            await _send_stream(_chunks(response, context), receive, send)
    finally:
        await _close(response, context)


def _headers(
    response: Response, environ: WSGIEnvironment, defaults: Mapping[str, str]
) -> list[tuple[bytes, bytes]]:
    """The headers as ASGI has them; those of `defaults` that the response does not set, last."""
    headers = _encoded(response.headers)
    names = {name for name, _ in headers}
    status = response.status_code
    if b"content-length" not in names or names & _REWRITTEN or status < 200 or status in {204, 304}:
        # What werkzeug has to add, absolute URLs and lengths, is mostly there already.
        headers = _encoded(response.get_wsgi_headers(environ))
    if b"date" in names:
        # Werkzeug dates what may be kept, and every server dates everything: once will do.
        headers = [header for header in headers if header[0] != b"date"]
    return headers + [one for one in _defaults(tuple(defaults.items())) if one[0] not in names]


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(_header_name(name), value.encode("latin-1")) for name, value in headers]


@functools.lru_cache(maxsize=16)
def _defaults(headers: tuple[tuple[str, str], ...]) -> list[tuple[bytes, bytes]]:
    return _encoded(headers)


@functools.lru_cache(maxsize=512)
def _header_name(name: str) -> bytes:
    return name.lower().encode("latin-1")


def _is_bodiless(response: Response, environ: WSGIEnvironment) -> bool:
    status = response.status_code
    return environ["REQUEST_METHOD"] == "HEAD" or status < 200 or status in {204, 304}


def _body(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _send_and_linger(body: bytes, receive: Receive, send: Send) -> None:
    """Answer a request whose body was not read to its end.

    Closed while its client still sends, a connection is reset and the answer lost with it. And a
    server whose queue is full of unread body waits for us to empty it while we wait for it to
    close. So somebody reads until the very end.
    """
    await send(_body(body, more=True))
    reading = asyncio.create_task(_body_ended(receive))
    try:
        await asyncio.wait({reading}, timeout=LINGER)
        await send(_body(b""))
    finally:
        reading.cancel()


async def _send_stream(chunks: AsyncGenerator[bytes], receive: Receive, send: Send) -> None:
    """Send chunks as they come, and stop asking for more once the client has gone."""
    with anyio.CancelScope() as scope:
        watching = asyncio.create_task(_cancel_when_gone(receive, scope))
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk:
                        await send(_body(chunk, more=True))
            await send(_body(b""))
        finally:
            watching.cancel()


async def _body_ended(receive: Receive) -> Message:
    """Read past what is left of the body."""
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return message


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    message = await _body_ended(receive)
    if message["type"] == "http.request":
        message = await receive()
    if message["type"] == "http.disconnect":
        scope.cancel()


async def _chunks(response: Response, context: contextvars.Context) -> AsyncGenerator[bytes]:
    if isinstance(response.response, AsyncIterable):
        async for item in response.response:
            yield item.encode() if isinstance(item, str) else item
        return
    # One context for all steps: stream_with_context sets in the first what it resets in the last.
    steps = iter(response.iter_encoded())
    while (chunk := await in_thread(context.run, next, steps, None)) is not None:
        yield chunk


async def _close(response: Response, context: contextvars.Context) -> None:
    if response.is_sequence and not response._on_close:
        response.close()
        return
    with anyio.CancelScope(shield=True):
        if isinstance(response.response, AsyncGenerator):
            await response.response.aclose()
        await in_thread(context.run, response.close)


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
