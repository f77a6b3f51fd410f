"""`rolecall` with fault points that exist only here: ``python -m tests.live._chaos_app serve …``.

The folder CHAOS holds what is asked for. ``clock``: seconds by which every worker's clock is wrong.
The next transaction that writes to the table ``revocations`` is met by one of

- ``die-before-commit``, ``die-after-commit``: its worker is killed there;
- ``stall-before-commit``, ``stall-after-commit``: it waits there until that file, which it renames
  to ``stalled``, is gone.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import time
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["CHAOS"])
true_time = time.time
REVOKES = re.compile(r'\s*(INSERT INTO|UPDATE) "?revocations\b', re.IGNORECASE)


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


def meet(moment: str) -> None:
    """Do what is asked for at ``before-commit`` or ``after-commit``."""
    from sqlalchemy.util import await_only

    try:
        (FOLDER / f"die-{moment}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    except FileNotFoundError:
        pass
    stalled = FOLDER / "stalled"
    try:
        (FOLDER / f"stall-{moment}").rename(stalled)
    except FileNotFoundError:
        return
    while stalled.exists():
        await_only(asyncio.sleep(0.01))


def install() -> None:
    """Put the fault points in, in a worker."""
    import flask_jwt_extended.tokens
    import jwt.api_jwt
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.default import DefaultDialect

    import api.auth.tokens
    import api.services.lifetimes
    import api.services.sessions

    # by the id of the driver's connection: one has a transaction at a time
    revoking: set[int] = set()
    commit: Any = DefaultDialect.do_commit
    rollback: Any = DefaultDialect.do_rollback

    @event.listens_for(Engine, "before_cursor_execute")
    def _note(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if REVOKES.match(statement):
            revoking.add(id(connection.connection.dbapi_connection))

    def do_commit(self: DefaultDialect, connection: Any) -> None:
        number = id(connection.dbapi_connection)
        if number not in revoking:
            commit(self, connection)
            return
        revoking.discard(number)
        meet("before-commit")
        commit(self, connection)
        meet("after-commit")

    def do_rollback(self: DefaultDialect, connection: Any) -> None:
        revoking.discard(id(getattr(connection, "dbapi_connection", connection)))
        rollback(self, connection)

    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]
    DefaultDialect.do_rollback = do_rollback  # type: ignore[method-assign]
    time.time = wrong_time
    for module in (
        flask_jwt_extended.tokens,
        jwt.api_jwt,
        api.auth.tokens,
        api.services.lifetimes,
        api.services.sessions,
    ):
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
