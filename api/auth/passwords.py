"""Passwords: argon2id off the loop in a bounded pool, and the policy for new ones."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from zxcvbn import zxcvbn

from api.errors import Unavailable, WeakPassword

T = TypeVar("T")

MINIMUM_SCORE = 2
# zxcvbn raises beyond this; scoring a prefix never makes a password look stronger
SCORED_CHARACTERS = 72
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
            try:
                self.hasher.verify(hashed or self._dummy, password)
            except (VerificationError, InvalidHashError):
                return False
            return hashed is not None

        return await self._run(check)

    def outdated(self, hashed: str) -> bool:
        """Return whether ``hashed`` was made with other parameters than today's."""
        return self.hasher.check_needs_rehash(hashed)

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._room <= 0:
            raise Unavailable("Too many sign-ins are waiting.", retry_after=2)
        self._room -= 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        # not when the caller gives up: a thread that hashes still takes its place
        future.add_done_callback(lambda _: self._leave())
        try:
            return await asyncio.wait_for(future, WAIT_SECONDS)
        except TimeoutError as error:
            raise Unavailable("Too many sign-ins are waiting.", retry_after=2) from error

    def _leave(self) -> None:
        self._room += 1


def refuse_weak(password: str, username: str) -> None:
    """Raise ``WeakPassword`` if zxcvbn scores it under 2 or the username is in it.

    Length and encoding are the schema's business; nothing is cut or folded but for scoring.
    """
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
            errors=[{"field": "password", "message": reason} for reason in reasons],
        )
