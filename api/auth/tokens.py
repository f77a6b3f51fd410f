"""Minting and reading tokens: flask-jwt-extended, stricter where PyJWT is lenient.

A token that was verified once is remembered until it expires, so that the next request with it
costs no signature. Only success is remembered, by a digest of the whole token; whether it was
revoked is never remembered, and is asked on every request.
"""

from __future__ import annotations

import hmac
import inspect
import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import orjson
from flask import Flask, current_app
from flask_jwt_extended import JWTManager, create_access_token, create_refresh_token
from flask_jwt_extended.config import config

from api.auth import claims as token_claims
from api.auth import jws
from api.auth.claims import ACCESS, HEADER_TYPES, REFRESH, AccessIdentity, Identity, RefreshIdentity
from api.auth.keys import Key, KeyRing
from api.db.models import new_id
from api.errors import CsrfFailed, InvalidToken, TokenExpired

# Whichever is reached first. A usual token takes 1 KB: docs/limits.md.
REMEMBERED = 20_000
REMEMBERED_BYTES = 40 * 1024 * 1024
# What one takes beside its claims' JSON (digest, expiry, their places in the table), and what a
# header of its own takes beside its text.
OVERHEAD_BYTES, HEADER_BYTES = 400, 600
# Tokens with no other members have few headers between them, and share those.
SHARED_MEMBERS = {"alg", "typ", "kid"}


class UnknownKey(InvalidToken):
    """No key in memory has this ``kid``; another process may have made it since."""


class RolecallJWTManager(JWTManager):
    """flask-jwt-extended with our keys, our reading, and no loader that would not be awaited."""

    def __init__(self, keys: KeyRing) -> None:
        super().__init__()
        self.keys = keys
        self._memory = VerifiedTokens(keys)
        self.additional_claims_loader(token_claims.additional_claims)
        self.user_identity_loader(token_claims.subject)
        self.decode_key_loader(lambda header, _claims: self._key(header).public)

    def __setattr__(self, name: str, value: Any) -> None:
        # an async blocklist loader revokes everybody, an async verification lets everybody in
        if name.endswith("_callback") and inspect.iscoroutinefunction(value):
            raise TypeError(
                f"{value.__qualname__} is async, and flask-jwt-extended calls its loaders without "
                "awaiting them: make it a plain function, or do the waiting in the view"
            )
        super().__setattr__(name, value)

    def read(self, token: str, *, allow_expired: bool = False) -> tuple[Any, Any]:
        """Return the header and the claims of a genuine token, as fresh dictionaries.

        Raises ``InvalidToken``, ``UnknownKey`` or ``TokenExpired``. Does not ask whether the
        token was taken back.
        """
        remembered = self._memory.recall(token)
        if remembered is not None:
            return remembered
        changes = self.keys.changes
        header, claims = self.read_foreign(token, allow_expired=allow_expired)
        if config.decode_audience not in token_claims.audiences(claims):
            raise InvalidToken
        if claims["type"] == ACCESS:  # a refresh token is used once
            try:
                self._memory.remember(token, header, claims, config.leeway, changes)
            # orjson's, for what no JSON of ours holds: lone surrogates, huge integers
            except TypeError:
                raise InvalidToken from None
        return header, claims

    def read_foreign(self, token: str, *, allow_expired: bool = False) -> tuple[Any, Any]:
        """Do as ``read``, also for a token of ours that is meant for others; nothing is kept."""
        compact = jws.parse(token)
        header, claims = compact.header, compact.claims
        key = self._key(header)
        if not token_claims.well_formed(header, claims):
            raise InvalidToken
        if not compact.is_signed_by(key.algorithm, self._decode_key_callback(header, claims)):
            raise InvalidToken
        if claims["iss"] != config.decode_issuer:
            raise InvalidToken
        now = time.time()
        if max(claims["iat"], claims["nbf"]) > now + config.leeway:
            raise InvalidToken
        if not allow_expired and claims["exp"] <= now - config.leeway:
            raise TokenExpired
        return header, claims

    def refuse_by_callback(self, header: dict[str, Any], claims: dict[str, Any]) -> None:
        """Raise ``InvalidToken`` where a team's ``token_verification_loader`` says no."""
        if not self._token_verification_callback(header, claims):
            raise InvalidToken

    def _key(self, header: dict[str, Any]) -> Key:
        kid = header.get("kid")
        key = self.keys.find(kid) if isinstance(kid, str) else None
        if key is None:
            raise UnknownKey
        if header.get("alg") != key.algorithm:  # RFC 8725 section 3.1
            raise InvalidToken
        return key

    def _decode_jwt_from_config(
        self, encoded_token: str, csrf_value: str | None = None, allow_expired: bool = False
    ) -> dict[str, Any]:
        # what flask-jwt-extended itself calls: decode_token, bare jwt_required, set_*_cookies
        _, claims = self.read(encoded_token, allow_expired=allow_expired)
        if csrf_value is not None:
            check_csrf(claims, csrf_value)
        return claims  # type: ignore[no-any-return]

    def _encode_jwt_from_config(
        self,
        identity: Identity,
        token_type: str,
        claims: dict[str, Any] | None = None,
        fresh: bool | float | timedelta = False,
        expires_delta: timedelta | Literal[False] | None = None,
        headers: dict[str, Any] | None = None,
    ) -> str:
        # as the original, but csrf goes by how this token travels, typ and kid by RFC 9068
        key = self.keys.current
        now = time.time()
        # a token without exp would be none of ours
        lifetime: Any = expires_delta
        if lifetime is None:
            by_type = {ACCESS: config.access_expires, REFRESH: config.refresh_expires}
            lifetime = by_type[token_type]
        said = {
            "iss": config.encode_issuer,
            "aud": config.encode_audience,
            config.identity_claim_key: self._user_identity_callback(identity),
            "type": token_type,
            "fresh": int(now + fresh.total_seconds()) if isinstance(fresh, timedelta) else fresh,
            "jti": str(new_id()),
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now + lifetime.total_seconds()),
        }
        if identity.by_cookie and config.cookie_csrf_protect:
            said["csrf"] = str(uuid4())
        said |= self._user_claims_callback(identity) | (claims or {})
        header = {"alg": key.algorithm, "typ": HEADER_TYPES[token_type], "kid": key.kid}
        dumps = current_app.json.dumps
        return jws.write(key, dumps(header | (headers or {})).encode(), dumps(said).encode())


class Remembered(NamedTuple):
    """What is kept of a token: when it stops being accepted, its header, its claims as JSON."""

    until: float
    header: dict[str, str]
    claims: bytes

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        size = len(self.claims) + OVERHEAD_BYTES
        if not self.header.keys() <= SHARED_MEMBERS:
            size += HEADER_BYTES + sum(map(len, self.header.values()))
        return size


class _Verified:
    """The tokens that one set of keys verified, by the SHA-256 of their text."""

    def __init__(self, changes: int) -> None:
        self.changes = changes
        self.tokens: OrderedDict[bytes, Remembered] = OrderedDict()
        self.size = 0
        self._headers: dict[frozenset[tuple[str, str]], dict[str, str]] = {}

    def shared(self, header: dict[str, str]) -> dict[str, str]:
        """Return a copy of the header, the same one for all that equal it where they are few."""
        if not header.keys() <= SHARED_MEMBERS:
            return header.copy()
        return self._headers.setdefault(frozenset(header.items()), header.copy())


class VerifiedTokens:
    """Access tokens whose signature and claims were right, until they expire or the keys change.

    A token is known by its SHA-256: to have one answered for by another, somebody would have to
    find two texts with the same digest. Safe from threads: whoever reads takes no lock, and sees
    one set of keys or the next. ``capacity`` tokens are kept at most, in about ``capacity_bytes``.
    """

    def __init__(
        self,
        keys: KeyRing,
        capacity: int = REMEMBERED,
        capacity_bytes: int = REMEMBERED_BYTES,
    ) -> None:
        self._keys = keys
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._known = _Verified(keys.changes)

    def recall(self, token: str) -> tuple[dict[str, Any], Any] | None:
        """Return fresh copies of its header and claims, or None."""
        # a lone surrogate is in no token that is known, but must not raise here
        known = self._known
        found = known.tokens.get(sha256(token.encode("utf-8", "surrogatepass")).digest())
        if found is None or known.changes != self._keys.changes:
            return None
        until, header, claims = found
        if until <= time.time():
            return None
        return header.copy(), orjson.loads(claims)

    def remember(
        self,
        token: str,
        header: dict[str, Any],
        claims: dict[str, Any],
        leeway: float,
        changes: int,
    ) -> None:
        """Keep a token that was just verified, forgetting the oldest where there is no room.

        ``changes`` is what the ring's was before it was verified: with keys that are gone since,
        nothing is kept. Nor is a token whose header holds anything but text: a copy of it would
        share what is inside. Raises ``TypeError`` for claims that are no JSON of ours.
        """
        # copied: orjson leaves each result in a block of 8 KB
        said = bytes(memoryview(orjson.dumps(claims)))
        if not all(isinstance(value, str) for value in header.values()):
            return
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if changes != self._keys.changes:
                return
            if self._known.changes != changes:
                self._known = _Verified(changes)
            known = self._known
            kept = Remembered(claims["exp"] + leeway, known.shared(header), said)
            before = known.tokens.pop(digest, None)
            known.size += kept.size - (before.size if before else 0)
            known.tokens[digest] = kept
            while len(known.tokens) > self._capacity or known.size > self._capacity_bytes:
                _, oldest = known.tokens.popitem(last=False)
                known.size -= oldest.size


def mint_access(identity: AccessIdentity, lifetime: timedelta, *, fresh: bool) -> str:
    """Return an encoded access token that lives for ``lifetime``."""
    token: str = create_access_token(identity, fresh=fresh, expires_delta=lifetime)
    return token


def mint_refresh(identity: RefreshIdentity, expires_at: datetime) -> str:
    """Return an encoded refresh token that expires when its session goes idle."""
    lifetime = expires_at - datetime.now(UTC)
    token: str = create_refresh_token(
        identity,
        expires_delta=lifetime,
        additional_claims={"exp": int(expires_at.timestamp())},
    )
    return token


def check_csrf(claims: dict[str, Any], given: str | None) -> None:
    """Raise ``CsrfFailed`` unless ``given`` equals the token's ``csrf`` claim."""
    expected = claims.get("csrf")
    if not given or not expected or not hmac.compare_digest(expected.encode(), given.encode()):
        raise CsrfFailed


def install(app: Flask, keys: KeyRing) -> RolecallJWTManager:
    """Register the manager with the app."""
    manager = RolecallJWTManager(keys)
    manager.init_app(app)
    return manager
