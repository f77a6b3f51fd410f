"""Minting and reading tokens: flask-jwt-extended, stricter where PyJWT is lenient.

A token that was verified once is remembered until it expires, so that the next request with it
costs no signature. Only success is remembered, by the whole token; whether it was taken back is
never remembered, and is asked on every request.
"""

from __future__ import annotations

import hmac
import inspect
import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
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

# About 2 KB each.
REMEMBERED = 20_000
Remembered = OrderedDict[str, tuple[float, bytes]]


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


class VerifiedTokens:
    """Access tokens whose signature and claims were right, until they expire or the keys change.

    Safe from threads: whoever reads takes no lock, and sees one set of keys or the next.
    """

    def __init__(self, keys: KeyRing, capacity: int = REMEMBERED) -> None:
        self._keys = keys
        self._capacity = capacity
        self._lock = threading.Lock()
        # of which set of keys, and what was verified with it: expiry, header and claims as JSON
        self._known: tuple[int, Remembered] = (keys.changes, OrderedDict())

    def recall(self, token: str) -> tuple[Any, Any] | None:
        """Return fresh copies of its header and claims, or None."""
        changes, known = self._known
        found = known.get(token)
        if found is None or changes != self._keys.changes or found[0] <= time.time():
            return None
        header, claims = orjson.loads(found[1])
        return header, claims

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
        nothing is kept.
        """
        said = orjson.dumps([header, claims])
        with self._lock:
            if changes != self._keys.changes:
                return
            if self._known[0] != changes:
                self._known = (changes, OrderedDict())
            known = self._known[1]
            if len(known) >= self._capacity:
                known.popitem(last=False)
            known[token] = (claims["exp"] + leeway, said)


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
