"""Roles and what they permit."""

from __future__ import annotations

from typing import Any

from api import shapes
from api.errors import Conflict, InsufficientPermission, LastAdmin, NotFound, RoleExists
from api.http import origin
from api.parts import parts
from api.services.roles import RoleView
from schemas.roles import (
    RoleChangeSchema,
    RoleCreateSchema,
    RoleDeleteQuerySchema,
    RoleListSchema,
    RoleSchema,
)
from schemas.users import PageQuerySchema


@shapes.query(PageQuerySchema)
@shapes.answers(RoleListSchema)
async def index(query: dict[str, Any]) -> Any:
    """List the roles by name."""
    return await parts().roles.page(query["limit"], query["cursor"])


@shapes.answers(RoleSchema, errors=[NotFound])
async def show(name: str) -> Any:
    """Return one role."""
    return await parts().roles.get(name)


@shapes.body(RoleCreateSchema)
@shapes.answers(RoleSchema, 201, errors=[RoleExists, InsufficientPermission])
async def create(body: dict[str, Any]) -> Any:
    """Make a role of permissions and roles that one holds oneself."""
    wanted = RoleView(
        body["name"], body["description"], tuple(body["permissions"]), tuple(body["includes"])
    )
    return await parts().roles.create(wanted, origin())


@shapes.body(RoleChangeSchema)
@shapes.answers(RoleSchema, errors=[NotFound, Conflict, LastAdmin, InsufficientPermission])
async def change(body: dict[str, Any], name: str) -> Any:
    """Change a role; it bites on the next request of whoever holds it."""
    return await parts().roles.change(name, body, origin())


@shapes.query(RoleDeleteQuerySchema)
@shapes.answers(None, 204, errors=[NotFound, Conflict, LastAdmin, InsufficientPermission])
async def delete(query: dict[str, Any], name: str) -> None:
    """Delete a role; while users have it, ``reassign_to`` names what they get instead."""
    await parts().roles.delete(name, query["reassign_to"], origin())
