"""The tree of errors: each has a stable code, an HTTP status and a public message.

    RolecallError
    ├── Refused             what a client is told; every leaf below is one code of the contract
    │   ├── BadRequest (400) ── MalformedJson
    │   ├── Unauthorized (401) ── MissingToken, BadCredentials, InvalidToken ── …
    │   ├── Forbidden (403) ── InsufficientRole, InsufficientPermission, CsrfFailed, …
    │   ├── NotFound (404) · MethodNotAllowed (405) · RequestTimeout (408)
    │   ├── Conflict (409) ── UsernameTaken, RoleExists, LastAdmin
    │   ├── PreconditionFailed (412)
    │   ├── BodyTooLarge (413) · UnsupportedMediaType (415)
    │   ├── ValidationFailed (422) · WeakPassword (422)
    │   ├── TooManyRequests (429)
    │   ├── OAuthError          what OAuth's endpoints answer, by RFC 6749 and not as a problem
    │   └── InternalError (500) · Unavailable (503)
    └── StartupError        what an operator is told, in one sentence; exit code 1

The cause of a refusal is logged where it is caught and never sent.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RolecallError(Exception):
    """Everything Rolecall raises on purpose."""


class StartupError(RolecallError):
    """The process cannot start; the message is one sentence that says what to do."""


class Refused(RolecallError):
    """A request is answered with a problem document (RFC 9457).

    ``detail`` is public. ``extra`` holds further members of the document.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    explanation: ClassVar[str] = "Something went wrong on our side. The request id finds it."

    def __init__(self, detail: str | None = None, **extra: Any) -> None:
        super().__init__(detail or self.explanation)
        self.detail = detail or self.explanation
        self.extra = extra
        self.headers: dict[str, str] = {}


class BadRequest(Refused):
    code, status, title = "bad_request", 400, "Bad request"
    explanation = "The request cannot be understood."


class MalformedJson(BadRequest):
    code, title = "malformed_json", "Malformed JSON"
    explanation = "The body is not the strict UTF-8 JSON that is asked for (RFC 8259, RFC 7493)."


class Unauthorized(Refused):
    """401 with ``WWW-Authenticate`` (RFC 6750 section 3); ``challenge`` is its error code."""

    status = 401
    challenge: ClassVar[str | None] = None


class MissingToken(Unauthorized):
    code, title = "missing_token", "No token"
    explanation = "This needs a token, and the request carries none."


class BadCredentials(Unauthorized):
    code, title = "bad_credentials", "Bad credentials"
    explanation = "The username or the password is wrong."


class InvalidToken(Unauthorized):
    code, title, challenge = "invalid_token", "Invalid token", "invalid_token"
    explanation = "The token is not one of ours, or has been altered."


class TokenExpired(InvalidToken):
    code, title = "token_expired", "Token expired"
    explanation = "The token has expired. Refresh it, or sign in again."


class TokenRevoked(InvalidToken):
    code, title = "token_revoked", "Token revoked"
    explanation = "The token has been taken back. Sign in again."


class TokenStale(InvalidToken):
    code, title = "token_stale", "Token stale"
    explanation = "What its holder may do has changed since. Refresh it, or ask for another."


class WrongTokenType(InvalidToken):
    code, title = "wrong_token_type", "Wrong type of token"
    explanation = "An access token was given where a refresh token belongs, or the reverse."


class FreshTokenRequired(InvalidToken):
    code, title = "fresh_token_required", "Fresh token required"
    explanation = "This needs a token from a sign-in, not from a refresh. Sign in again."


class RefreshReused(InvalidToken):
    code, title = "refresh_reused", "Refresh token used twice"
    explanation = "A spent refresh token was used again, so its session was ended. Sign in again."


class Forbidden(Refused):
    """403; ``challenge`` is the error code of RFC 6750 section 3.1, where one applies."""

    status = 403
    challenge: ClassVar[str | None] = None


class InsufficientRole(Forbidden):
    code, title, challenge = "insufficient_role", "Insufficient role", "insufficient_scope"
    explanation = "The token does not hold the roles that this asks for."


class InsufficientPermission(Forbidden):
    code, title = "insufficient_permission", "Insufficient permission"
    challenge = "insufficient_scope"
    explanation = "The token does not hold the permissions that this asks for."


class CsrfFailed(Forbidden):
    code, title = "csrf_failed", "CSRF check failed"
    explanation = "X-CSRF-TOKEN must equal the csrf claim of the token in the cookie."


class RegistrationClosed(Forbidden):
    code, title = "registration_closed", "Registration closed"
    explanation = "Accounts are made by an administrator here."


class NotFound(Refused):
    code, status, title = "not_found", 404, "Not found"
    explanation = "There is nothing here by that name."


class MethodNotAllowed(Refused):
    code, status, title = "method_not_allowed", 405, "Method not allowed"
    explanation = "The resource exists and does not take this method; see the Allow header."


class RequestTimeout(Refused):
    code, status, title = "request_timeout", 408, "Request timeout"
    explanation = "The body did not arrive in time."


class Conflict(Refused):
    code, status, title = "conflict", 409, "Conflict"
    explanation = "The request does not go with the state of things."


class UsernameTaken(Conflict):
    code, title = "username_taken", "Username taken"
    explanation = "Another account has this username, in whatever case, or one that looks like it."


class RoleExists(Conflict):
    code, title = "role_exists", "Role exists"
    explanation = "There is a role of this name already."


class LastAdmin(Conflict):
    code, title = "last_admin", "Last administrator"
    explanation = "The last active administrator cannot be removed, disabled or demoted."


class PreconditionFailed(Refused):
    code, status, title = "precondition_failed", 412, "Precondition failed"
    explanation = "It was changed since the ETag in If-Match was read. Read it again."


class BodyTooLarge(Refused):
    code, status, title = "body_too_large", 413, "Body too large"
    explanation = "The body is larger than this service reads."


class UnsupportedMediaType(Refused):
    code, status, title = "unsupported_media_type", 415, "Unsupported media type"
    explanation = "Send the body as application/json."


class ValidationFailed(Refused):
    """422; ``errors`` is a list of ``{"field": "a.b", "message": "…"}``."""

    code, status, title = "validation_failed", 422, "Validation failed"
    explanation = "Some fields are not as they must be; see errors."


class WeakPassword(ValidationFailed):
    """422; ``reasons`` says in words why the password was refused."""

    code, title = "weak_password", "Weak password"
    explanation = "The password is too easy to guess; see reasons."


class TooManyRequests(Refused):
    """429; ``retry_after`` is whole seconds, at least 1."""

    code, status, title = "too_many_requests", 429, "Too many requests"
    explanation = "Too many attempts or changes were made. Wait for as long as Retry-After says."

    def __init__(self, retry_after: float = 0) -> None:
        super().__init__()
        self.headers["Retry-After"] = str(max(1, round(retry_after + 0.5)))


class InternalError(Refused):
    code, status, title = "internal_error", 500, "Internal error"


class Unavailable(Refused):
    """503; whatever it needs (database, hashing capacity) cannot be had just now."""

    code, status, title = "unavailable", 503, "Unavailable"
    explanation = "Something this needs is not to be had just now. Nothing was changed."

    def __init__(self, detail: str | None = None, retry_after: int = 1, **extra: Any) -> None:
        super().__init__(detail, **extra)
        self.headers["Retry-After"] = str(max(1, retry_after))


class OAuthError(Refused):
    """The answer of RFC 6749 section 5.2: ``error`` and ``error_description``, in plain JSON."""

    status = 400
    error: ClassVar[str] = "invalid_request"


class InvalidRequest(OAuthError):
    explanation = "The request lacks a parameter, or has one that it must not have."


class InvalidClient(OAuthError):
    status, error = 401, "invalid_client"
    explanation = "The client is unknown, or did not prove who it is."


class InvalidGrant(OAuthError):
    error = "invalid_grant"
    explanation = "The refresh token is invalid, spent, taken back or another client's."


class UnauthorizedClient(OAuthError):
    error = "unauthorized_client"
    explanation = "The client may not use this grant."


class UnsupportedGrantType(OAuthError):
    error = "unsupported_grant_type"
    explanation = "Tokens are given for client_credentials and refresh_token."


class InvalidScope(OAuthError):
    error = "invalid_scope"
    explanation = "The scope is malformed, or more than there is to give."


def catalogue() -> dict[str, type[Refused]]:
    """Return every public error by its code, in the order of the tree above."""
    found: dict[str, type[Refused]] = {}

    def visit(node: type[Refused]) -> None:
        if "code" in vars(node) and node is not Refused:
            found[node.code] = node
        for child in node.__subclasses__():
            if child.__module__ == __name__:
                visit(child)

    visit(Refused)
    return found
