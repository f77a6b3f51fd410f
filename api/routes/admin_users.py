"""Users, as operators see them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from api import shapes
from api.errors import NotFound
from api.parts import parts
from api.services.accounts import UserFilter
from schemas.users import UserListSchema, UserQuerySchema, UserSchema


@shapes.query(UserQuerySchema)
@shapes.answers(UserListSchema)
async def index(query: dict[str, Any]) -> Any:
    """List users; ``sort`` takes ``-`` for descending."""
    limit, cursor = query.pop("limit"), query.pop("cursor")
    return await parts().accounts.page(UserFilter(**query), limit, cursor)


@shapes.answers(UserSchema, errors=[NotFound])
async def show(user_id: UUID) -> Any:
    """Return one user."""
    return await parts().accounts.get(user_id)
