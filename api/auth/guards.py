"""Guards: who may call a view.

``jwt_required`` has flask-jwt-extended's name and signature; it verifies with it, then awaits the
blocklist, then awaits the view. The others are layered on it and take the same keywords. Every
guard leaves its ``Guard`` on the view, where the OpenAPI document and a test find it.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import anyio.to_thread
from flask import Flask, Request
from flask_jwt_extended.view_decorators import _load_user

from api.asgi import request_context, request_globals
from api.auth import transport
from api.auth.claims import ACCESS, REFRESH, is_clients, permitted
from api.auth.tokens import RolecallJWTManager, UnknownKey, check_csrf
from api.auth.transport import Credential, Places, credentials, csrf_header
from api.blocklist import Blocklist, Verdict
from api.errors import (
    BadRequest,
    CsrfFailed,
    FreshTokenRequired,
    InsufficientPermission,
    InsufficientRole,
    MissingToken,
    Refused,
    TokenRevoked,
    TokenStale,
    WrongTokenType,
)

View = TypeVar("View", bound=Callable[..., Any])
Async = Callable[..., Awaitable[Any]]
MARK = "__rolecall_guard__"


@dataclass(frozen=True, slots=True)
class Guard:
    """What a view asks for. ``kinds`` are the token types that would do."""

    public: bool = False
    optional: bool = False
    fresh: bool = False
    kinds: tuple[str, ...] = (ACCESS,)
    locations: tuple[str, ...] | None = None
    skip_revocation_check: bool = False
    for_logout: bool = False
    all_roles: tuple[str, ...] = ()
    any_roles: tuple[str, ...] = ()
    all_permissions: tuple[str, ...] = ()
    any_permissions: tuple[str, ...] = ()
    users_only: bool = False
    # what the scope must name where a token is narrowed by one; else a user may without it
    scope: tuple[str, ...] = ()
    # a client app itself, and not a token: with its secret, or (public) by its id
    client: Literal["confidential", "any"] | None = None


def guard_of(view: Callable[..., Any]) -> Guard | None:
    """Return the guard of a view, None where it has neither a guard nor ``@public``."""
    found: Guard | None = getattr(view, MARK, None)
    return found


def public(view: View) -> View:
    """Declare that a view needs no token."""
    setattr(view, MARK, Guard(public=True))
    return view


def jwt_required(
    optional: bool = False,
    fresh: bool = False,
    refresh: bool = False,
    locations: str | Sequence[str] | None = None,
    verify_type: bool = True,
    skip_revocation_check: bool = False,
    for_logout: bool = False,
) -> Callable[[Callable[..., Any]], Async]:
    """Ask for a token; the keywords are those of ``flask_jwt_extended.jwt_required``.

    ``for_logout``, which is ours, lets a stale token in, and refuses a revoked one only once every
    worker refuses it.
    The view's errors are ``MissingToken``, ``InvalidToken`` and its kin (401), ``CsrfFailed``.
    """
    kinds = (REFRESH,) if refresh else (ACCESS,)
    return _guarded(
        Guard(
            optional=optional,
            fresh=fresh,
            kinds=kinds if verify_type else (ACCESS, REFRESH),
            locations=(locations,) if isinstance(locations, str) else _frozen(locations),
            skip_revocation_check=skip_revocation_check,
            for_logout=for_logout,
        )
    )


def user_required(
    *, scope: str | None = None, **keywords: Any
) -> Callable[[Callable[..., Any]], Async]:
    """Ask for a token that speaks of a user and not of a client app, else 403.

    ``scope`` is a permission that every user holds for their own account. Only a token that is
    narrowed by a scope must name it, else 403 ``insufficient_permission``.
    """
    return _layered(keywords, users_only=True, scope=(scope,) if scope else ())


def roles_required(*roles: str, **keywords: Any) -> Callable[[Callable[..., Any]], Async]:
    """Ask for every one of ``roles``, else 403 ``insufficient_role``."""
    return _layered(keywords, all_roles=_some(roles))


def roles_accepted(*roles: str, **keywords: Any) -> Callable[[Callable[..., Any]], Async]:
    """Ask for at least one of ``roles``, else 403 ``insufficient_role``."""
    return _layered(keywords, any_roles=_some(roles))


def permissions_required(
    *permissions: str, **keywords: Any
) -> Callable[[Callable[..., Any]], Async]:
    """Ask for every one of ``permissions``, else 403 ``insufficient_permission``."""
    return _layered(keywords, all_permissions=_some(permissions))


def permissions_accepted(
    *permissions: str, **keywords: Any
) -> Callable[[Callable[..., Any]], Async]:
    """Ask for at least one of ``permissions``, else 403 ``insufficient_permission``."""
    return _layered(keywords, any_permissions=_some(permissions))


async def verify(guard: Guard) -> None:
    """Do what a guard does, inside a view: raise, or let the request through.

    Afterwards ``flask_jwt_extended.get_jwt`` and its kin answer.
    """
    context = request_globals()
    try:
        header, claims, location = await _authenticate(guard)
    except MissingToken:
        if not guard.optional:
            raise
        context._jwt_extended_jwt = context._jwt_extended_jwt_header = {}
        context._jwt_extended_jwt_user = {"loaded_user": None}
        context._jwt_extended_jwt_location = None
        return
    context._jwt_extended_jwt_user = _load_user(header, claims)
    context._jwt_extended_jwt = claims
    context._jwt_extended_jwt_header = header
    context._jwt_extended_jwt_location = location
    # last, so that who was refused is known to whoever notes it
    _authorize(guard, claims)


async def _authenticate(guard: Guard) -> tuple[dict[str, Any], dict[str, Any], str]:
    context = request_context()
    app, req = context.app, context.request
    manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]
    places = transport.places(app)
    found = list(credentials(req, places, guard.locations or places.locations, guard.kinds))
    if not found:
        raise MissingToken
    header, claims, chosen = await _first_genuine(manager, req, found)
    if chosen.location == "headers" and "cookies" in places.locations:
        await _refuse_two_users(manager, req, places, claims)
    if claims["type"] not in guard.kinds:
        raise WrongTokenType
    if guard.fresh and not _is_fresh(claims["fresh"]):
        raise FreshTokenRequired
    if not guard.skip_revocation_check:
        blocklist = app.extensions["rolecall"].blocklist
        await ensure_not_revoked(blocklist, claims, for_logout=guard.for_logout)
    manager.refuse_by_callback(header, claims)
    return header, claims, chosen.location


async def _first_genuine(
    manager: RolecallJWTManager, req: Request, found: list[Credential]
) -> tuple[dict[str, Any], dict[str, Any], Credential]:
    """Return the first token that verifies.

    Only one location decides: the other cookie is looked at where the first is no good (an
    expired access token keeps nobody from logging out), never another location. Where a good
    token lacks its CSRF header, that is the refusal: the session of such a token lives.
    """
    first: Refused | None = None
    for credential in (c for c in found if c.location == found[0].location):
        try:
            header, claims = await _read(manager, credential.token)
            if credential.needs_csrf:
                check_csrf(claims, csrf_header(req))
        except Refused as refusal:
            if first is None or isinstance(refusal, CsrfFailed):
                first = refusal
            continue
        return header, claims, credential
    raise first or MissingToken


async def _read(manager: RolecallJWTManager, token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return await _with_all_keys(manager, manager.read, token)


async def read_foreign(app: Flask, token: str) -> dict[str, Any]:
    """Return the claims of any genuine token of ours, whomever it is meant for.

    Raises ``InvalidToken`` or ``TokenExpired``. Whether it was taken back is another question.
    """
    manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]
    _, claims = await _with_all_keys(manager, manager.read_foreign, token)
    return claims


async def _with_all_keys(
    manager: RolecallJWTManager, read: Callable[[str], tuple[Any, Any]], token: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return read(token)
    except UnknownKey:
        if not await manager.keys.reload():
            raise
    return read(token)


async def _refuse_two_users(
    manager: RolecallJWTManager, req: Request, places: Places, claims: dict[str, Any]
) -> None:
    """Beside a token in a header, no cookie may speak of another user."""
    for other in credentials(req, places, ("cookies",), (ACCESS, REFRESH)):
        try:
            _, others = await _read(manager, other.token)
        except Refused:
            continue
        if others["sub"] != claims["sub"]:
            raise BadRequest("The header's token and the cookie's speak of two users.")


async def ensure_not_revoked(
    blocklist: Blocklist, claims: dict[str, Any], *, for_logout: bool = False
) -> None:
    """Ask the blocklist. Raises ``TokenRevoked``, ``TokenStale`` or ``Unavailable``."""
    verdict = await blocklist.check(claims)
    if verdict is Verdict.REVOKED:
        if for_logout:
            # whoever revoked it may have been told to repeat the request
            await blocklist.confirm_revoked(claims)
        raise TokenRevoked
    if verdict is Verdict.STALE and not for_logout:
        raise TokenStale


def _authorize(guard: Guard, claims: dict[str, Any]) -> None:
    if guard.users_only and is_clients(claims):
        raise InsufficientPermission("This is for users, and the token speaks of a client app.")
    roles = claims.get("roles", ())
    if not all(role in roles for role in guard.all_roles):
        raise InsufficientRole
    if guard.any_roles and not any(role in roles for role in guard.any_roles):
        raise InsufficientRole
    held = claims.get("permissions", ())
    if "scope" in claims and (lacking := [p for p in guard.scope if not permitted(held, p)]):
        raise InsufficientPermission(f"The token's scope does not name {' '.join(lacking)}.")
    if not all(permitted(held, needed) for needed in guard.all_permissions):
        raise InsufficientPermission
    if guard.any_permissions and not any(permitted(held, p) for p in guard.any_permissions):
        raise InsufficientPermission


def _is_fresh(fresh: bool | int) -> bool:
    # a number is the moment until which the token counts as fresh
    if isinstance(fresh, bool):
        return fresh
    return fresh > time.time()


def _guarded(guard: Guard) -> Callable[[Callable[..., Any]], Async]:
    def decorate(view: Callable[..., Any]) -> Async:
        is_async = inspect.iscoroutinefunction(view)

        @functools.wraps(view)
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            await verify(guard)
            if is_async:
                return await view(*args, **kwargs)
            # a plain view may block: it gets a thread, with this request's context
            answer = await anyio.to_thread.run_sync(functools.partial(view, *args, **kwargs))
            return await answer if inspect.isawaitable(answer) else answer

        setattr(guarded, MARK, guard)
        return guarded

    return decorate


def _layered(keywords: dict[str, Any], **asked: Any) -> Callable[[Callable[..., Any]], Async]:
    base = guard_of(jwt_required(**keywords)(_nothing))
    if base is None or base.optional:
        raise TypeError("a guard that asks for roles or permissions cannot be optional")
    return _guarded(replace(base, **asked))


async def _nothing() -> None: ...


def _some(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    if not names or not all(isinstance(name, str) and name for name in names):
        # @roles_required without parentheses would guard nothing
        raise TypeError("name at least one role or permission, as text")
    return names


def _frozen(locations: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(locations) if locations else None
