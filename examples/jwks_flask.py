"""Another Flask service, guarded by role, offline: `flask --app examples.jwks_flask run`."""

from functools import wraps
from typing import Any

import jwt
from flask import Flask, abort, g, request
from werkzeug.datastructures import WWWAuthenticate

from examples.offline import verified

app = Flask(__name__)


def roles_required(*roles: str) -> Any:
    """Ask for an access token that holds all of ``roles``."""

    def decorate(view: Any) -> Any:
        @wraps(view)
        def guarded(**kwargs: Any) -> Any:
            try:
                g.claims = verified(request.headers.get("Authorization", ""))
            except jwt.PyJWKClientConnectionError:
                abort(503)  # the keys cannot be had
            except jwt.PyJWTError:
                abort(401, www_authenticate=WWWAuthenticate("bearer", {"error": "invalid_token"}))
            if not set(roles) <= set(g.claims["roles"]):
                abort(403)
            return view(**kwargs)

        return guarded

    return decorate


@app.get("/invoices")
@roles_required("user")
def invoices() -> Any:
    """For whoever holds the role."""
    return {"invoices": [], "for": g.claims.get("username", g.claims["sub"])}


@app.get("/ledger")
@roles_required("admin")
def ledger() -> Any:
    """For administrators."""
    return {"ledger": []}
