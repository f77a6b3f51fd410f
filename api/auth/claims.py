"""What a token says: the claims, their types, and how an identity becomes them.

An access token (RFC 9068) carries what guards ask for; a refresh token only names its session.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

ACCESS, REFRESH = "access", "refresh"
HEADER_TYPES = {ACCESS: "at+jwt", REFRESH: "rt+jwt"}
LARGEST_INTEGER = 2**53
# Browsers drop a larger cookie, silently (RFC 6265 section 6.1).
LARGEST_COOKIE = 4_096


@dataclass(frozen=True, slots=True)
class AccessIdentity:
    """Whom an access token speaks of; ``by_cookie`` adds the ``csrf`` claim."""

    user_id: UUID
    sid: UUID
    username: str
    roles: tuple[str, ...]
    permissions: tuple[str, ...]
    version: int
    by_cookie: bool


@dataclass(frozen=True, slots=True)
class RefreshIdentity:
    """Which session a refresh token continues, and as which generation of it (``jti``)."""

    user_id: UUID
    sid: UUID
    jti: str
    version: int
    by_cookie: bool


Identity = AccessIdentity | RefreshIdentity


def additional_claims(identity: Identity) -> dict[str, Any]:
    """The ``additional_claims_loader``: what is embedded beyond the registered claims."""
    claims: dict[str, Any] = {"sid": str(identity.sid), "ver": identity.version}
    if isinstance(identity, RefreshIdentity):
        return claims | {"jti": identity.jti}
    return claims | {
        "username": identity.username,
        "roles": sorted(identity.roles),
        "permissions": sorted(identity.permissions),
    }


def subject(identity: Identity) -> str:
    """The ``user_identity_loader``: ``sub`` is the user's id."""
    return str(identity.user_id)


def cookie_bytes(username: str, roles: Iterable[str], permissions: Iterable[str]) -> int:
    """Return the most that the cookie of an access token with these claims can take.

    Everything else in it is of a known length: 700 bytes are the other claims with an issuer and
    an audience of 64 characters, 600 the header, an RSA signature and the cookie's attributes.
    """
    said = {"username": username, "roles": list(roles), "permissions": list(permissions)}
    return (len(json.dumps(said)) + 700) * 4 // 3 + 600


def permitted(held: Iterable[str], needed: str) -> bool:
    """Return whether ``needed`` (``area:verb``) is among ``held``, wildcards included."""
    area = needed.partition(":")[0]
    return any(permission in {needed, f"{area}:*", "*"} for permission in held)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _id(value: Any) -> bool:
    try:
        return isinstance(value, str) and str(UUID(value)) == value
    except ValueError:
        return False


def _integer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_INTEGER


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _fresh(value: Any) -> bool:
    return isinstance(value, bool) or _integer(value)


COMMON: dict[str, Callable[[Any], bool]] = {
    "sub": _id, "sid": _id, "jti": _id, "iss": _text, "aud": _text, "type": _text,
    "exp": _integer, "iat": _integer, "nbf": _integer, "ver": _integer, "fresh": _fresh,
}  # fmt: skip
BY_TYPE: dict[str, dict[str, Callable[[Any], bool]]] = {
    ACCESS: COMMON | {"username": _text, "roles": _texts, "permissions": _texts},
    REFRESH: COMMON,
}


def well_formed(header: Mapping[str, Any], claims: Mapping[str, Any]) -> bool:
    """Return whether every claim is there, of its type, and ``typ`` goes with ``type``."""
    kind = claims.get("type")
    if not isinstance(kind, str) or HEADER_TYPES.get(kind) != header.get("typ"):
        return False
    if "csrf" in claims and not _text(claims["csrf"]):
        return False
    return all(name in claims and fits(claims[name]) for name, fits in BY_TYPE[kind].items())
