"""The OpenAPI 3.1 document, made from the routes, their schemas, their guards and the errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any, Protocol

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from flask import Flask

from api import errors
from api.auth.claims import ACCESS, REFRESH
from api.auth.guards import Guard, guard_of
from api.errors import OAuthError, Refused
from api.forms import FORM
from api.json import encoded
from api.shapes import Shapes, shapes_of
from schemas.oauth import OAuthErrorSchema
from schemas.service import ProblemSchema, ValidationProblemSchema

EXTENSION = "rolecall.openapi"
# 405 is no answer of an operation: there is none where a method is not listed.
DESCRIPTION = (
    "A self-hosted auth API: role claims in tokens that can be taken back.\n\n"
    "A method that a path is not listed with is answered `405 method_not_allowed` with `Allow`, "
    "a path that is not listed `404 not_found`, both as problem documents."
)
PROBLEM = "application/problem+json"
CLIENT, CLIENTS_TOKEN = "client_secret_basic", "client_credentials"
PATH_PARAMETER = re.compile(r"<(?:(\w+):)?(\w+)>")
ALWAYS: tuple[type[Refused], ...] = (errors.BadRequest, errors.InternalError, errors.Unavailable)
TOKEN_ERRORS: tuple[type[Refused], ...] = (
    errors.MissingToken,
    errors.InvalidToken,
    errors.TokenExpired,
    errors.TokenRevoked,
    errors.TokenStale,
    errors.WrongTokenType,
)
FORM_ERRORS: tuple[type[Refused], ...] = (errors.RequestTimeout, errors.BodyTooLarge)
BODY_ERRORS: tuple[type[Refused], ...] = (
    *FORM_ERRORS,
    errors.MalformedJson,
    errors.UnsupportedMediaType,
    errors.ValidationFailed,
)


class Line(Protocol):
    """A line of the table of routes."""

    @property
    def method(self) -> str:
        """GET, POST, …"""

    @property
    def path(self) -> str:
        """With Flask's converters."""

    @property
    def endpoint(self) -> str:
        """The name under which Flask knows the view."""


def text(app: Flask, table: Iterable[Line]) -> bytes:
    """Return the document as it is sent: one for all who ask at once, who may be thousands."""
    return encoded(document(app, table))


def document(app: Flask, table: Iterable[Line]) -> dict[str, Any]:
    """Return the document as JSON-ready members."""
    plugin = MarshmallowPlugin(schema_name_resolver=_name)
    spec = APISpec(
        title="Rolecall",
        version=version("rolecall"),
        openapi_version="3.1.0",
        info={
            "description": DESCRIPTION,
            "license": {"name": "See the repository"},
        },
        plugins=[plugin],
        tags=[{"name": name} for name in _tags(table)],
        servers=[{"url": "/"}],
    )
    for name, scheme in _security_schemes(app).items():
        spec.components.security_scheme(name, scheme)
    asked = {p for view in app.view_functions.values() for p in _permissions(guard_of(view))}
    scopes = {permission: f"What asks for {permission}." for permission in sorted(asked)}
    flow = {"tokenUrl": "/oauth/token", "scopes": scopes}
    spec.components.security_scheme(
        CLIENTS_TOKEN, {"type": "oauth2", "flows": {"clientCredentials": flow}}
    )
    for line in table:
        view = app.view_functions[line.endpoint]
        spec.path(
            path=PATH_PARAMETER.sub(r"{\2}", line.path),
            operations={line.method.lower(): _operation(app, line, view)},
        )
    found: dict[str, Any] = spec.to_dict()
    return found


def _operation(app: Flask, line: Line, view: Any) -> dict[str, Any]:
    guard, shapes = guard_of(view), shapes_of(view)
    summary, _, rest = (view.__doc__ or "").strip().partition("\n")
    operation: dict[str, Any] = {
        "operationId": line.endpoint.replace(".", "_"),
        "tags": [line.endpoint.partition(".")[0]],
        "summary": summary,
        "description": " ".join(rest.split()),
        "parameters": list(_path_parameters(line.path)),
        "responses": _responses(line, guard, shapes),
        "security": _security(app, guard, line.method),
    }
    if shapes.query is not None:
        operation["parameters"].append({"in": "query", "schema": shapes.query})
    if shapes.body is not None:
        content = {"application/json": {"schema": shapes.body}}
        operation["requestBody"] = {"required": True, "content": content}
    if shapes.form is not None:
        operation["requestBody"] = {"required": True, "content": {FORM: {"schema": shapes.form}}}
    if guard is not None and not guard.public:
        operation["x-guard"] = _asked(guard)
    return operation


def _responses(line: Line, guard: Guard | None, shapes: Shapes) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done."}
    if shapes.answer is not None:
        answer["content"] = {shapes.media_type: {"schema": shapes.answer}}
    responses: dict[str, Any] = {str(shapes.status): answer}
    if shapes.conditional:
        responses["304"] = {"description": "Whoever asks has it already, by its ETag."}
    by_status: dict[int, list[type[Refused]]] = {}
    for error in dict.fromkeys(_errors(line, guard, shapes)):
        by_status.setdefault(error.status, []).append(error)
    for status, found in sorted(by_status.items()):
        content: dict[str, Any] = {}
        names = []
        for error in found:
            if issubclass(error, OAuthError):
                names.append(error.error)
                content["application/json"] = {"schema": OAuthErrorSchema}
            else:
                names.append(error.code)
                schema = ValidationProblemSchema if status == 422 else ProblemSchema
                content[PROBLEM] = {"schema": schema}
        listed = ", ".join(f"`{name}`" for name in names)
        responses[str(status)] = {"description": f"One of: {listed}", "content": content}
    return responses


def _errors(line: Line, guard: Guard | None, shapes: Shapes) -> Iterator[type[Refused]]:
    yield from ALWAYS
    yield from shapes.errors
    if PATH_PARAMETER.search(line.path):
        yield errors.NotFound
    if shapes.conditional:
        yield errors.PreconditionFailed
    if shapes.form is not None:
        yield from FORM_ERRORS
    elif line.method != "GET":
        yield from BODY_ERRORS
    if shapes.query is not None:
        yield errors.ValidationFailed
    if guard is None or guard.public or guard.client:
        return
    yield from TOKEN_ERRORS
    yield errors.CsrfFailed
    if guard.fresh:
        yield errors.FreshTokenRequired
    if guard.all_roles or guard.any_roles:
        yield errors.InsufficientRole
    if guard.all_permissions or guard.any_permissions or guard.users_only:
        yield errors.InsufficientPermission


def _permissions(guard: Guard | None) -> tuple[str, ...]:
    return (*guard.all_permissions, *guard.any_permissions) if guard else ()


def _asked(guard: Guard) -> dict[str, Any]:
    asked = {
        "token": [] if guard.client else list(guard.kinds),
        "client": guard.client,
        "users_only": guard.users_only,
        "scope_required": list(guard.scope),
        "fresh": guard.fresh,
        "roles_required": list(guard.all_roles),
        "roles_accepted": list(guard.any_roles),
        "permissions_required": list(guard.all_permissions),
        "permissions_accepted": list(guard.any_permissions),
    }
    return {name: value for name, value in asked.items() if value}


def _security_schemes(app: Flask) -> dict[str, dict[str, Any]]:
    schemes: dict[str, dict[str, Any]] = {CLIENT: {"type": "http", "scheme": "basic"}}
    for kind in (ACCESS, REFRESH):
        for location in app.config["JWT_TOKEN_LOCATION"]:
            if location == "headers":
                scheme = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            elif location == "cookies":
                name = app.config[f"JWT_{kind.upper()}_COOKIE_NAME"]
                scheme = {"type": "apiKey", "in": "cookie", "name": name}
                if app.config["JWT_COOKIE_CSRF_PROTECT"]:
                    schemes[f"{kind}_csrf"] = _csrf_scheme(app, kind)
            elif location == "query_string":
                name = app.config["JWT_QUERY_STRING_NAME"]
                scheme = {"type": "apiKey", "in": "query", "name": name}
            else:
                continue
            schemes[f"{kind}_{location}"] = scheme
    return schemes


def _csrf_scheme(app: Flask, kind: str) -> dict[str, str]:
    cookie = app.config[f"JWT_{kind.upper()}_CSRF_COOKIE_NAME"]
    return {
        "type": "apiKey",
        "in": "header",
        "name": app.config["JWT_ACCESS_CSRF_HEADER_NAME"],
        "description": f"The value of the cookie {cookie}, wherever something is changed.",
    }


def _security(app: Flask, guard: Guard | None, method: str) -> list[dict[str, list[str]]]:
    if guard is None or guard.public:
        return []
    if guard.client:
        # or in the form, for which OpenAPI has no scheme
        return [{CLIENT: []}, {}]
    names = guard.locations or app.config["JWT_TOKEN_LOCATION"]
    # OpenAPI has no scheme for a member of a JSON body
    found: list[dict[str, list[str]]] = [
        {f"{kind}_{location}": []} | _csrf(app, kind, location, method)
        for kind in guard.kinds
        for location in names
        if location != "json"
    ]
    if ACCESS in guard.kinds and "headers" in names and not guard.users_only:
        found.append({CLIENTS_TOKEN: list(guard.all_permissions)})
    return [*found, {}] if guard.optional else found


def _csrf(app: Flask, kind: str, location: str, method: str) -> dict[str, list[str]]:
    config = app.config
    asked = config["JWT_COOKIE_CSRF_PROTECT"] and method in config["JWT_CSRF_METHODS"]
    return {f"{kind}_csrf": []} if asked and location == "cookies" else {}


def _tags(table: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(line.endpoint.partition(".")[0] for line in table))


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for converter, name in PATH_PARAMETER.findall(path):
        schema = {"type": "string"} | ({"format": "uuid"} if converter == "uuid" else {})
        yield {"in": "path", "name": name, "required": True, "schema": schema}


def _name(schema: Any) -> str:
    kind = schema if isinstance(schema, type) else type(schema)
    return kind.__name__.removesuffix("Schema")
