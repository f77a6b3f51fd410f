"""What every request and every answer has: an id, an origin, security headers, a log line."""

from __future__ import annotations

import ipaddress
import logging
import random
import re
import time
from typing import Any

import structlog
from flask import Response, current_app, g, request
from flask_cors import CORS

from api import metrics
from api.asgi import REQUEST_ID, AsyncFlask, on_loop, request_context, request_globals
from api.services.audit import Origin
from api.settings import Settings

WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
USER_AGENT_LENGTH = 255
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
CORS_HEADERS = ["Authorization", "Content-Type", "X-CSRF-TOKEN", "X-Request-ID"]
CORS_EXPOSED = ["X-Request-ID", "Retry-After", "WWW-Authenticate"]

log = structlog.get_logger("rolecall.http")
is_logged = logging.getLogger("rolecall.http").isEnabledFor


def install(app: AsyncFlask, settings: Settings) -> None:
    """Register the hooks; the origins that may read answers are named one by one, or none."""
    app.config["ROLECALL_TRUSTED_PROXIES"] = settings.trusted_proxies
    app.default_headers = HEADERS
    app.before_request(_begin)
    app.after_request(_finish)
    if settings.cors_origins:
        app.after_request(_vary)
        CORS(
            app,
            origins=[re.compile(f"^{re.escape(origin)}$") for origin in settings.cors_origins],
            supports_credentials=True,
            allow_headers=CORS_HEADERS,
            expose_headers=CORS_EXPOSED,
            max_age=600,
            # flask-cors says it to origins that it knows alone
            vary_header=False,
        )


def origin() -> Origin:
    """Return where this request comes from and, behind a guard, whose it is."""
    proxies = int(current_app.config["ROLECALL_TRUSTED_PROXIES"])
    agent = request.headers.get("User-Agent", "")[:USER_AGENT_LENGTH]
    claims: dict[str, Any] = g.get("_jwt_extended_jwt") or {}
    return Origin(
        ip=client_address(request.remote_addr, request.headers.getlist("X-Forwarded-For"), proxies),
        request_id=g.request_id,
        user_agent="".join(c for c in agent if c.isprintable()) or None,
        actor=claims.get("sub"),
        client_id=claims.get("client_id"),
        scope=tuple(claims["scope"].split()) if "scope" in claims else None,
        sid=claims.get("sid"),
        jti=claims.get("jti"),
        opened_seq=claims.get("opened_seq", 0),
    )


def client_address(peer: str | None, forwarded: list[str], proxies: int) -> str | None:
    """Return the address that ``proxies`` trusted hops vouch for; the peer's without any.

    Each trusted hop appended the address that it saw: counting from the right, nothing that the
    client wrote itself is believed.
    """
    hops = [hop.strip() for line in forwarded for hop in line.split(",") if hop.strip()]
    vouched = _address(hops[-proxies]) if proxies and len(hops) >= proxies else None
    return vouched or (_address(peer) if peer else None)


def _address(hop: str) -> str | None:
    """Return an address without brackets, port and zone; None for what is none.

    IPv4 in IPv6 is IPv4. A zone (RFC 4007 section 11) may be text of any length.
    """
    bare = hop.split("]")[0].removeprefix("[") if hop.startswith("[") else hop
    if bare.count(":") == 1:
        bare = bare.split(":")[0]
    try:
        found = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    return str(getattr(found, "ipv4_mapped", None) or found)


@on_loop
def _begin() -> None:
    context = request_globals()
    environ = request_context().request.environ
    given = environ.get("HTTP_X_REQUEST_ID", "")
    context.request_id = given if WELL_FORMED_ID.fullmatch(given) else new_request_id()
    environ[REQUEST_ID] = context.request_id
    context.began = time.perf_counter()


@on_loop
def _finish(response: Response) -> Response:
    context = request_globals()
    req = request_context().request
    route = req.url_rule.rule if req.url_rule else None
    seconds = time.perf_counter() - context.began
    metrics.count_request(req.method, route, response.status_code, seconds)
    headers = response.headers
    headers["X-Request-ID"] = context.request_id
    if response.is_sequence and not any(response.response):
        # Flask calls nothing at all text/html
        headers.pop("Content-Type", None)
    if is_logged(logging.DEBUG):
        log.debug(
            "request",
            method=req.method,
            route=route,
            status=response.status_code,
            milliseconds=round(seconds * 1000, 2),
            request_id=context.request_id,
        )
    return response


@on_loop
def _vary(response: Response) -> Response:
    """Let no cache give one origin what another got (Fetch, "CORS protocol and HTTP caches")."""
    response.vary.add("Origin")
    return response


def new_request_id() -> str:
    """Return a UUIDv7 (RFC 9562 section 5.7) that need not be hard to guess, only unique.

    A fifth of the price of one from the operating system's random numbers; ``random`` seeds
    itself anew in every process.
    """
    milliseconds = time.time_ns() // 1_000_000
    noise = random.getrandbits(74)
    value = milliseconds << 80 | 7 << 76 | (noise >> 62) << 64 | 2 << 62 | noise & (1 << 62) - 1
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
