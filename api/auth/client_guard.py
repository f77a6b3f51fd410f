"""The guard of OAuth's endpoints: which client app asks (RFC 6749 section 2.3)."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_plus

from flask import Request

from api import forms
from api.asgi import request_context
from api.auth.guards import MARK, Async, Guard
from api.errors import InvalidClient, InvalidRequest
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
    header = request.environ.get("HTTP_AUTHORIZATION", "").strip(" \t")
    if not header:
        if "client_id" not in form:
            raise InvalidClient("The request does not say which client asks.")
        return form["client_id"], form.get("client_secret")
    client_id, secret = _basic(header)
    if "client_secret" in form or form.get("client_id", client_id) != client_id:
        raise InvalidRequest("The client authenticates in more than one way.")
    return client_id, secret


def _basic(header: str) -> tuple[str, str]:
    # RFC 6749 section 2.3.1: both halves are form-encoded before they are joined
    scheme, _, encoded = header.partition(" ")
    try:
        if scheme.lower() != "basic":
            raise ValueError(scheme)
        client_id, colon, secret = (
            base64.b64decode(encoded.strip(" "), validate=True).decode().partition(":")
        )
        client_id, secret = (unquote_plus(half, errors="strict") for half in (client_id, secret))
    except ValueError:
        raise InvalidClient("The Authorization header is not HTTP Basic.") from None
    if not colon or not client_id or not secret:
        raise InvalidClient
    return client_id, secret
