"""What a token says: the claims, their types, and how an identity becomes them.

An access token (RFC 9068) carries what guards ask for; a refresh token only names its session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

ACCESS, REFRESH = "access", "refresh"
HEADER_TYPES = {ACCESS: "at+jwt", REFRESH: "rt+jwt"}
LARGEST_INTEGER = 2**53
# Browsers drop a larger cookie, silently (RFC 6265 section 6.1).
LARGEST_COOKIE = 4_096
# In bytes.
LONGEST_ISSUER = 128
# Bytes in the JSON of an access token: of all claims that cookie_bytes is not given, with the
# longest issuer; and of the audiences that a client app may have (schemas/clients.py).
OTHER_CLAIMS = 560
MOST_AUDIENCES = 323
# Bytes of the token's header, of an RSA signature, and of the cookie's name and attributes.
AROUND_CLAIMS = 600


@dataclass(frozen=True, slots=True)
class AccessIdentity:
    """Whom an access token speaks of; ``by_cookie`` adds the ``csrf`` claim.

    ``seq`` is the authorization sequence as it was before the rights were read, ``opened_seq`` as
    it was when the session was opened.

    ``client_id`` is the client app that it was issued to; ``audience`` is empty for the service's
    own. A token of a client itself has the client's id for ``subject`` and no username (RFC 9068
    section 2.2); ``scope`` are the permissions that it was narrowed to.
    """

    subject: UUID
    sid: UUID
    username: str | None
    roles: tuple[str, ...]
    permissions: tuple[str, ...]
    version: int
    seq: int
    opened_seq: int
    by_cookie: bool = False
    client_id: UUID | None = None
    audience: tuple[str, ...] = ()
    scope: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class RefreshIdentity:
    """Which session a refresh token continues, and as which generation of it (``jti``)."""

    subject: UUID
    sid: UUID
    jti: str
    version: int
    opened_seq: int
    by_cookie: bool = False
    client_id: UUID | None = None


Identity = AccessIdentity | RefreshIdentity


def additional_claims(identity: Identity) -> dict[str, Any]:
    """The ``additional_claims_loader``: what is embedded beyond the registered claims."""
    claims: dict[str, Any] = {
        "sid": str(identity.sid),
        "ver": identity.version,
        "opened_seq": identity.opened_seq,
    }
    if identity.client_id is not None:
        claims["client_id"] = str(identity.client_id)
    if isinstance(identity, RefreshIdentity):
        return claims | {"jti": identity.jti}
    if identity.username is not None:
        claims["username"] = identity.username
    if identity.scope is not None:
        claims["scope"] = " ".join(identity.scope)
    if identity.audience:
        # one is text, as where there are no clients (RFC 7519 section 4.1.3)
        several = len(identity.audience) > 1
        claims["aud"] = list(identity.audience) if several else identity.audience[0]
    return claims | {
        "seq": identity.seq,
        "roles": sorted(identity.roles),
        "permissions": sorted(identity.permissions),
    }


def subject(identity: Identity) -> str:
    """The ``user_identity_loader``: ``sub`` is the id of the user, or of the client."""
    return str(identity.subject)


def cookie_bytes(
    username: str,
    roles: Iterable[str],
    permissions: Iterable[str],
    *,
    scope: Iterable[str] | None = None,
    audiences: Iterable[str] = (),
) -> int:
    """Return the most bytes that the cookie of an access token with these claims can take.

    ``scope`` is given for a token that it narrows, which carries the scope and the permissions.
    ``audiences`` are those of a client app; without them there is room for any that one may have.
    """
    claims: dict[str, Any] = {
        "username": username,
        "roles": list(roles),
        "permissions": list(permissions),
        "aud": list(audiences),
    }
    if scope is not None:
        claims["scope"] = " ".join(scope)
    # the tokens are written by orjson too: in UTF-8, without spaces
    size = len(orjson.dumps(claims)) + OTHER_CLAIMS
    return (size if claims["aud"] else size + MOST_AUDIENCES) * 4 // 3 + AROUND_CLAIMS


def audiences(claims: Mapping[str, Any]) -> tuple[str, ...]:
    """Return whom a well-formed token is meant for."""
    said = claims["aud"]
    return (said,) if isinstance(said, str) else tuple(said)


def is_clients(claims: Mapping[str, Any]) -> bool:
    """Return whether a token speaks of a client app and not of a user."""
    return "client_id" in claims and claims["client_id"] == claims["sub"]


def permitted(held: Iterable[str], needed: str) -> bool:
    """Return whether ``needed`` (``area:verb``) is among ``held``, wildcards included."""
    area = needed.partition(":")[0]
    return any(permission in {needed, f"{area}:*", "*"} for permission in held)


def is_id(value: Any) -> bool:
    """Return whether a value is an id in the one spelling that ids have here."""
    try:
        return isinstance(value, str) and str(UUID(value)) == value
    except ValueError:
        return False


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _integer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_INTEGER


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _audience(value: Any) -> bool:
    # one is always text: what can be written in two ways is read in two ways
    return _text(value) or (_texts(value) and len(value) > 1 and all(value))


def _fresh(value: Any) -> bool:
    return isinstance(value, bool) or _integer(value)


COMMON: dict[str, Callable[[Any], bool]] = {
    "sub": is_id, "sid": is_id, "jti": is_id, "iss": _text, "aud": _audience, "type": _text,
    "exp": _integer, "iat": _integer, "nbf": _integer, "ver": _integer, "fresh": _fresh,
}  # fmt: skip
BY_TYPE: dict[str, dict[str, Callable[[Any], bool]]] = {
    ACCESS: COMMON | {"roles": _texts, "permissions": _texts},
    REFRESH: COMMON,
}
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "csrf": _text, "client_id": is_id, "username": _text, "scope": _text,
    # of a token that the version before made, they count as 0
    "seq": _integer, "opened_seq": _integer,
}  # fmt: skip


def well_formed(header: Mapping[str, Any], claims: Mapping[str, Any]) -> bool:
    """Return whether every claim is there, of its type, and ``typ`` goes with ``type``."""
    kind = claims.get("type")
    if kind not in (ACCESS, REFRESH) or HEADER_TYPES[kind] != header.get("typ"):
        return False
    if not all(fits(claims[name]) for name, fits in OPTIONAL.items() if name in claims):
        return False
    needed = BY_TYPE[kind]
    if not all(fits(claims.get(name)) for name, fits in needed.items()):
        return False
    # only a client app has several audiences
    if not isinstance(claims["aud"], str) and "client_id" not in claims:
        return False
    # every token that speaks of a user says who that is
    return kind != ACCESS or "username" in claims or is_clients(claims)
