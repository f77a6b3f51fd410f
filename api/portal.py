"""Where code runs: on the event loop, in a worker thread, or on the background loop under WSGI.

A leaf: it imports nothing of `api`. `asgi.py` is built on it.
"""

# ruff: noqa: SLF001  # asyncio exports _get_running_loop, the one question here that cannot raise
from __future__ import annotations

import asyncio
import atexit
import contextvars
import enum
import functools
import inspect
import os
import threading
from contextlib import AbstractAsyncContextManager, ExitStack, suppress
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from anyio import CancelScope, CapacityLimiter, from_thread, to_thread
from anyio.lowlevel import current_token
from flask.sessions import SecureCookieSessionInterface
from flask.views import MethodView, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from anyio.from_thread import BlockingPortal

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

# View.as_view makes the view from one of these bodies. A view with another body has been wrapped,
# and what a wrapper does on the way, such as block, is not known.
_AS_VIEW = frozenset(
    code for code in inspect.unwrap(View.as_view).__code__.co_consts if isinstance(code, CodeType)
)


# Flask's own session is a signed cookie: nothing in it waits.
_NEVER_BLOCK = (
    SecureCookieSessionInterface.open_session,
    SecureCookieSessionInterface.save_session,
)


def on_loop(func: F) -> F:
    """Mark a sync view or hook as one that never blocks: it is called on the event loop itself.

    Without the mark it runs in a worker thread, which costs it some 100 µs.
    """
    # The function itself, not True: functools.wraps copies the mark onto wrappers that may block.
    func.__on_loop__ = func  # type: ignore[attr-defined]
    return func


def is_on_loop(func: Callable[..., Any]) -> bool:
    """Whether this very function was marked with `on_loop`, or is known never to block."""
    func = getattr(func, "__func__", func)
    return getattr(func, "__on_loop__", _AS_VIEW) is func or func in _NEVER_BLOCK


def is_async(func: Callable[..., Any]) -> bool:
    """Whether calling `func` gives a coroutine: partials, methods and callable objects too."""
    if type(func) is FunctionType and func.__code__.co_flags & inspect.CO_COROUTINE:
        return True
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(type(func), "__call__", None)  # noqa: B004  # the method, not whether there is one
    )


class Way(enum.Enum):
    """How a function that the application registered is called from the loop."""

    AWAITED = enum.auto()
    IN_PLACE = enum.auto()
    IN_THREAD = enum.auto()


def way_of(func: Callable[..., Any]) -> Way:
    """How to call `func`; what was found of a function or method is remembered."""
    function = getattr(func, "__func__", func)
    return _way_of_function(function) if type(function) is FunctionType else _find_way(func)


def _find_way(func: Callable[..., Any]) -> Way:
    if is_on_loop(func):
        return Way.IN_PLACE
    return Way.AWAITED if is_async(func) else Way.IN_THREAD


_way_of_function = functools.lru_cache(maxsize=4096)(_find_way)


def is_async_view(view: Callable[..., Any], method: str) -> bool:
    """Whether a class-based view answers `method` with a coroutine, nothing wrapped around it."""
    if getattr(view, "__code__", None) not in _AS_VIEW:
        return False
    view_class: type[View] = view.view_class  # type: ignore[attr-defined]
    handler: Any = view_class.dispatch_request
    if handler is MethodView.dispatch_request:
        handler = getattr(view_class, method.lower(), None)
        if handler is None and method == "HEAD":
            handler = getattr(view_class, "get", None)
    return handler is not None and is_async(handler)


_lives: set[asyncio.Task[None]] = set()


class Home:
    """What one application has on one event loop: its start-up, and its worker threads.

    The lifespan lives in a task of its own, so whoever starts it (the server, a test, the first
    request) need not be who ends it, and a loop that closes ends it in order.
    """

    current: contextvars.ContextVar[Home] = contextvars.ContextVar("rolecall.home")

    def __init__(self, lifespan: AbstractAsyncContextManager[Any] | None, threads: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.token = current_token()
        self.limiter = CapacityLimiter(threads)
        self.is_ready = lifespan is None
        self._started: asyncio.Future[None] = self.loop.create_future()
        self._ending = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        if lifespan is not None:
            # An empty context: start-up does not belong to the request that happens to be first.
            context = contextvars.Context()
            self._life = self.loop.create_task(self._live(lifespan), context=context)
            # A loop holds its tasks weakly, and a lifespan is left even if its app is forgotten.
            _lives.add(self._life)
            self._life.add_done_callback(_lives.discard)

    async def _live(self, lifespan: AbstractAsyncContextManager[Any]) -> None:
        try:
            async with lifespan:
                self.is_ready = True
                self._started.set_result(None)
                # A closing loop cancels its tasks: that is a request to end, in order.
                with suppress(asyncio.CancelledError):
                    await self._ending.wait()
        except BaseException as error:
            if self._started.done():
                raise
            if isinstance(error, Exception):
                self._started.set_exception(error)
            else:
                self._started.cancel()
                raise
        finally:
            self.is_ready = False

    async def started(self) -> None:
        """Wait for start-up; raises what start-up raised."""
        await asyncio.shield(self._started)

    async def end(self) -> None:
        """Leave the lifespan; raises what shutdown raised."""
        self._ending.set()
        if self._life is not None:
            await self._life


class _Job:
    """One call in a worker thread, in a context that outlives it."""

    __slots__ = ("call", "context", "finished", "started")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.context = contextvars.copy_context()
        self.started = False
        self.finished = threading.Event()

    def __call__(self) -> Any:
        self.started = True
        try:
            return self.context.run(self.call)
        finally:
            self.finished.set()


async def in_thread(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a sync function in a worker thread; context variables go there and come back.

    A cancelled call is waited for: nothing is torn down while the thread still uses it.
    """
    job = _Job(functools.partial(func, *args, **kwargs))
    home = Home.current.get(None)
    try:
        return await to_thread.run_sync(job, limiter=home.limiter if home else None)
    except asyncio.CancelledError:
        if job.started:
            with CancelScope(shield=True):
                await to_thread.run_sync(job.finished.wait, limiter=CapacityLimiter(1))
        raise
    finally:
        _adopt(job.context)


def _adopt(context: contextvars.Context) -> None:
    """Set here what was set in `context`, as if the call had been made in place."""
    for variable, value in context.items():
        if variable.get(_AS_VIEW) is not value:
            variable.set(value)


def blocking(func: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make a sync function of an async one: called in a thread, it runs on the request's loop.

    Outside of a request it runs on the background loop. Called on a loop, which must not block,
    it gives the coroutine itself, for the caller to await.
    """

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if asyncio._get_running_loop() is not None:
            return func(*args, **kwargs)  # type: ignore[return-value]
        context = contextvars.copy_context()

        async def there() -> T:
            nonlocal context
            try:
                return await func(*args, **kwargs)
            finally:
                context = contextvars.copy_context()

        home = Home.current.get(None)
        try:
            if home is None or not home.loop.is_running():
                return background().call(there)
            return from_thread.run(there, token=home.token)
        finally:
            _adopt(context)

    return call


def iterate(chunks: AsyncIterator[T]) -> Iterator[T]:
    """Read an async iterator from a thread, each step on the background loop."""
    portal = background()
    done = object()

    async def step() -> T | object:
        return await anext(chunks, done)

    async def close() -> None:
        if hasattr(chunks, "aclose"):
            await chunks.aclose()

    try:
        while (chunk := portal.call(step)) is not done:
            yield chunk  # type: ignore[misc]
    finally:
        portal.call(close)


class _Background:
    """The one event loop of this process for callers that have none; made at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exits = ExitStack()
        self._portal: BlockingPortal | None = None

    def portal(self) -> BlockingPortal:
        if self._portal is None:
            with self._lock:
                if self._portal is None:
                    self._portal = self._exits.enter_context(
                        from_thread.start_blocking_portal(name="rolecall-loop")
                    )
        return self._portal

    def close(self) -> None:
        with self._lock:
            self._exits.close()
            self._portal = None


_background = _Background()
# A forked child has the parent's memory but not its threads: it starts a loop of its own. The
# parent's is kept from being collected, which would try to stop a thread that is not there.
_left_behind: list[_Background] = []


def _after_fork() -> None:
    global _background
    _left_behind.append(_background)
    _background = _Background()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _background.close())


def background() -> BlockingPortal:
    """The portal to the background loop of this process."""
    return _background.portal()
