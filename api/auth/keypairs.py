"""Key pairs: made, sealed under a secret, opened, and shown in public (RFC 7517)."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

import jwt
import orjson
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from api.db.models import SigningKey
from api.errors import StartupError

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
# RFC 7638 section 3.2 and RFC 8037 section 2: the members that a thumbprint is made of
THUMBPRINT_MEMBERS = {
    "OKP": ("crv", "kty", "x"),
    "EC": ("crv", "kty", "x", "y"),
    "RSA": ("e", "kty", "n"),
}


class WrongSecret(StartupError):
    """A key was sealed under another secret."""

    def __init__(self) -> None:
        super().__init__(
            "SECRET_KEY is not the one that the signing keys in this database were kept under: "
            "give the former one back, or run `rolecall keys reencrypt`."
        )


@dataclass(frozen=True, slots=True, repr=False)
class Key:
    """One key pair; ``jwk`` is its public half (RFC 7517)."""

    kid: str
    algorithm: str
    private: PrivateKey
    public: Any
    jwk: dict[str, Any]


class Safe:
    """Seals private keys as PKCS #8, encrypted under a key derived from ``secret``."""

    def __init__(self, secret: str) -> None:
        self._passphrase = hashlib.sha256(b"rolecall signing keys\0" + secret.encode()).digest()

    def make(self, algorithm: str) -> tuple[str, bytes]:
        """Return the kid (RFC 7638) and the sealed half of a new key. RSA takes a while."""
        private = _generate(algorithm)
        return _thumbprint(_public_jwk(algorithm, private.public_key())), self.seal(private)

    def seal(self, private: PrivateKey) -> bytes:
        """Return what ``open`` takes."""
        return private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(self._passphrase),
        )

    def open(self, row: SigningKey) -> Key:
        """Return the key. Raises ``WrongSecret``."""
        try:
            private: Any = serialization.load_der_private_key(row.private or b"", self._passphrase)
        except ValueError:
            raise WrongSecret from None
        public = private.public_key()
        jwk = _public_jwk(row.algorithm, public)
        jwk |= {"kid": row.kid, "use": "sig", "alg": row.algorithm}
        return Key(row.kid, row.algorithm, private, public, jwk)


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
