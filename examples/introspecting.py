"""A service that asks Rolecall about every token: what was taken back is refused at once.

`CLIENT_ID=… CLIENT_SECRET=… hypercorn -b 127.0.0.1:5003 examples.introspecting:app`, of a client
app whose audiences hold the tokens' audience.
"""

from __future__ import annotations

import os
from typing import Any

import httpx
from flask import Flask, abort, request

AUTH = (os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"])
rolecall = httpx.Client(
    base_url=os.environ.get("ROLECALL_URL", "http://127.0.0.1:8000"), auth=AUTH, timeout=2
)
app = Flask(__name__)


def asked(*roles: str) -> dict[str, Any]:
    """Return what Rolecall says of this request's token; abort unless it holds all of ``roles``."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        abort(401)
    try:
        answer = rolecall.post("/oauth/introspect", data={"token": token}).raise_for_status()
    except httpx.HTTPError:
        abort(503)  # nobody can tell: never open
    claims: dict[str, Any] = answer.json()
    # a refresh token may be active too, and is none of ours
    if not claims["active"] or claims["type"] != "access":
        abort(401)
    if not set(roles) <= set(claims["roles"]):
        abort(403)
    return claims


@app.get("/invoices")
def invoices() -> dict[str, Any]:
    """For whoever holds the role."""
    return {"invoices": [], "for": asked("user").get("username")}


@app.get("/ledger")
def ledger() -> dict[str, Any]:
    """For administrators."""
    asked("admin")
    return {"ledger": []}
