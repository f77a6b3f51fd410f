"""Signing in, carrying on, signing out."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import Response
from flask_jwt_extended import get_jwt, get_jwt_request_location

from api import shapes
from api.asgi import on_loop, request_context
from api.auth import transport
from api.auth.claims import is_clients
from api.errors import (
    BadCredentials,
    InternalError,
    NotFound,
    RefreshReused,
    RegistrationClosed,
    TokenRevoked,
    TooManyRequests,
    Unavailable,
    UsernameTaken,
    WeakPassword,
)
from api.http import origin
from api.parts import parts
from api.routes.grants import hand_over, refuse_transport
from schemas.auth import (
    LoginAnswerSchema,
    LoginSchema,
    LogoutAllAnswerSchema,
    LogoutAnswerSchema,
    ProtectedSchema,
    RefreshAnswerSchema,
    RegisterSchema,
)
from schemas.users import MeSchema

LOGIN_ANSWER, REFRESH_ANSWER = LoginAnswerSchema(), RefreshAnswerSchema()


@shapes.body(LoginSchema)
@shapes.answers(LoginAnswerSchema, errors=[BadCredentials, TooManyRequests, Unavailable])
async def login(body: dict[str, Any]) -> Response:
    """Sign in with a password: a new session and its first pair of tokens."""
    how = body.get("transport")
    refuse_transport(how)
    grant = await parts().accounts.sign_in(
        body["username"], body["password"], origin(), body.get("client_id")
    )
    user = {"id": grant.user_id, "username": grant.username, "roles": grant.holding.roles}
    return hand_over(grant, LOGIN_ANSWER, fresh=True, transport=how, login=True, user=user)


@shapes.answers(ProtectedSchema)
async def protected() -> dict[str, Any]:
    """Say who the token speaks of: the smallest guarded route there is."""
    claims = get_jwt()
    # a client app has no username
    return {"logged_in_as": claims.get("username", claims["sub"]), "roles": claims["roles"]}


@shapes.answers(RefreshAnswerSchema, errors=[RefreshReused, Unavailable])
async def refresh() -> Response:
    """Spend a refresh token for the next pair; the answer travels as the token came."""
    claims = get_jwt()
    grant = await parts().rotations.rotate(UUID(claims["sid"]), claims["jti"], origin())
    how = "cookies" if get_jwt_request_location() == "cookies" else "json"
    return hand_over(grant, REFRESH_ANSWER, fresh=False, transport=how, refresh=True)


@shapes.answers(LogoutAnswerSchema, errors=[Unavailable])
async def logout() -> dict[str, Any]:
    """End the session of the token, whichever of the two it is."""
    claims = get_jwt()
    if is_clients(claims):
        # it has no session: the token is all there is to end
        await parts().sessions.revoke_token(claims["jti"], origin(), sub=claims["sub"])
        return {"logout": True}
    try:
        await parts().sessions.end(UUID(claims["sid"]), UUID(claims["sub"]), origin())
    except NotFound:
        # another request ended it since the guard looked
        raise TokenRevoked from None
    return {"logout": True}


@shapes.answers(LogoutAllAnswerSchema, errors=[Unavailable])
async def logout_all() -> dict[str, Any]:
    """End every session of the user."""
    ended = await parts().sessions.end_all(UUID(get_jwt()["sub"]), origin())
    return {"logout": True, "sessions": ended}


@shapes.body(RegisterSchema)
@shapes.answers(MeSchema, 201, errors=[RegistrationClosed, UsernameTaken, WeakPassword])
async def register(body: dict[str, Any]) -> Any:
    """Make an account of one's own, where registration is open."""
    return await parts().accounts.register(
        body["username"], body["password"], body["email"], origin()
    )


@on_loop
def clear_cookies_after_logout(response: Response) -> Response:
    """Clear the cookies on every answer to a logout: nobody is kept signed in by an error.

    But for 5xx: nothing was ended then, and the browser must be able to try again. And only on
    POST: a link that somebody follows must not sign them out.
    """
    req = request_context().request
    is_logout = req.path in {"/logout", "/logout/all"} and req.method == "POST"
    if is_logout and response.status_code < InternalError.status:
        transport.clear_cookies(response)
    return response
