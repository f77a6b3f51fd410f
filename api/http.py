"""What every request and every answer has: an id, an origin, security headers, a log line."""

from __future__ import annotations

import ipaddress
import re
import time

import structlog
from flask import Flask, Response, current_app, g, request
from flask_cors import CORS
from flask_jwt_extended import get_jwt_identity

from api.asgi import on_loop
from api.db.models import new_id
from api.services.audit import Origin
from api.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
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


def install(app: Flask, settings: Settings) -> None:
    """Register the hooks; the origins that may read answers are named one by one, or none."""
    app.config["ROLECALL_TRUSTED_PROXIES"] = settings.trusted_proxies
    app.before_request(_begin)
    app.after_request(_finish)
    if settings.cors_origins:
        CORS(
            app,
            origins=[re.compile(f"^{re.escape(origin)}$") for origin in settings.cors_origins],
            supports_credentials=True,
            allow_headers=CORS_HEADERS,
            expose_headers=CORS_EXPOSED,
            max_age=600,
        )


def origin() -> Origin:
    """Return where this request comes from and, behind a guard, whose it is."""
    proxies = int(g.trusted_proxies)
    agent = request.headers.get("User-Agent", "")[:USER_AGENT_LENGTH]
    return Origin(
        ip=client_address(request.remote_addr, request.headers.getlist("X-Forwarded-For"), proxies),
        request_id=g.request_id,
        user_agent="".join(c for c in agent if c.isprintable()) or None,
        actor=get_jwt_identity() if g.get("_jwt_extended_jwt") else None,
    )


def client_address(peer: str | None, forwarded: list[str], proxies: int) -> str | None:
    """Return the address that ``proxies`` trusted hops vouch for; the peer's without any.

    Each trusted hop appended the address that it saw: counting from the right, nothing that the
    client wrote itself is believed.
    """
    hops = [hop.strip() for line in forwarded for hop in line.split(",") if hop.strip()]
    vouched = _address(hops[-proxies]) if proxies and len(hops) >= proxies else None
    return vouched or peer


def _address(hop: str) -> str | None:
    """Return the address that a proxy wrote, without brackets and port; None for anything else."""
    bare = hop.split("]")[0].removeprefix("[") if hop.startswith("[") else hop
    if bare.count(":") == 1:
        bare = bare.split(":")[0]
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        return None


@on_loop
def _begin() -> None:
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else str(new_id())
    g.trusted_proxies = current_app.config["ROLECALL_TRUSTED_PROXIES"]
    g.began = time.perf_counter()


@on_loop
def _finish(response: Response) -> Response:
    headers = response.headers
    headers["X-Request-ID"] = g.request_id
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if response.is_sequence and not response.get_data():
        # Flask calls nothing at all text/html
        headers.pop("Content-Type", None)
    log.debug(
        "request",
        method=request.method,
        route=request.url_rule.rule if request.url_rule else None,
        status=response.status_code,
        milliseconds=round((time.perf_counter() - g.began) * 1000, 2),
        request_id=g.request_id,
    )
    return response
