"""A FastAPI service, guarded by role, offline: `hypercorn examples.jwks_fastapi:app`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, Header, HTTPException

from examples.offline import verified

app = FastAPI()


def holding(*roles: str) -> Callable[..., dict[str, Any]]:
    """Ask for an access token that holds all of ``roles``; fetching keys blocks, so no async."""

    def guard(authorization: Annotated[str, Header()] = "") -> dict[str, Any]:
        try:
            claims = verified(authorization)
        except jwt.PyJWKClientConnectionError:
            raise HTTPException(503, headers={"Retry-After": "1"}) from None
        except jwt.PyJWTError:
            challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
            raise HTTPException(401, headers=challenge) from None
        if not set(roles) <= set(claims["roles"]):
            raise HTTPException(403)
        return claims

    return guard


@app.get("/invoices")
async def invoices(claims: dict[str, Any] = Depends(holding("user"))) -> dict[str, Any]:  # noqa: B008
    """For whoever holds the role."""
    return {"invoices": [], "for": claims.get("username", claims["sub"])}


@app.get("/ledger", dependencies=[Depends(holding("admin"))])
async def ledger() -> dict[str, Any]:
    """For administrators."""
    return {"ledger": []}
