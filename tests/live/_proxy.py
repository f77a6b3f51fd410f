"""A TCP proxy in front of a server, that can be cut: a partition of the network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.live._serve import free_port

CHUNK = 65_536


class Proxy:
    """Forwards a port of the loopback to ``target``: a unix socket, or a port of the loopback."""

    def __init__(self, target: Path | int) -> None:
        self.port = free_port()
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent = self._refuses = False
        self._flows: asyncio.Event

    def start(self) -> None:
        """Begin to forward."""
        self._thread.start()
        self._run(self._listen())

    def cut(self, *, silent: bool) -> None:
        """Forward nothing any more: as if packets were lost (``silent``), or by closing."""
        self._run(self._cut(silent))

    def mend(self) -> None:
        """Forward again, on new connections."""
        self._run(self._mend())

    def stop(self) -> None:
        """End it."""
        self._run(self._close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._flows = asyncio.Event()
        self._flows.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _cut(self, silent: bool) -> None:
        self._refuses = not silent
        self._flows.clear()
        if not silent:
            await self._close()

    async def _mend(self) -> None:
        # what was on its way is lost: nobody hears late of what they gave up
        await self._close()
        self._refuses = False
        self._flows.set()

    async def _close_all(self) -> None:
        self._server.close()
        await self._close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _close(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self._refuses:
            writer.transport.abort()
            return
        await self._flows.wait()
        if isinstance(self._target, Path):
            there = await asyncio.open_unix_connection(str(self._target))
        else:
            there = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.add(there[1])
        await asyncio.gather(self._pump(reader, there[1]), self._pump(there[0], writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                await self._flows.wait()
                if sink.transport.is_closing():
                    break
                sink.write(data)
                await sink.drain()
        sink.transport.abort()


@contextmanager
def proxy_to(target: Path | int) -> Iterator[Proxy]:
    """A proxy that forwards."""
    proxy = Proxy(target)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
