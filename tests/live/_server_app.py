"""A bare ASGI application for the supervisor's tests, and what serves it as a process.

/pid  /slow?seconds  /big?bytes  /block (stalls the loop)  /die (as by a fault in C).
FAIL=startup|raise|import makes it not start; FAIL_FILE names a file that makes it not start while
it exists.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

if os.environ.get("FAIL") == "import" and __name__ != "__main__":
    raise RuntimeError("no such luck")


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with the worker's process id."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(float(scope["query_string"]))
    elif scope["path"] == "/block":
        time.sleep(60)  # noqa: ASYNC251  the fault that is tested
    elif scope["path"] == "/die":
        os.kill(os.getpid(), signal.SIGSEGV)
    body = b"%d" % os.getpid()
    if scope["path"] == "/big":
        body = b"x" * int(scope["query_string"])
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Any, send: Any) -> None:
    await receive()
    fault = os.environ.get("FAIL")
    if os.path.exists(os.environ.get("FAIL_FILE", "/nowhere")):  # noqa: ASYNC240, PTH110  a test
        fault = "startup"
    if fault == "raise":
        raise RuntimeError("the lifespan raised")
    if fault == "startup":
        await send({"type": "lifespan.startup.failed", "message": "the database is away"})
        return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def main() -> None:
    """Serve on the address and with as many workers as the arguments say; print the URL."""
    from api.errors import StartupError
    from api.server import serve

    bind, workers, config = sys.argv[1:]
    try:
        code = serve(
            bind=bind,
            workers=int(workers),
            app="tests.live._server_app:asgi",
            config_path=Path(config) if config else None,
            on_ready=lambda url: print(f"ready {url}", flush=True),  # noqa: T201  tests wait for it
        )
    except StartupError as error:
        sys.exit(f"refused: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
