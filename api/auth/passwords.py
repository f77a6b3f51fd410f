"""Passwords: argon2id off the loop in a bounded pool, and the policy for new ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError
from zxcvbn import zxcvbn

from api.auth import foreign
from api.errors import Unavailable, WeakPassword

T = TypeVar("T")

MINIMUM_SCORE = 2
# zxcvbn's time grows with the square of the length (half a second for the worst 32 characters,
# two for 72). Scoring a prefix never makes a password look stronger.
SCORED_CHARACTERS = 32
# How many may wait for each thread: about two seconds' worth at 40 hashes a second.
WAITING_PER_THREAD = 64
WAIT_SECONDS = 10.0


class Passwords:
    """Hashes and verifies; ``Unavailable`` (503) when too many are waiting already."""

    def __init__(self, memory_kib: int = 19_456, iterations: int = 2) -> None:
        self.hasher = PasswordHasher(time_cost=iterations, memory_cost=memory_kib, parallelism=1)
        threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rolecall-hash")
        self._room = threads * (1 + WAITING_PER_THREAD)
        # an unknown user is verified against this, so that it costs what a wrong password costs
        self._dummy = self.hasher.hash(secrets.token_urlsafe(16))

    async def hash(self, password: str) -> str:
        """Return the argon2id hash in PHC format."""
        return await self._run(lambda: self.hasher.hash(password))

    async def verify(self, password: str, hashed: str | None) -> bool:
        """Return whether it matches; ``None`` (no such user) costs the same and is False."""

        def check() -> bool:
            right = foreign.verify(hashed or self._dummy, password)
            return right and hashed is not None

        return await self._run(check)

    async def refuse_weak(self, password: str, username: str, field: str = "password") -> None:
        """Raise ``WeakPassword`` if zxcvbn scores it under 2 or the username is in it.

        ``field`` is what the body calls it.
        Length and encoding are the schema's business; nothing is cut or folded but for scoring.
        """
        await self._run(lambda: _refuse_weak(password, username, field))

    def outdated(self, hashed: str) -> bool:
        """Return whether ``hashed`` was made with other parameters than today's."""
        try:
            return self.hasher.check_needs_rehash(hashed)
        except InvalidHashError:  # not argon2's
            return True

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._room <= 0:
            raise Unavailable("Too many sign-ins are waiting.", retry_after=2)
        self._room -= 1
        loop = asyncio.get_running_loop()
        job = self._pool.submit(work)
        # not when the caller gives up: a thread that hashes still takes its place
        job.add_done_callback(lambda _: self._leave(loop))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), WAIT_SECONDS)
        except TimeoutError as error:
            raise Unavailable("Too many sign-ins are waiting.", retry_after=2) from error

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the count with it
            loop.call_soon_threadsafe(self._return_place)

    def _return_place(self) -> None:
        self._room += 1


def _refuse_weak(password: str, username: str, field: str) -> None:
    reasons = []
    if username and username.casefold() in password.casefold():
        reasons.append("It contains the username.")
    result = zxcvbn(password[:SCORED_CHARACTERS], user_inputs=[username])
    if result["score"] < MINIMUM_SCORE:
        feedback = result["feedback"]
        reasons.extend([feedback["warning"] or "It is easy to guess.", *feedback["suggestions"]])
    if reasons:
        raise WeakPassword(
            reasons=reasons,
            errors=[{"field": field, "message": reason} for reason in reasons],
        )
