"""Verify Rolecall's access tokens with its public keys, without asking it (RFC 9068 section 4)."""

from __future__ import annotations

import os
from typing import Any

import jwt

ROLECALL_URL = os.environ.get("ROLECALL_URL", "http://127.0.0.1:8000")
AUDIENCE, ISSUER = os.environ.get("AUDIENCE", "rolecall"), os.environ.get("ISSUER", "rolecall")
# Kept for as long as Rolecall's max-age says; an unknown kid makes it look again.
KEYS = jwt.PyJWKClient(f"{ROLECALL_URL}/.well-known/jwks.json", lifespan=300)


def verified(authorization: str) -> dict[str, Any]:
    """Return the claims of an Authorization header's token. Raises ``jwt.PyJWTError``.

    Offline: a token that was taken back is good here until it expires.
    """
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or jwt.get_unverified_header(token).get("typ") != "at+jwt":
        raise jwt.InvalidTokenError("not an access token")
    return jwt.decode(
        token,
        KEYS.get_signing_key_from_jwt(token),
        algorithms=["EdDSA", "ES256", "RS256"],
        audience=AUDIENCE,
        issuer=ISSUER,
        options={"require": ["exp", "iat", "sub", "jti", "roles", "permissions"]},
    )
