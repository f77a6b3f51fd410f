"""Another Flask service, guarded by role, offline: `flask --app examples.jwks_flask run`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jwt
from flask import Flask, g, request

from examples.offline import verified

app = Flask(__name__)


def roles_required(*roles: str) -> Callable[[Any], Any]:
    """Ask for an access token that holds all of ``roles``."""

    def decorate(view: Any) -> Any:
        @wraps(view)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                g.claims = verified(request.headers.get("Authorization", ""))
            except jwt.PyJWKClientConnectionError:
                return {"error": "unavailable"}, 503, {"Retry-After": "1"}
            except jwt.PyJWTError:
                challenge = 'Bearer error="invalid_token"'
                return {"error": "invalid_token"}, 401, {"WWW-Authenticate": challenge}
            if not set(roles) <= set(g.claims["roles"]):
                return {"error": "insufficient_scope"}, 403
            return view(*args, **kwargs)

        return guarded

    return decorate


@app.get("/invoices")
@roles_required("user")
def invoices() -> dict[str, Any]:
    """For whoever holds the role."""
    return {"invoices": [], "for": g.claims.get("username", g.claims["sub"])}


@app.get("/ledger")
@roles_required("admin")
def ledger() -> dict[str, Any]:
    """For administrators."""
    return {"ledger": []}
