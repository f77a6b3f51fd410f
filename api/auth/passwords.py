"""Passwords: argon2id off the loop in a bounded pool, and the policy for new ones."""

from __future__ import annotations

import os
import secrets

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError
from zxcvbn import zxcvbn

from api.auth import foreign
from api.auth.pool import Pool
from api.errors import WeakPassword

MINIMUM_SCORE = 2
# zxcvbn's time grows with the square of the length (half a second for the worst 32 characters,
# two for 72). Scoring a prefix never makes a password look stronger.
SCORED_CHARACTERS = 32
# How many may wait for each thread: about two seconds' worth at 40 hashes a second.
WAITING_TO_HASH = 64
# The slowest there is takes half a second.
WAITING_TO_SCORE = 8


class Passwords:
    """Hashes and verifies; ``Unavailable`` (503) when too many are waiting already."""

    def __init__(self, memory_kib: int = 19_456, iterations: int = 2) -> None:
        self.hasher = PasswordHasher(time_cost=iterations, memory_cost=memory_kib, parallelism=1)
        self._hashing = Pool(
            "hash", threads=os.cpu_count() or 1, waiting=WAITING_TO_HASH, behind=True
        )
        # apart: whoever chooses passwords that are slow to score keeps nobody from signing in
        self._scoring = Pool("score", threads=1, waiting=WAITING_TO_SCORE, behind=False)
        # an unknown user is verified against this, so that it costs what a wrong password costs
        self._dummy = self.hasher.hash(secrets.token_urlsafe(16))

    async def hash(self, password: str) -> str:
        """Return the argon2id hash in PHC format."""
        return await self._hashing.run(lambda: self.hasher.hash(password))

    async def verify(self, password: str, hashed: str | None) -> bool:
        """Return whether it matches; ``None`` (no such user) costs the same and is False."""

        def check() -> bool:
            right = foreign.verify(hashed or self._dummy, password)
            return right and hashed is not None

        return await self._hashing.run(check)

    async def refuse_weak(self, password: str, username: str, field: str = "password") -> None:
        """Raise ``WeakPassword`` if zxcvbn scores it under 2 or the username is in it.

        ``field`` is what the body calls it.
        Length and encoding are the schema's business; nothing is cut or folded but for scoring.
        """
        await self._scoring.run(lambda: _refuse_weak(password, username, field))

    def outdated(self, hashed: str) -> bool:
        """Return whether ``hashed`` was made with other parameters than today's."""
        try:
            return self.hasher.check_needs_rehash(hashed)
        except InvalidHashError:  # not argon2's
            return True

    def close(self) -> None:
        """Let the threads end."""
        self._hashing.close()
        self._scoring.close()


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
