"""What the service says of itself: health, keys, its document, its errors."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import flask_swagger_ui
from flask import Response, current_app, redirect, request, send_from_directory
from prometheus_client import CONTENT_TYPE_LATEST

from api import errors, metrics, shapes
from api.auth.claims import ACCESS, REFRESH
from api.errors import NotFound, PreconditionFailed, Unavailable
from api.json import json_response
from api.parts import parts
from api.services.signing_keys import JWKS_SECONDS
from schemas.service import JwksSchema, LiveSchema, ReadySchema

# RFC 7517 section 8.5
JWKS_TYPE = "application/jwk-set+json"
SWAGGER_UI = Path(str(files(flask_swagger_ui))) / "dist"
# Swagger UI runs without inline scripts or styles; its icons are data: URLs
DOCS_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
PAGE_CSP = "default-src 'none'; frame-ancestors 'none'"
DOCS_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Rolecall API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>
</body></html>
"""
# /logout takes either token: the access token where there is one, as the service does
DOCS_START = """const cookies = %s;
const csrf = (kind) => document.cookie.split("; ")
  .find((one) => one.startsWith(cookies[kind] + "="))?.slice(cookies[kind].length + 1);
SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null,
  requestInterceptor: (request) => {
    const refreshes = new URL(request.url, location.href).pathname === "/refresh";
    const value = refreshes ? csrf("refresh") : csrf("access") ?? csrf("refresh");
    if (value) request.headers["X-CSRF-TOKEN"] = value;
    return request;
  },
});
"""


@shapes.answers(LiveSchema)
async def live() -> dict[str, str]:
    """Say that the process runs."""
    return {"status": "ok"}


@shapes.answers(ReadySchema, errors=[Unavailable])
async def ready() -> dict[str, Any]:
    """Say whether requests can be served. A cold Redis is ``degraded``: the database answers."""
    status = parts().blocklist.status()
    warm = status.is_warm
    try:
        await parts().database.ping()
    except Unavailable:
        # a warm Redis still answers for access tokens, but nobody can sign in
        raise Unavailable(
            "The database does not answer.",
            database="down",
            redis="ok" if warm else "cold",
            blocklist="ok" if warm else "down",
        ) from None
    return {
        "status": "ok" if warm else "degraded",
        "database": "ok",
        "redis": "ok" if warm else "cold",
        "blocklist": "ok",
        "reason": status.reason,
        "last_reconcile": status.last_reconcile,
        "lag_seconds": None if status.lag_seconds is None else round(status.lag_seconds, 2),
    }


@shapes.conditional
@shapes.answers(JwksSchema, media_type=JWKS_TYPE)
async def jwks() -> Response:
    """Return the public keys that verify tokens (RFC 7517); 304 to who has them already."""
    response = json_response(parts().keys.jwks())
    response.mimetype = JWKS_TYPE
    response.headers["Cache-Control"] = f"public, max-age={JWKS_SECONDS}"
    response.add_etag()
    return _on_condition(response)


@shapes.refuses(NotFound)
def numbers() -> Response:
    """Tell Prometheus the numbers of all workers, unless they have an address of their own."""
    if parts().settings.metrics_bind is not None:
        raise NotFound("The numbers are served on ROLECALL_METRICS_BIND.")
    return Response(metrics.exposition(), content_type=CONTENT_TYPE_LATEST)


def openapi() -> Response:
    """Return the OpenAPI 3.1 document of this service."""
    # made by whoever asks first, beside the loop: it takes a while
    made = current_app.extensions["rolecall.openapi"]()
    response = Response(made, mimetype="application/json")
    response.headers["Cache-Control"] = "public, max-age=60"
    return response


@shapes.answers(None, 302)
async def home() -> Any:
    """Lead whoever opens the address in a browser to the documentation."""
    return redirect("/docs")


async def docs() -> Response:
    """Show the document with Swagger UI, from this service alone."""
    return _page(DOCS_PAGE, DOCS_CSP)


@shapes.conditional
@shapes.refuses(NotFound)
def docs_file(name: str) -> Response:
    """Serve a file of Swagger UI, from the package that carries them."""
    if name == "start.js":
        names = {
            kind: current_app.config[f"JWT_{kind.upper()}_CSRF_COOKIE_NAME"]
            for kind in (ACCESS, REFRESH)
        }
        response = Response(DOCS_START % json.dumps(names), mimetype="text/javascript")
    else:
        response = send_from_directory(SWAGGER_UI, name, conditional=False)
    response.headers["Cache-Control"] = "public, max-age=3600"
    return _on_condition(response)


@shapes.answers(None, errors=[NotFound])
async def problem(code: str) -> Response:
    """Explain an error: what the ``type`` of a problem document leads to."""
    kind = errors.catalogue().get(code)
    if kind is None:
        raise NotFound("There is no error of that code.")
    return _page(
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(kind.title)}</title>\n"
        f"<h1>{escape(kind.title)}</h1>\n<p><code>{escape(code)}</code>, HTTP {kind.status}</p>\n"
        f"<p>{escape(kind.explanation)}</p></html>\n",
        PAGE_CSP,
    )


def _on_condition(response: Response) -> Response:
    """Heed ``If-Match`` and ``If-None-Match``; ``PreconditionFailed`` (RFC 9110 section 13.2.2)."""
    etag, _ = response.get_etag()
    if request.if_match and (etag or "") not in request.if_match:
        response.close()
        raise PreconditionFailed
    # werkzeug would take * for no match, and answer 412 with the body
    response.make_conditional(request.environ | {"HTTP_IF_MATCH": ""})
    return response


def _page(html: str, policy: str) -> Response:
    response = Response(html, mimetype="text/html")
    response.headers["Content-Security-Policy"] = policy
    response.headers["Cache-Control"] = "public, max-age=3600"
    return response
