"""Secrets of client apps: random, so a fast hash will do; keyed, so a database alone says nothing.

What is kept is the SHA-256 of a secret, encrypted under a key derived from SECRET_KEY: a keyed
hash that can be taken over to another key (`rolecall keys reencrypt`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# So that whoever finds one, a scanner of repositories say, knows what it is.
PREFIX = "rcs_"
RANDOM_BYTES = 32
NONCE_BYTES = 12


class ClientSecrets:
    """Makes, seals and compares secrets, under a key derived from ``secret_key``."""

    def __init__(self, secret_key: str) -> None:
        key = hashlib.sha256(b"rolecall client secrets\0" + secret_key.encode()).digest()
        self._cipher = AESGCM(key)

    def make(self) -> tuple[str, bytes]:
        """Return a new secret, and what is kept of it."""
        secret = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        return secret, self._seal(_digest(secret))

    def matches(self, sealed: bytes, given: str) -> bool:
        """Return whether ``sealed`` was made of ``given``, in constant time."""
        try:
            return hmac.compare_digest(self._open(sealed), _digest(given))
        except InvalidTag:
            return False

    def take_over(self, sealed: bytes, former: ClientSecrets) -> bytes:
        """Return what ``former`` sealed, sealed by this. Raises ``InvalidTag`` where it did not."""
        return self._seal(former._open(sealed))

    def _seal(self, digest: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, digest, None)

    def _open(self, sealed: bytes) -> bytes:
        return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
