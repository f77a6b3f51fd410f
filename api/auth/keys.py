"""The keys of this process, in memory: one signs, all of them verify, chosen by ``kid``.

What becomes of keys is decided in ``api/services/signing_keys.py``; here a worker learns of it:
by a look every few seconds, and at once where a token names a ``kid`` that it does not know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import structlog

from api.auth.keypairs import Key as Key
from api.background import Background
from api.db import STATEMENT_SECONDS
from api.db.models import SigningKey
from api.errors import StartupError, Unavailable
from api.services.signing_keys import PUBLISHED_SECONDS, SigningKeys, Standing

log = structlog.get_logger("rolecall.keys")

LOOK_SECONDS = 2.0
# After so long every worker that the database answers has looked.
LEARNT_SECONDS = LOOK_SECONDS + STATEMENT_SECONDS
# An unknown kid makes the ring look at the database; junk must not make it look all day.
RELOAD_SECONDS = 1.0
IN_ORDER = ("current", "next", "old")


class KeyRing:
    """The keys in use. ``load`` before the first token; then everything here is in memory.

    ``changes`` counts how often the set of keys that verify has changed.
    """

    def __init__(self, store: SigningKeys) -> None:
        self._store = store
        self._keys: dict[str, Key] = {}
        self._current: Key | None = None
        self._looks = count(1)
        self._last_look = 0
        self._heard_at = 0.0
        self._reloaded_at = 0.0
        self._reloading: asyncio.Task[Standing | None] | None = None
        self._fault: str | None = None
        self._background = Background(self._tick, LOOK_SECONDS)
        self.changes = 0

    async def load(self) -> None:
        """Read the keys, making the first. ``StartupError`` where SECRET_KEY does not open them."""
        await self._store.keep()
        self._take(await self._store.read())

    async def start(self) -> None:
        """Take part in keeping the keys, and learn of what other processes do, until ``stop``."""
        await self._store.keep(starting=True)
        self._take(await self._store.read())
        self._background.start()

    async def stop(self) -> None:
        """End that."""
        await self._background.stop()

    async def reload(self) -> bool:
        """Look for keys that another process made, at most once a second; True if it looked.

        Who asks while it looks shares the look. Raises ``Unavailable`` where the database has
        been away for so long that a key may sign which is not known here.
        """
        if self._reloading is None or self._reloading.done():
            if time.monotonic() - self._reloaded_at < RELOAD_SECONDS:
                return self._refuse_to_guess()
            self._reloaded_at = time.monotonic()
            self._reloading = asyncio.create_task(self._look())
        reloading = self._reloading
        await asyncio.wait([reloading], timeout=RELOAD_SECONDS)
        if reloading.done() and reloading.result() is not None:
            return True
        return self._refuse_to_guess()

    @property
    def current(self) -> Key:
        """The key that signs."""
        if self._current is None:
            raise RuntimeError("KeyRing.load has not been awaited")
        return self._current

    def find(self, kid: str) -> Key | None:
        """Return the key that ``kid`` names, if it may still verify."""
        return self._keys.get(kid)

    def jwks(self) -> dict[str, list[dict[str, Any]]]:
        """Return the public keys that verify, the one that signs first (RFC 7517 section 5)."""
        return {"keys": [key.jwk for key in self._keys.values()]}

    def _refuse_to_guess(self) -> bool:
        # a key that signs has been in the database for this long: who looked since knows it
        if time.monotonic() - self._heard_at > PUBLISHED_SECONDS:
            raise Unavailable("The signing keys cannot be read just now.")
        return False

    async def _tick(self) -> None:
        standing = await self._look()
        if standing is None or not self._store.is_due(standing):
            return
        try:
            await self._store.keep()
        except Unavailable:
            return
        except StartupError as error:
            self._complain(error)
        await self._look()

    async def _look(self) -> Standing | None:
        """Take what the database has; None where it cannot be had."""
        number = next(self._looks)
        try:
            standing = await self._store.read()
            if number > self._last_look:
                # one that began later has seen more
                self._last_look = number
                self._take(standing)
        except Unavailable:
            return None
        except StartupError as error:
            # somebody keeps keys under another secret: those in memory are as good as before
            self._complain(error)
            return None
        return standing

    def _complain(self, error: StartupError) -> None:
        # once, not at every look
        if self._fault != str(error):
            self._fault = str(error)
            log.error("keys_not_kept", reason=self._fault)

    def _take(self, standing: Standing) -> None:
        keys = self._opened(sorted(standing.keys, key=lambda row: IN_ORDER.index(row.state)))
        current = standing.current
        if current is None:
            raise StartupError("No key that signs is left.")
        changed = keys.keys() != self._keys.keys()
        self._keys, self._current = keys, keys[current.kid]
        if changed:
            # last: what a thread verified with the former keys must not count as of these
            self.changes += 1
        self._heard_at = time.monotonic()

    def _opened(self, rows: Sequence[SigningKey]) -> dict[str, Key]:
        return {row.kid: self._keys.get(row.kid) or self._store.safe.open(row) for row in rows}
