"""Tokens as they are handed over: in the body, by cookie, or both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from api.services.generations import Grant


def refuse_transport(transport: str | None) -> None:
    """Raise ``ValidationFailed`` where tokens cannot travel so: before anything is done."""
    if transport == "cookies" and "cookies" not in config.token_location:
        raise ValidationFailed(
            errors=[{"field": "transport", "message": "Tokens do not travel by cookie here."}]
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """An access and a refresh token; ``expires_in`` is the seconds that the first lives."""

    access_token: str
    refresh_token: str
    expires_in: int

    @property
    def members(self) -> dict[str, Any]:
        """What an answer in JSON says of it."""
        return asdict(self)


def pair(grant: Grant, *, by_cookie: bool, fresh: bool = False) -> Pair:
    """Mint the tokens of one generation; those that travel by cookie are ``csrf``-bound."""
    lifetime = _access_lifetime(grant)
    return Pair(
        mint_access(_access(grant, by_cookie), lifetime, fresh=fresh),
        mint_refresh(_refresh(grant, by_cookie), grant.refresh_expires_at),
        int(lifetime.total_seconds()),
    )


def hand_over(
    grant: Grant, schema: Schema, *, fresh: bool, transport: str | None, **members: Any
) -> Response:
    """Return the answer that carries a new pair of tokens.

    ``transport`` is ``json``, ``cookies`` or None for both. Cookies are ``csrf``-bound; a token
    that travels in JSON alone has no such claim.
    """
    by_cookie = transport != "json" and "cookies" in config.token_location
    tokens = pair(grant, by_cookie=by_cookie, fresh=fresh)
    if transport == "cookies":
        members["expires_in"] = tokens.expires_in
    else:
        members |= tokens.members
    response = json_response(schema.dump(members))
    if by_cookie:
        travel.set_cookies(
            response, tokens.access_token, tokens.refresh_token, grant.refresh_expires_at
        )
    return response


def _access_lifetime(grant: Grant) -> timedelta:
    # no access token outlives its session, idle or absolute
    left = grant.refresh_expires_at - datetime.now(UTC)
    whole = timedelta(seconds=max(1, round(left.total_seconds())))
    return min(parts().sessions.lifetimes.of_access(grant.client), whole)


def _access(grant: Grant, by_cookie: bool) -> AccessIdentity:
    return AccessIdentity(
        subject=grant.user_id,
        sid=grant.sid,
        username=grant.username,
        roles=grant.holding.roles,
        permissions=grant.holding.permissions,
        version=grant.version,
        seq=grant.seq,
        opened_seq=grant.opened_seq,
        by_cookie=by_cookie,
        client_id=grant.client.client_id if grant.client else None,
        audience=grant.client.audiences if grant.client else (),
        scope=grant.scope,
    )


def _refresh(grant: Grant, by_cookie: bool) -> RefreshIdentity:
    return RefreshIdentity(
        subject=grant.user_id,
        sid=grant.sid,
        jti=grant.refresh_jti,
        version=grant.version,
        opened_seq=grant.opened_seq,
        by_cookie=by_cookie,
        client_id=grant.client.client_id if grant.client else None,
    )
