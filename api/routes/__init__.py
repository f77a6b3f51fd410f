"""The table of all routes: every URL, its guard and its view, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flask import Flask

from api import shapes
from api.auth.client_guard import client_required
from api.auth.guards import jwt_required, permissions_required, public, user_required
from api.routes import (
    admin_audit,
    admin_clients,
    admin_roles,
    admin_sessions,
    admin_users,
    me,
    oauth,
    service,
    signing_in,
)


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table; ``guard`` decorates ``view`` when it is installed."""

    method: str
    path: str
    guard: Callable[[Any], Any]
    view: Callable[..., Any]

    @property
    def endpoint(self) -> str:
        """``module.view``, by which ``url_for`` finds it."""
        return f"{self.view.__module__.rpartition('.')[2]}.{self.view.__name__}"


may = permissions_required
signed_in = jwt_required()
ends_session = jwt_required(verify_type=False, for_logout=True)
# a token that is narrowed by a scope must name what it may do with its user's own account
reads_own_account = user_required(scope="me:read")
changes_own_account = user_required(scope="me:write")
ends_all_sessions = user_required(scope="me:write", verify_type=False, for_logout=True)
refresh_token = jwt_required(refresh=True)
any_client = client_required(public=True)
confidential_client = client_required()

# fmt: off
TABLE = (
    Route("POST",   "/login",                          public,        signing_in.login),
    Route("GET",    "/protected",                      signed_in,     signing_in.protected),
    Route("POST",   "/refresh",                        refresh_token, signing_in.refresh),
    Route("POST",   "/logout",                         ends_session,  signing_in.logout),
    Route("POST",   "/logout/all",                     ends_all_sessions, signing_in.logout_all),
    Route("POST",   "/register",                       public,        signing_in.register),

    Route("GET",    "/me",                             reads_own_account,   me.show),
    Route("PATCH",  "/me",                             changes_own_account, me.change),
    Route("POST",   "/me/password",                    changes_own_account, me.change_password),
    Route("GET",    "/me/sessions",                    reads_own_account,   me.sessions),
    Route("DELETE", "/me/sessions/<uuid:session_id>",  changes_own_account, me.end_session),

    Route("GET",    "/admin/users",                            may("users:read"),      admin_users.index),
    Route("POST",   "/admin/users",                            may("users:write"),     admin_users.create),
    Route("GET",    "/admin/users/<uuid:user_id>",             may("users:read"),      admin_users.show),
    Route("PATCH",  "/admin/users/<uuid:user_id>",             may("users:write"),     admin_users.change),
    Route("DELETE", "/admin/users/<uuid:user_id>",             may("users:write"),     admin_users.delete),
    Route("PUT",    "/admin/users/<uuid:user_id>/roles",       may("roles:assign"),    admin_users.set_roles),
    Route("GET",    "/admin/users/<uuid:user_id>/access",      may("users:read"),      admin_users.access),
    Route("GET",    "/admin/users/<uuid:user_id>/sessions",    may("sessions:read"),   admin_users.sessions),
    Route("POST",   "/admin/users/<uuid:user_id>/logout",      may("sessions:revoke"), admin_users.logout),
    Route("GET",    "/admin/sessions",                         may("sessions:read"),   admin_sessions.index),
    Route("DELETE", "/admin/sessions/<uuid:session_id>",       may("sessions:revoke"), admin_sessions.end),
    Route("POST",   "/admin/tokens/revoke",                    may("sessions:revoke"), admin_sessions.revoke_token),
    Route("GET",    "/admin/roles",                            may("roles:read"),      admin_roles.index),
    Route("POST",   "/admin/roles",                            may("roles:write"),     admin_roles.create),
    Route("GET",    "/admin/roles/<name>",                     may("roles:read"),      admin_roles.show),
    Route("PATCH",  "/admin/roles/<name>",                     may("roles:write"),     admin_roles.change),
    Route("DELETE", "/admin/roles/<name>",                     may("roles:write"),     admin_roles.delete),
    Route("GET",    "/admin/audit",                            may("audit:read"),      admin_audit.index),
    Route("GET",    "/admin/stats",                            may("stats:read"),      admin_audit.stats),

    Route("GET",    "/admin/clients",                          may("clients:read"),    admin_clients.index),
    Route("POST",   "/admin/clients",                          may("clients:write"),   admin_clients.create),
    Route("GET",    "/admin/clients/<uuid:client_id>",         may("clients:read"),    admin_clients.show),
    Route("PATCH",  "/admin/clients/<uuid:client_id>",         may("clients:write"),   admin_clients.change),
    Route("DELETE", "/admin/clients/<uuid:client_id>",         may("clients:write"),   admin_clients.delete),
    Route("POST",   "/admin/clients/<uuid:client_id>/secret",  may("clients:write"),   admin_clients.replace_secret),

    Route("POST",   "/oauth/token",                    any_client,          oauth.token),
    Route("POST",   "/oauth/introspect",               confidential_client, oauth.introspect),
    Route("POST",   "/oauth/revoke",                   any_client,          oauth.revoke),
    Route("GET",    "/.well-known/oauth-authorization-server", public,      oauth.metadata),

    Route("GET",    "/.well-known/jwks.json",          public,        service.jwks),
    Route("GET",    "/health/live",                    public,        service.live),
    Route("GET",    "/health/ready",                   public,        service.ready),
    Route("GET",    "/metrics",                        public,        service.numbers),
    Route("GET",    "/openapi.json",                   public,        service.openapi),
    Route("GET",    "/docs",                           public,        service.docs),
    Route("GET",    "/docs/<path:name>",               public,        service.docs_file),
    Route("GET",    "/problems/<code>",                public,        service.problem),
    Route("GET",    "/",                               public,        service.home),
)
# fmt: on


def install(app: Flask) -> None:
    """Add every route, behind its guard."""
    for route in TABLE:
        found = shapes.shapes_of(route.view)
        takes_body = route.method == "GET" or found.body is not None or found.form is not None
        app.add_url_rule(
            route.path,
            endpoint=route.endpoint,
            view_func=route.guard(route.view if takes_body else shapes.no_body(route.view)),
            methods=[route.method],
        )
    app.after_request(signing_in.clear_cookies_after_logout)
    app.after_request(admin_audit.note_refusals)
