"""A service that asks Rolecall about every token: what was taken back is refused at once.

`CLIENT_ID=… CLIENT_SECRET=… hypercorn -b 127.0.0.1:5003 examples.introspecting:app`, of a client
app whose audiences hold the tokens' audience.
"""

import os
from typing import Any

import httpx
from flask import Flask, abort, request
from werkzeug.datastructures import WWWAuthenticate

URL = os.environ.get("ROLECALL_URL", "http://127.0.0.1:8000")
AUTH = (os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"])
CHALLENGE = WWWAuthenticate("bearer", {"error": "invalid_token"})
rolecall = httpx.Client(base_url=URL, auth=AUTH, timeout=2)
app = Flask(__name__)


def asked(*roles: str) -> Any:
    """Return what Rolecall says of this request's token; abort unless it holds all of ``roles``."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        abort(401, www_authenticate=WWWAuthenticate("bearer"))
    try:
        answer = rolecall.post("/oauth/introspect", data={"token": token}).raise_for_status()
    except httpx.HTTPError:
        abort(503)  # nobody can tell: never open
    claims = answer.json()
    # a refresh token may be active too, and is none of ours
    if not claims["active"] or claims["type"] != "access":
        abort(401, www_authenticate=CHALLENGE)
    if not set(roles) <= set(claims["roles"]):
        abort(403)
    return claims


@app.get("/invoices")
def invoices() -> Any:
    """For whoever holds the role."""
    return {"invoices": [], "for": asked("user").get("username")}


@app.get("/ledger")
def ledger() -> Any:
    """For administrators."""
    return {"ledger": [], "for": asked("admin").get("username")}
