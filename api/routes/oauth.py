"""OAuth 2.0 for client apps: tokens (RFC 6749), introspection (7662), revocation (7009)."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import UUID

from flask import request

from api import shapes
from api.asgi import request_context
from api.auth.claims import ACCESS, REFRESH, AccessIdentity, audiences
from api.auth.guards import ensure_not_revoked, read_foreign
from api.auth.tokens import mint_access
from api.blocklist import Verdict
from api.db.models import new_id
from api.errors import (
    InvalidClient,
    InvalidGrant,
    InvalidRequest,
    InvalidScope,
    InvalidToken,
    NotFound,
    TooManyRequests,
    Unauthorized,
    UnauthorizedClient,
    UnsupportedGrantType,
)
from api.http import origin
from api.parts import parts
from api.routes.grants import pair
from api.services.audit import Origin
from api.services.client_access import AuthenticatedClient
from api.services.client_terms import REFRESH_TOKEN
from schemas.oauth import (
    IntrospectionSchema,
    MetadataSchema,
    TokenAnswerSchema,
    TokenQuestionSchema,
    TokenRequestSchema,
)

# RFC 6749 appendix A.4, as permissions are written.
SCOPE = re.compile(r"[a-z0-9_.:*-]{1,64}( [a-z0-9_.:*-]{1,64}){0,63}", re.ASCII)
CLIENT_ERRORS = [InvalidRequest, InvalidClient, TooManyRequests]
TOLD = (
    "client_id", "username", "exp", "iat", "nbf", "sub", "aud", "iss", "jti", "sid", "type",
    "roles", "permissions",
)  # fmt: skip
WITH_SECRET = ["client_secret_basic", "client_secret_post"]


@shapes.form(TokenRequestSchema)
@shapes.answers(
    TokenAnswerSchema,
    errors=[
        *CLIENT_ERRORS,
        InvalidGrant,
        InvalidScope,
        UnauthorizedClient,
        UnsupportedGrantType,
    ],
    # RFC 6749 section 5.1
    headers={"Pragma": "no-cache"},
)
async def token(client: AuthenticatedClient, form: dict[str, str]) -> dict[str, Any]:
    """Grant tokens for client_credentials, or for a refresh token that was issued to the client."""
    grant = {"client_credentials": _client_credentials, "refresh_token": _refresh_token}.get(
        form["grant_type"]
    )
    if grant is None:
        raise UnsupportedGrantType
    client.terms.ensure_grant(form["grant_type"])
    return await grant(client, form)


async def _client_credentials(client: AuthenticatedClient, form: dict[str, str]) -> dict[str, Any]:
    scope = _scope(form)
    grant = await parts().client_access.grant(client, scope, _origin(client))
    lifetime = parts().sessions.lifetimes.of_access(grant.terms)
    access = mint_access(
        AccessIdentity(
            subject=client.id,
            # a session of its own, that nothing can refresh
            sid=new_id(),
            username=None,
            roles=grant.holding.roles,
            permissions=grant.holding.permissions,
            version=grant.version,
            seq=grant.seq,
            opened_seq=grant.seq,
            client_id=client.id,
            audience=grant.terms.audiences,
            scope=scope,
        ),
        lifetime,
        fresh=False,
    )
    return {
        "access_token": access,
        "expires_in": int(lifetime.total_seconds()),
        "scope": " ".join(grant.holding.permissions),
    }


async def _refresh_token(client: AuthenticatedClient, form: dict[str, str]) -> dict[str, Any]:
    if "refresh_token" not in form:
        raise InvalidRequest("refresh_token is missing.")
    scope = _scope(form)
    claims = await _genuine(form["refresh_token"])
    if claims is None or claims["type"] != REFRESH or not _issued_to(client, claims):
        raise InvalidGrant
    try:
        await ensure_not_revoked(parts().blocklist, claims)
        grant = await parts().rotations.rotate(
            UUID(claims["sid"]), claims["jti"], _origin(client), scope, grant_type=REFRESH_TOKEN
        )
    except Unauthorized:
        raise InvalidGrant from None
    return {**pair(grant, by_cookie=False).members, "scope": " ".join(grant.holding.permissions)}


@shapes.form(TokenQuestionSchema)
@shapes.answers(IntrospectionSchema, errors=CLIENT_ERRORS)
async def introspect(client: AuthenticatedClient, form: dict[str, str]) -> dict[str, Any]:
    """Tell whether a token is good just now, and what it says; only what the client may know."""
    claims = await _genuine(form["token"])
    if claims is None or not _may_know(client, claims) or not await _is_good(claims):
        return {"active": False}
    told = {name: claims[name] for name in TOLD if name in claims} | {"active": True}
    if claims["type"] == ACCESS:
        told |= {"token_type": "Bearer", "scope": " ".join(claims["permissions"])}
    return told


@shapes.form(TokenQuestionSchema)
@shapes.answers(None, errors=CLIENT_ERRORS)
async def revoke(client: AuthenticatedClient, form: dict[str, str]) -> None:
    """Take back a token that was issued to the client; a refresh token ends its session.

    Anything else is answered alike, and left as it is.
    """
    claims = await _genuine(form["token"])
    if claims is None or not _issued_to(client, claims):
        return
    sessions, by = parts().sessions, _origin(client)
    if claims["type"] == ACCESS:
        await sessions.revoke_token(claims["jti"], by, sub=claims["sub"])
        return
    with suppress(NotFound):  # it has ended already
        await sessions.end(UUID(claims["sid"]), UUID(claims["sub"]), by, reason="revoked")


@shapes.answers(MetadataSchema)
async def metadata() -> dict[str, Any]:
    """Describe this authorization server (RFC 8414)."""
    issuer = parts().settings.issuer
    # an issuer that is a URL says where it is; the Host header is only what the client believes
    here = issuer if issuer.startswith(("https://", "http://")) else request.host_url
    here = here.rstrip("/")
    return {
        "issuer": issuer,
        "token_endpoint": f"{here}/oauth/token",
        "jwks_uri": f"{here}/.well-known/jwks.json",
        "introspection_endpoint": f"{here}/oauth/introspect",
        "revocation_endpoint": f"{here}/oauth/revoke",
        "service_documentation": f"{here}/docs",
        "response_types_supported": [],
        "grant_types_supported": ["client_credentials", "refresh_token"],
        "token_endpoint_auth_methods_supported": [*WITH_SECRET, "none"],
        "introspection_endpoint_auth_methods_supported": WITH_SECRET,
        "revocation_endpoint_auth_methods_supported": [*WITH_SECRET, "none"],
    }


async def _genuine(token: str) -> dict[str, Any] | None:
    try:
        return await read_foreign(request_context().app, token)
    except InvalidToken:
        return None


def _issued_to(client: AuthenticatedClient, claims: dict[str, Any]) -> bool:
    return claims.get("client_id") == str(client.id)


def _may_know(client: AuthenticatedClient, claims: dict[str, Any]) -> bool:
    # a refresh token is meant for this service, whatever its audience says
    meant = claims["type"] == ACCESS and set(audiences(claims)) & set(client.terms.audiences)
    return bool(meant) or _issued_to(client, claims)


async def _is_good(claims: dict[str, Any]) -> bool:
    if await parts().blocklist.check(claims) is not Verdict.VALID:
        return False
    if claims["type"] == ACCESS:
        return True
    return await parts().rotations.is_current(UUID(claims["sid"]), claims["jti"])


def _scope(form: dict[str, str]) -> tuple[str, ...] | None:
    if "scope" not in form:
        return None
    if not SCOPE.fullmatch(form["scope"]):
        raise InvalidScope("The scope is not a list of permissions with one space between them.")
    return tuple(sorted(set(form["scope"].split(" "))))


def _origin(client: AuthenticatedClient) -> Origin:
    return replace(origin(), actor=str(client.id))
