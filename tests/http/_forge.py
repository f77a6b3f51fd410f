"""Tokens as a forger makes them, some with the service's own key, and what they are answered."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import jwt

from api.auth.keypairs import Key
from api.errors import catalogue
from api.parts import Parts
from tests.conftest import bearer, sign_in

Part = str | bytes | dict[str, Any]


def b64(data: bytes) -> str:
    """Return unpadded base64url."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encoded(part: Part) -> str:
    """Return a header or claims as a part of a token; text and bytes go in as they are."""
    if isinstance(part, dict):
        part = json.dumps(part)
    return b64(part.encode() if isinstance(part, str) else part)


def signed(parts: Parts, claims: Part, header: Part, key: Key | None = None) -> str:
    """Sign what is given with the service's own key (EdDSA), however odd it is."""
    message = f"{encoded(header)}.{encoded(claims)}"
    return f"{message}.{b64((key or parts.keys.current).private.sign(message.encode()))}"


def opened(token: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims, unverified."""
    token = str(token)
    claims = jwt.decode(token, options={"verify_signature": False})
    return jwt.get_unverified_header(token), claims


async def genuine(client: httpx.AsyncClient) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return an access token that works, its header and its claims."""
    token = str((await sign_in(client, transport="json"))["access_token"])
    return token, *opened(token)


def fault(answer: httpx.Response, code: str = "invalid_token") -> str | None:
    """Return what is wrong with a refusal of a token; None where all of it is as it must be.

    The document holds what the catalogue says and nothing else: no word of a library.
    """
    error = catalogue()[code]
    expected = {
        "type": f"/problems/{code}", "title": error.title, "status": 401,
        "detail": error.explanation, "code": code,
        "request_id": answer.headers.get("X-Request-ID"),
    }  # fmt: skip
    if (answer.status_code, answer.json()) != (401, expected):
        return f"{answer.status_code} {answer.text}"
    if answer.headers.get("WWW-Authenticate") != 'Bearer error="invalid_token"':
        return f"WWW-Authenticate: {answer.headers.get('WWW-Authenticate')}"
    if answer.headers.get("Cache-Control") != "no-store":
        return "may be stored"
    return None


async def let_in(
    client: httpx.AsyncClient,
    tokens: dict[str, str],
    code: str = "invalid_token",
    *,
    method: str = "GET",
    path: str = "/protected",
) -> dict[str, str]:
    """Send each token; return those that were not refused with 401 and ``code``, with why."""
    found = {}
    for name, token in tokens.items():
        answer = await client.request(method, path, headers=bearer(token))
        if wrong := fault(answer, code):
            found[name] = wrong
    return found
