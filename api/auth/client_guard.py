"""Which client app asks (RFC 6749 section 2.3): the guard of OAuth's endpoints, and at /login."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_plus
from uuid import UUID

from flask import Request

from api import forms
from api.asgi import request_context
from api.auth.guards import MARK, Async, Guard
from api.errors import BadRequest, InvalidClient, InvalidRequest, ValidationFailed
from api.http import origin


def client_required(*, public: bool = False) -> Callable[[Callable[..., Any]], Async]:
    """Ask for a client app, by HTTP Basic or in the form; the view gets it as ``client``.

    ``public``: one without a secret will do, by its ``client_id`` alone. The view's errors are
    ``InvalidRequest``, ``InvalidClient`` and ``TooManyRequests``.
    """

    def decorate(view: Callable[..., Any]) -> Async:
        @functools.wraps(view)
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            context = request_context()
            client_id, secret = presented(context.request, forms.members(context.request))
            access = context.app.extensions["rolecall"].client_access
            client = await access.authenticate(client_id, secret, origin())
            if client.is_public and not public:
                raise InvalidClient("A public client cannot prove who it is.")
            return await view(*args, client=client, **kwargs)

        setattr(guarded, MARK, Guard(client="any" if public else "confidential"))
        return guarded

    return decorate


def presented(request: Request, form: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the client's id and secret as they came.

    Raises ``InvalidRequest`` where they come in two ways, ``InvalidClient`` where in none.
    """
    header = _authorization(request)
    if not header:
        if "client_id" not in form:
            raise InvalidClient("The request does not say which client asks.")
        return form["client_id"], form.get("client_secret")
    try:
        client_id, secret = _basic(header)
    except ValueError:
        raise InvalidClient("The Authorization header is not HTTP Basic.") from None
    if not secret:
        raise InvalidClient
    if "client_secret" in form or form.get("client_id", client_id) != client_id:
        raise InvalidRequest("The client authenticates in more than one way.")
    return client_id, secret


def presented_at_login(request: Request, body: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Return the id and secret of the client app that a user signs in through; None without one.

    They come by HTTP Basic, or as ``client_id`` and ``client_secret`` of the JSON body. Other
    schemes of the Authorization header are ignored, and so is Basic with a name that is no client's
    where the body names none: a proxy asked for it. Raises ``BadRequest`` where they come in two
    ways or Basic is malformed, ``ValidationFailed`` for a secret without its client.
    """
    client_id = str(body["client_id"]) if "client_id" in body else None
    header = _authorization(request)
    by_header = None
    if header.partition(" ")[0].lower() == "basic":
        try:
            by_header = _basic(header)
        except ValueError:
            raise BadRequest("The Authorization header is not HTTP Basic.") from None
        if client_id is None and "client_secret" not in body and not _may_be_id(by_header[0]):
            by_header = None
    if by_header is None:
        if client_id is None and "client_secret" in body:
            raise ValidationFailed(
                errors=[{"field": "client_id", "message": "Required with client_secret."}]
            )
        return None if client_id is None else (client_id, body.get("client_secret"))
    if "client_secret" in body or client_id not in {None, by_header[0]}:
        raise BadRequest("The client authenticates in more than one way.")
    return by_header


def _may_be_id(name: str) -> bool:
    """Return whether a name is an id, in any spelling: only in one is it a client's."""
    try:
        UUID(name)
    except ValueError:
        return False
    return True


def _authorization(request: Request) -> str:
    header: str = request.environ.get("HTTP_AUTHORIZATION", "")
    return header.strip(" \t")


def _basic(header: str) -> tuple[str, str]:
    """Return the id and the secret, which may be empty. Raises ``ValueError``."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        raise ValueError("another scheme")
    decoded = base64.b64decode(encoded.strip(" "), validate=True).decode()
    client_id, colon, secret = decoded.partition(":")
    # RFC 6749 section 2.3.1: both halves are form-encoded before they are joined
    client_id, secret = (unquote_plus(half, errors="strict") for half in (client_id, secret))
    if not colon or not client_id:
        raise ValueError("no client id")
    return client_id, secret
