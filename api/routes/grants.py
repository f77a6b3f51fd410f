"""Tokens as they are handed over: in the body, by cookie, or both."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from flask import Response
from flask_jwt_extended.config import config
from marshmallow import Schema

from api.auth import transport as travel
from api.auth.claims import AccessIdentity, RefreshIdentity
from api.auth.tokens import mint_access, mint_refresh
from api.errors import ValidationFailed
from api.json import json_response
from api.parts import parts
from api.services.sessions import Grant


def refuse_transport(transport: str | None) -> None:
    """Raise ``ValidationFailed`` where tokens cannot travel so: before anything is done."""
    if transport == "cookies" and "cookies" not in config.token_location:
        raise ValidationFailed(
            errors=[{"field": "transport", "message": "Tokens do not travel by cookie here."}]
        )


def hand_over(
    grant: Grant, schema: Schema, *, fresh: bool, transport: str | None, **members: Any
) -> Response:
    """Return the answer that carries a new pair of tokens.

    ``transport`` is ``json``, ``cookies`` or None for both. Cookies are ``csrf``-bound; a token
    that travels in JSON alone has no such claim.
    """
    by_cookie = transport != "json" and "cookies" in config.token_location
    lifetime = _access_lifetime(grant)
    access = mint_access(_access(grant, by_cookie), lifetime, fresh=fresh)
    refresh = mint_refresh(_refresh(grant, by_cookie), grant.refresh_expires_at)
    if transport != "cookies":
        members |= {"access_token": access, "refresh_token": refresh}
    members["expires_in"] = int(lifetime.total_seconds())
    response = json_response(schema.dump(members))
    if by_cookie:
        travel.set_cookies(response, access, refresh, grant.refresh_expires_at)
    return response


def _access_lifetime(grant: Grant) -> timedelta:
    # no access token outlives its session, idle or absolute
    left = grant.refresh_expires_at - datetime.now(UTC)
    whole = min(parts().settings.access_expires, max(1, round(left.total_seconds())))
    return timedelta(seconds=whole)


def _access(grant: Grant, by_cookie: bool) -> AccessIdentity:
    return AccessIdentity(
        user_id=grant.user_id,
        sid=grant.sid,
        username=grant.username,
        roles=grant.holding.roles,
        permissions=grant.holding.permissions,
        version=grant.version,
        by_cookie=by_cookie,
    )


def _refresh(grant: Grant, by_cookie: bool) -> RefreshIdentity:
    return RefreshIdentity(
        user_id=grant.user_id,
        sid=grant.sid,
        jti=grant.refresh_jti,
        version=grant.version,
        by_cookie=by_cookie,
    )
