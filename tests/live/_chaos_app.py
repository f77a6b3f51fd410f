"""`rolecall` with fault points that exist only here: ``python -m tests.live._chaos_app serve …``.

The folder CHAOS holds what is asked for. ``die``: the worker that publishes a revocation next is
killed before it does. ``clock``: seconds by which every worker's clock is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime, tzinfo
from pathlib import Path

FOLDER = Path(os.environ["CHAOS"])
true_time = time.time


def wrong_time() -> float:
    """Return the time by a clock that was stepped."""
    try:
        return true_time() + float((FOLDER / "clock").read_text())
    except FileNotFoundError:
        return true_time()


class AnyDatetime(type):
    """What is a ``datetime`` is one of these too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


class WrongDatetime(datetime, metaclass=AnyDatetime):
    """``datetime`` by a clock that was stepped."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(wrong_time(), tz)


def install() -> None:
    """Put the fault points in, in a worker."""
    import flask_jwt_extended.tokens
    import jwt.api_jwt

    import api.auth.tokens
    import api.services.sessions
    from api.blocklist.redis_index import RedisIndex as Index
    from api.blocklist.ledger import Entry

    publish = Index.publish

    async def publish_or_die(self: Index, entries: Sequence[Entry]) -> None:
        with contextlib.suppress(FileNotFoundError):
            (FOLDER / "die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        await publish(self, entries)

    Index.publish = publish_or_die  # type: ignore[method-assign]
    time.time = wrong_time
    for module in (flask_jwt_extended.tokens, jwt.api_jwt, api.auth.tokens, api.services.sessions):
        module.datetime = WrongDatetime  # type: ignore[attr-defined]


if __name__ == "__main__":
    import api.cli

    api.cli.serve_workers = functools.partial(
        api.cli.serve_workers, app="tests.live._chaos_app:asgi"
    )
    api.cli.main()
else:
    install()
    from api.main import asgi as asgi
