"""The keys that sign tokens: made on the first start, kept encrypted, chosen by ``kid``.

Every key that is not retired verifies; the newest of the configured algorithm signs. (Rotation
adds a newer key and retires older ones: it needs no more than that from here.)
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jwt
import orjson
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database
from api.db.models import SigningKey
from api.errors import StartupError, Unavailable

log = structlog.get_logger("rolecall.keys")

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
ADVISORY_LOCK = 7_265_109
# RFC 7638 section 3.2 and RFC 8037 section 2: the members that a thumbprint is made of
THUMBPRINT_MEMBERS = {
    "OKP": ("crv", "kty", "x"),
    "EC": ("crv", "kty", "x", "y"),
    "RSA": ("e", "kty", "n"),
}
# An unknown kid makes the ring look at the database; junk must not make it look all day.
RELOAD_SECONDS = 1.0


@dataclass(frozen=True, slots=True, repr=False)
class Key:
    """One key pair; ``jwk`` is its public half (RFC 7517)."""

    kid: str
    algorithm: str
    private: PrivateKey
    public: Any
    jwk: dict[str, Any]


class KeyRing:
    """The keys in use. ``load`` before the first token; then everything here is in memory."""

    def __init__(self, database: Database, secret: str, algorithm: str = "EdDSA") -> None:
        self._database = database
        self._passphrase = hashlib.sha256(b"rolecall signing keys\0" + secret.encode()).digest()
        self._algorithm = algorithm
        self._keys: dict[str, Key] = {}
        self._current: Key | None = None
        self._reloaded_at = 0.0
        self.changes = 0

    async def load(self) -> None:
        """Read the keys, making the first. ``StartupError`` where SECRET_KEY does not open them."""
        async with self._database.write() as session:
            await self._database.one_at_a_time(session, ADVISORY_LOCK)
            rows = await _active(session)
            # before a key is added: with the wrong secret nothing may be written
            self._opened(rows)
            if not any(row.algorithm == self._algorithm for row in rows):
                session.add(self._make())
                await session.flush()
                rows = await _active(session)
        self._take(rows)

    async def reload(self) -> bool:
        """Look for keys that another process made, at most once a second; True if it looked."""
        if time.monotonic() - self._reloaded_at < RELOAD_SECONDS:
            return False
        self._reloaded_at = time.monotonic()
        try:
            async with self._database.read() as session:
                self._take(await _active(session))
        except Unavailable:
            return False
        except StartupError as error:
            # somebody keeps keys under another secret: those in memory are as good as before
            log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400  no cause to trace
            return False
        return True

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
        """Return the public keys that verify, newest first (RFC 7517 section 5)."""
        return {"keys": [key.jwk for key in self._keys.values()]}

    def _take(self, rows: list[SigningKey]) -> None:
        keys = self._opened(rows)
        signing = [key for key in keys.values() if key.algorithm == self._algorithm]
        if not signing:
            raise StartupError(f"No signing key for {self._algorithm} is left.")
        if keys.keys() != self._keys.keys():
            self.changes += 1
        self._keys, self._current = keys, signing[0]

    def _opened(self, rows: list[SigningKey]) -> dict[str, Key]:
        return {row.kid: self._keys.get(row.kid) or self._open(row) for row in rows}

    def _make(self) -> SigningKey:
        private = _generate(self._algorithm)
        data = private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(self._passphrase),
        )
        kid = _thumbprint(_public_jwk(self._algorithm, private.public_key()))
        return SigningKey(kid=kid, algorithm=self._algorithm, private=data)

    def _open(self, row: SigningKey) -> Key:
        with _explained():
            private = serialization.load_der_private_key(row.private, self._passphrase)
        jwk = _public_jwk(row.algorithm, private.public_key())
        jwk |= {"kid": row.kid, "use": "sig", "alg": row.algorithm}
        return Key(row.kid, row.algorithm, private, private.public_key(), jwk)  # type: ignore[arg-type]


async def _active(session: AsyncSession) -> list[SigningKey]:
    query = select(SigningKey).where(SigningKey.retired_at.is_(None))
    return list(await session.scalars(query.order_by(SigningKey.created_at.desc())))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise StartupError(
            "SECRET_KEY is not the one that the signing keys in this database were kept under: "
            "give the former one back, or start with an empty database."
        ) from None


def _generate(algorithm: str) -> PrivateKey:
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65_537, key_size=2_048)


def _public_jwk(algorithm: str, public: Any) -> dict[str, Any]:
    jwk: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(public, as_dict=True)
    jwk.pop("key_ops", None)
    return jwk


def _thumbprint(jwk: dict[str, Any]) -> str:
    members = {name: jwk[name] for name in THUMBPRINT_MEMBERS[jwk["kty"]]}
    digest = hashlib.sha256(orjson.dumps(members, option=orjson.OPT_SORT_KEYS)).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
