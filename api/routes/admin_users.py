"""Users, as operators keep them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import Response, request, url_for

from api import shapes
from api.errors import (
    InsufficientPermission,
    LastAdmin,
    NotFound,
    PreconditionFailed,
    UsernameTaken,
    WeakPassword,
)
from api.http import origin
from api.json import json_response
from api.parts import parts
from api.services.sessions import SessionFilter
from api.services.users import UserFilter, UserView
from schemas.auth import LogoutAllAnswerSchema
from schemas.users import (
    AccessQuerySchema,
    AccessSchema,
    AnySessionListSchema,
    PageQuerySchema,
    UserChangeSchema,
    UserCreateSchema,
    UserListSchema,
    UserQuerySchema,
    UserRolesSchema,
    UserSchema,
)

USER = UserSchema()
CHANGE = [NotFound, PreconditionFailed, LastAdmin, InsufficientPermission]


@shapes.query(UserQuerySchema)
@shapes.answers(UserListSchema)
async def index(query: dict[str, Any]) -> Any:
    """List users; ``sort`` takes ``-`` for descending."""
    limit, cursor = query.pop("limit"), query.pop("cursor")
    return await parts().users.page(UserFilter(**query), limit, cursor)


@shapes.answers(UserSchema, errors=[NotFound])
async def show(user_id: UUID) -> Any:
    """Return one user. Its ETag may go into ``If-Match`` of a change."""
    return _tagged(await parts().users.get(user_id))


@shapes.body(UserCreateSchema)
@shapes.answers(UserSchema, 201, errors=[UsernameTaken, WeakPassword, InsufficientPermission])
async def create(body: dict[str, Any]) -> Any:
    """Make a user, with roles that one holds oneself."""
    user = await parts().users.create(
        body["username"], body["password"], body["email"], body["roles"], origin(),
        is_active=body["is_active"], may_be_reserved=True,
    )  # fmt: skip
    response = _tagged(user, 201)
    response.headers["Location"] = url_for("admin_users.show", user_id=user.id)
    return response


@shapes.body(UserChangeSchema)
@shapes.answers(UserSchema, errors=[*CHANGE, WeakPassword])
async def change(body: dict[str, Any], user_id: UUID) -> Any:
    """Change a user. Disabling ends their sessions, and so does setting a password."""
    return _tagged(await parts().users.change(user_id, body, origin(), _match()))


@shapes.answers(None, 204, errors=CHANGE)
async def delete(user_id: UUID) -> None:
    """Delete a user and end their sessions."""
    await parts().users.delete(user_id, origin(), _match())


@shapes.body(UserRolesSchema)
@shapes.answers(UserSchema, errors=CHANGE)
async def set_roles(body: dict[str, Any], user_id: UUID) -> Any:
    """Give a user exactly these roles; it bites on their next request."""
    return _tagged(await parts().users.set_roles(user_id, body["roles"], origin(), _match()))


@shapes.query(PageQuerySchema)
@shapes.answers(AnySessionListSchema, errors=[NotFound])
async def sessions(query: dict[str, Any], user_id: UUID) -> Any:
    """List the live sessions of a user, the newest first."""
    await parts().users.get(user_id)
    which = SessionFilter(user_id=user_id)
    return await parts().sessions.page(which, query["limit"], query["cursor"])


@shapes.answers(LogoutAllAnswerSchema, errors=[NotFound])
async def logout(user_id: UUID) -> dict[str, Any]:
    """End every session of a user."""
    ended = await parts().sessions.end_all_of(user_id, origin())
    return {"logout": True, "sessions": ended}


@shapes.query(AccessQuerySchema)
@shapes.answers(AccessSchema, errors=[NotFound])
async def access(query: dict[str, Any], user_id: UUID) -> dict[str, Any]:
    """Explain whether a user holds a permission: by which roles, or why not."""
    wanted = query["permission"]
    user = await parts().users.get(user_id)
    found = await parts().users.grant_paths(user_id, wanted)
    return {
        "permission": wanted,
        "granted": bool(found.paths) and user.is_active,
        "ways": found.paths,
        "more": found.more,
        "reason": _reason(user, wanted, [path.roles for path in found.paths]),
    }


def _reason(user: UserView, wanted: str, paths: list[tuple[str, ...]]) -> str:
    if not user.is_active:
        return "The user is disabled."
    if paths:
        return f"Granted by {' which includes '.join(paths[0])}."
    if not user.roles:
        return "The user has no role."
    return f"None of the user's roles ({', '.join(user.roles)}) holds {wanted} or a wildcard of it."


def _tagged(user: UserView, status: int = 200) -> Response:
    response = json_response(USER.dump(user))
    response.status_code = status
    response.set_etag(user.etag)
    return response


def _match() -> frozenset[str] | None:
    """Return the strong etags of ``If-Match``, None without it (RFC 9110 section 13.1.1)."""
    if "If-Match" not in request.headers or request.if_match.star_tag:
        return None
    return frozenset(request.if_match.as_set())
