"""Sessions and tokens of anybody."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import current_app

from api import shapes
from api.errors import NotFound, Refused, ValidationFailed
from api.http import origin
from api.parts import parts
from api.services.sessions import SessionFilter
from schemas.audit import RevokedSchema, TokenRevokeSchema
from schemas.users import AnySessionListSchema, SessionQuerySchema


@shapes.query(SessionQuerySchema)
@shapes.answers(AnySessionListSchema)
async def index(query: dict[str, Any]) -> Any:
    """List live sessions, the newest first."""
    limit, cursor = query.pop("limit"), query.pop("cursor")
    return await parts().sessions.page(SessionFilter(**query), limit, cursor)


@shapes.answers(None, 204, errors=[NotFound])
async def end(session_id: UUID) -> None:
    """End a session."""
    await parts().sessions.end_any(session_id, origin())


@shapes.body(TokenRevokeSchema)
@shapes.answers(RevokedSchema)
async def revoke_token(body: dict[str, Any]) -> dict[str, Any]:
    """Take back one token; its session goes on."""
    if "token" in body:
        claims = _claims(body["token"])
        jti, sub = claims["jti"], claims["sub"]
    else:
        jti, sub = str(body["jti"]), str(body["sub"])
    await parts().sessions.revoke_any_token(jti, origin(), sub=sub)
    return {"revoked": True}


def _claims(token: str) -> dict[str, Any]:
    try:
        _, claims = current_app.extensions["flask-jwt-extended"].read_foreign(
            token, allow_expired=True
        )
    except Refused:
        raise ValidationFailed(
            errors=[{"field": "token", "message": "Not a token of this service."}]
        ) from None
    return dict(claims)
