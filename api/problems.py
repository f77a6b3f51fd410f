"""How every error leaves: as application/problem+json (RFC 9457), with its request id."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from flask import Flask, Response, current_app, g, request
from flask_jwt_extended import exceptions as fje
from jwt import ExpiredSignatureError, PyJWTError
from werkzeug.exceptions import HTTPException

from api import errors, metrics
from api.errors import Forbidden, InvalidClient, OAuthError, Refused, Unauthorized
from api.json import json_response
from api.tracebacks import plain_traceback

log = structlog.get_logger("rolecall.http")

PROBLEM = "application/problem+json"
BY_STATUS: dict[int, type[Refused]] = {
    400: errors.BadRequest,
    401: errors.MissingToken,
    403: errors.InsufficientPermission,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    408: errors.RequestTimeout,
    409: errors.Conflict,
    413: errors.BodyTooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.ValidationFailed,
    429: errors.TooManyRequests,
    500: errors.InternalError,
    503: errors.Unavailable,
}
# What flask-jwt-extended raises where it is used bare, beside our guards.
BY_LIBRARY: dict[type[Exception], type[Refused]] = {
    fje.NoAuthorizationError: errors.MissingToken,
    fje.CSRFError: errors.CsrfFailed,
    fje.RevokedTokenError: errors.TokenRevoked,
    fje.FreshTokenRequired: errors.FreshTokenRequired,
    fje.WrongTokenError: errors.WrongTokenType,
    fje.InvalidHeaderError: errors.BadRequest,
    fje.JWTExtendedException: errors.InvalidToken,
    ExpiredSignatureError: errors.TokenExpired,
    PyJWTError: errors.InvalidToken,
}


def install(app: Flask) -> None:
    """Register a handler for every error there is."""
    app.register_error_handler(Refused, answer)
    app.register_error_handler(OAuthError, _to_client)
    app.register_error_handler(HTTPException, _from_werkzeug)
    app.register_error_handler(Exception, _unexpected)
    for raised, refused in BY_LIBRARY.items():
        app.register_error_handler(raised, _translated(refused))
    _override_loaders(app)


async def answer(error: Refused) -> Response:
    """Return the problem document of ``error``, with the headers that its status asks for."""
    metrics.count_refusal(error.code)
    response = json_response(document(error, g.get("request_id", "")))
    response.status_code = error.status
    response.mimetype = PROBLEM
    response.headers.update(headers(error))
    _challenge(response, error)
    return response


def document(error: Refused, request_id: str) -> dict[str, Any]:
    """Return the members of a problem document."""
    return {
        "type": f"/problems/{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
        **error.extra,
    }


def headers(error: Refused) -> dict[str, str]:
    """Return the headers that ``error`` brings along, whatever was asked."""
    waits = error.status == HTTPStatus.TOO_MANY_REQUESTS or error.status >= 500
    return ({"Retry-After": "1"} if waits else {}) | error.headers


def of_status(status: int) -> Refused:
    """Return the error that stands for a bare status."""
    kind = BY_STATUS.get(status)
    return kind() if kind else _Other(status)


async def _to_client(error: OAuthError) -> Response:
    """RFC 6749 section 5.2: its members, its media type, and a challenge for the client."""
    metrics.count_refusal(error.error)
    response = json_response({"error": error.error, "error_description": error.detail})
    response.status_code = error.status
    response.headers["Pragma"] = "no-cache"
    if isinstance(error, InvalidClient):
        response.headers["WWW-Authenticate"] = 'Basic realm="rolecall", charset="UTF-8"'
    return response


def _challenge(response: Response, error: Refused) -> None:
    """RFC 6750 section 3: no error code where the request carried no token."""
    if not isinstance(error, Unauthorized | Forbidden):
        return
    response.headers["Cache-Control"] = "no-store"
    if error.challenge:
        response.headers["WWW-Authenticate"] = f'Bearer error="{error.challenge}"'
    elif isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"


async def _from_werkzeug(error: HTTPException) -> Any:
    status = error.code or 500
    if status < 400:
        # a redirect is raised as an exception too
        return current_app.make_response(error.get_response())
    response = await answer(of_status(status))
    for name, value in error.get_headers():
        if name.lower() not in {"content-type", "content-length"}:
            response.headers[name] = value
    return response


class _Other(Refused):
    """A status that the contract gives no code of its own: a view of a team's own aborted."""

    def __init__(self, status: int) -> None:
        self.status = status  # type: ignore[misc]
        self.title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"  # type: ignore[misc]
        self.code = "bad_request" if status < 500 else "internal_error"  # type: ignore[misc]
        super().__init__(self.title)


async def _unexpected(error: Exception) -> Response:
    log.error(
        "unexpected_error",
        request_id=g.get("request_id"),
        method=request.method,
        route=request.url_rule.rule if request.url_rule else None,
        exception=plain_traceback(error),
    )
    return await answer(errors.InternalError())


def _translated(refused: type[Refused]) -> Any:
    async def handler(_error: Exception) -> Response:
        return await answer(refused())

    return handler


def _override_loaders(app: Flask) -> None:
    """Let no message of flask-jwt-extended out: whoever calls its loaders gets our answers."""
    manager = app.extensions["flask-jwt-extended"]

    def raising(refused: type[Refused]) -> Any:
        def loader(*_args: Any) -> Any:
            raise refused

        return loader

    manager.expired_token_loader(raising(errors.TokenExpired))
    manager.invalid_token_loader(raising(errors.InvalidToken))
    manager.needs_fresh_token_loader(raising(errors.FreshTokenRequired))
    manager.revoked_token_loader(raising(errors.TokenRevoked))
    manager.unauthorized_loader(raising(errors.MissingToken))
    manager.user_lookup_error_loader(raising(errors.InvalidToken))
    manager.token_verification_failed_loader(raising(errors.InvalidToken))
