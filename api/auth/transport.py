"""How tokens travel: headers, cookies with CSRF, query string, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from flask import Flask, Request, Response
from flask_jwt_extended import unset_jwt_cookies
from flask_jwt_extended.config import config
from werkzeug.datastructures import MultiDict

from api.auth import jws
from api.auth.claims import ACCESS, REFRESH
from api.errors import BadRequest, ValidationFailed
from api.settings import Settings

EXTENSION = "rolecall.places"
# More than any route takes. What is longer is refused unread: reading it would hold the loop.
MOST_PARAMETERS = 64
LONGEST_CONTENT_TYPE = 1_024


@dataclass(frozen=True, slots=True)
class Credential:
    """A token as it came, unverified. ``needs_csrf``: X-CSRF-TOKEN must go with it."""

    location: str
    token: str = field(repr=False)
    needs_csrf: bool = False


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens are looked for, and by what names: flask-jwt-extended's settings, read once.

    ``cookies`` and ``members`` (of a JSON body) are names by token type.
    """

    locations: tuple[str, ...]
    cookies: Mapping[str, str]
    members: Mapping[str, str]
    parameter: str
    csrf_methods: frozenset[str]


def configure(app: Flask, settings: Settings) -> None:
    """Tell flask-jwt-extended how tokens travel here."""
    prefix = settings.cookie_prefix
    app.config.update(
        JWT_TOKEN_LOCATION=list(settings.token_location),
        JWT_ACCESS_COOKIE_NAME=f"{prefix}access_token",
        JWT_REFRESH_COOKIE_NAME=f"{prefix}refresh_token",
        JWT_ACCESS_CSRF_COOKIE_NAME=f"{prefix}csrf_access_token",
        JWT_REFRESH_CSRF_COOKIE_NAME=f"{prefix}csrf_refresh_token",
        JWT_COOKIE_SECURE=settings.cookie_secure,
        JWT_COOKIE_SAMESITE="Lax",
        JWT_COOKIE_CSRF_PROTECT=settings.cookie_csrf_protect,
        JWT_ALGORITHM=settings.algorithm,
        JWT_DECODE_ALGORITHMS=["EdDSA", "ES256", "RS256"],
        JWT_ENCODE_ISSUER=settings.issuer,
        JWT_DECODE_ISSUER=settings.issuer,
        JWT_ENCODE_AUDIENCE=settings.audience,
        JWT_DECODE_AUDIENCE=settings.audience,
        JWT_DECODE_LEEWAY=settings.leeway,
        JWT_ACCESS_TOKEN_EXPIRES=settings.access_expires,
        JWT_REFRESH_TOKEN_EXPIRES=settings.refresh_expires,
    )


def places(app: Flask) -> Places:
    """Return where the current application, ``app``, looks for tokens."""
    found: Places | None = app.extensions.get(EXTENSION)
    if found is None:
        # at the first request, not before: until then a team may set its own names
        found = app.extensions[EXTENSION] = Places(
            locations=tuple(config.token_location),
            cookies={ACCESS: config.access_cookie_name, REFRESH: config.refresh_cookie_name},
            members={ACCESS: config.json_key, REFRESH: config.refresh_json_key},
            parameter=config.query_string_name,
            csrf_methods=frozenset(
                config.csrf_request_methods if config.cookie_csrf_protect else ()
            ),
        )
    return found


def credentials(
    request: Request, places: Places, locations: Iterable[str], kinds: Iterable[str]
) -> Iterator[Credential]:
    """Yield the tokens that ``request`` carries, in the order of ``locations``.

    ``kinds`` are the types that would do: a cookie's and a JSON member's name tell the type.
    Raises ``BadRequest`` for an Authorization header that cannot be understood, and for two
    tokens by one name; ``ValidationFailed`` for too many parameters in the query.
    """
    environ = request.environ
    for location in locations:
        if location == "headers":
            if token := bearer(environ.get("HTTP_AUTHORIZATION", "")):
                yield Credential(location, token)
        elif location == "cookies":
            if "HTTP_COOKIE" in environ:
                needs_csrf = request.method in places.csrf_methods
                for kind in kinds:
                    if token := _one_of(request.cookies.getlist(places.cookies[kind])):
                        yield Credential(location, token, needs_csrf)
        elif location == "query_string":
            if token := _one_of(query_of(request).getlist(places.parameter)):
                yield Credential(location, token)
        elif location == "json":
            yield from _in_json(request, places, kinds)


def is_decided_by_cookie(request: Request, places: Places) -> bool:
    """Return whether the token that ``request`` is judged by came in a cookie."""
    kinds = (ACCESS, REFRESH)
    try:
        first = next(credentials(request, places, places.locations, kinds), None)
    except (BadRequest, ValidationFailed):
        return False
    return first is not None and first.location == "cookies"


def query_of(request: Request) -> MultiDict[str, str]:
    """Return the parameters of the query. Raises ``ValidationFailed`` where there are too many."""
    if request.query_string.count(b"&") >= MOST_PARAMETERS:
        raise ValidationFailed(errors=[{"field": "", "message": "Has too many parameters."}])
    return request.args


def media_type(request: Request) -> str:
    """Return the Content-Type without its parameters; nothing for one of absurd length."""
    given = request.headers.get("Content-Type", "")
    return request.mimetype if len(given) <= LONGEST_CONTENT_TYPE else ""


def bearer(header: str) -> str | None:
    """Return the token of an Authorization header (RFC 6750 section 2.1), None without one.

    The scheme is compared without case (RFC 9110 section 11.1). A comma would be a second
    credential, and no two are taken in one header; but a JWS serialised as JSON (RFC 7515 section
    7.2) is one, which nobody takes for a token.
    """
    # optional white space is these two (RFC 9110 section 5.6.3); str.strip takes more
    header = header.strip(" \t")
    if not header:
        return None
    scheme, _, rest = header.partition(" ")
    token = rest.strip(" ")
    if scheme.lower() == "bearer" and token.startswith("{"):
        return token
    if "," in header or not header.isascii():
        raise BadRequest("The Authorization header must hold one credential.")
    if scheme.lower() != "bearer":
        return None
    if not token or " " in token:
        raise BadRequest("The Authorization header must be: Bearer, one space, the token.")
    return token


def csrf_header(request: Request) -> str | None:
    """Return X-CSRF-TOKEN as it was given."""
    return request.headers.get(config.access_csrf_header_name)


def set_cookies(response: Response, access: str, refresh: str, refresh_until: datetime) -> None:
    """Set both tokens and their CSRF cookies, for as long as the refresh token lives."""
    # the access cookie outlives its token on purpose: /logout and 401 token_expired need to see it
    seconds = max(1, int((refresh_until - datetime.now(UTC)).total_seconds()))
    for token, name, path, csrf_name, csrf_path in (
        (
            access, config.access_cookie_name, config.access_cookie_path,
            config.access_csrf_cookie_name, config.access_csrf_cookie_path,
        ),
        (
            refresh, config.refresh_cookie_name, config.refresh_cookie_path,
            config.refresh_csrf_cookie_name, config.refresh_csrf_cookie_path,
        ),
    ):  # fmt: skip
        _set_cookie(response, name, token, seconds, path, is_readable=False)
        if config.cookie_csrf_protect and config.csrf_in_cookies:
            csrf = jws.parse(token).claims["csrf"]
            _set_cookie(response, csrf_name, csrf, seconds, csrf_path, is_readable=True)


def _set_cookie(
    response: Response, name: str, value: str, seconds: int, path: str, *, is_readable: bool
) -> None:
    response.set_cookie(
        name,
        value,
        max_age=seconds,
        path=path,
        domain=config.cookie_domain,
        secure=config.cookie_secure,
        httponly=not is_readable,
        samesite=config.cookie_samesite,
    )


def clear_cookies(response: Response) -> None:
    """Clear all four cookies, with the attributes they were set with."""
    if "cookies" in config.token_location:
        unset_jwt_cookies(response)


def _one_of(tokens: list[str]) -> str | None:
    if len(set(tokens)) > 1:
        raise BadRequest("Two different tokens are given by one name.")
    return tokens[0] if tokens else None


def _in_json(request: Request, places: Places, kinds: Iterable[str]) -> Iterator[Credential]:
    body: Any = request.get_json(silent=True) if media_type(request) == "application/json" else None
    if isinstance(body, dict):
        for kind in kinds:
            token = body.get(places.members[kind])
            if isinstance(token, str) and token:
                yield Credential("json", token)
