"""Signing in, carrying on, signing out."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from uuid import UUID

from flask import Response
from flask_jwt_extended import get_jwt, get_jwt_request_location

from api import shapes
from api.asgi import on_loop, request_context
from api.auth import transport
from api.auth.claims import is_clients
from api.auth.client_guard import presented_at_login
from api.errors import (
    BadCredentials,
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
    """Sign in with a password: a new session and its first pair of tokens.

    A confidential client app authenticates too: by HTTP Basic, or with `client_secret`. A missing
    or wrong secret is 401 `bad_credentials`, whatever the password is.
    """
    how = body.get("transport")
    refuse_transport(how)
    client_id = await _client_id(body)
    grant = await parts().accounts.sign_in(body["username"], body["password"], origin(), client_id)
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
    """Spend a refresh token for the next pair; the answer travels as the token came.

    The session of a confidential client app is refreshed at `/oauth/token` alone: 401
    `invalid_token` here, and the token is not spent.
    """
    claims = get_jwt()
    if "client_id" in claims:
        await parts().client_access.refuse_refresh(UUID(claims["client_id"]))
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


async def _client_id(body: dict[str, Any]) -> UUID | None:
    # before the password is looked at: a wrong secret tells nothing of it
    client = presented_at_login(request_context().request, body)
    if client is None:
        return None
    return await parts().client_access.authenticate_at_login(*client, origin())


@on_loop
def clear_cookies_after_logout(response: Response) -> Response:
    """Clear the cookies where a logout was answered, and where their own token is refused.

    Those of a session that lives stay: after a refusal of anything else, after an error, and
    where another site sent the request, without the cookies. Only on POST: a link that somebody
    follows must not sign them out.
    """
    req = request_context().request
    if (
        req.path in {"/logout", "/logout/all"}
        and req.method == "POST"
        and (response.status_code == HTTPStatus.OK or _refuses_the_cookie(response))
    ):
        transport.clear_cookies(response)
    return response


def _refuses_the_cookie(response: Response) -> bool:
    if response.status_code != HTTPStatus.UNAUTHORIZED:
        return False
    context = request_context()
    return transport.is_decided_by_cookie(context.request, transport.places(context.app))
