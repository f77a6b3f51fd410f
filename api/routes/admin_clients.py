"""Client apps, as operators keep them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from uuid import UUID

from flask import Response, url_for

from api import shapes
from api.errors import Conflict, InsufficientPermission, NotFound
from api.http import origin
from api.json import json_response
from api.parts import parts
from schemas.clients import (
    ClientChangeSchema,
    ClientCreateSchema,
    ClientListSchema,
    ClientSchema,
    NewClientSchema,
    NewSecretSchema,
    SecretQuerySchema,
)
from schemas.users import PageQuerySchema

NEW = NewClientSchema()


@shapes.query(PageQuerySchema)
@shapes.answers(ClientListSchema)
async def index(query: dict[str, Any]) -> Any:
    """List client apps, the oldest first."""
    return await parts().clients.page(query["limit"], query["cursor"])


@shapes.answers(ClientSchema, errors=[NotFound])
async def show(client_id: UUID) -> Any:
    """Return one client app."""
    return await parts().clients.get(client_id)


@shapes.body(ClientCreateSchema)
@shapes.answers(NewClientSchema, 201, errors=[InsufficientPermission])
async def create(body: dict[str, Any]) -> Response:
    """Register a client app, for roles that one holds oneself. Its secret is shown this once."""
    client, secret = await parts().clients.create(body, origin())
    shown = asdict(client) | ({"client_secret": secret} if secret else {})
    response = json_response(NEW.dump(shown))
    response.status_code = 201
    response.headers["Location"] = url_for("admin_clients.show", client_id=client.client_id)
    return response


@shapes.body(ClientChangeSchema)
@shapes.answers(ClientSchema, errors=[NotFound, InsufficientPermission])
async def change(body: dict[str, Any], client_id: UUID) -> Any:
    """Change a client app; it bites on the next request. Disabling ends the sessions through it."""
    return await parts().clients.change(client_id, body, origin())


@shapes.answers(None, 204, errors=[NotFound, InsufficientPermission])
async def delete(client_id: UUID) -> None:
    """Delete a client app; its tokens and the sessions through it end."""
    await parts().clients.delete(client_id, origin())


@shapes.query(SecretQuerySchema)
@shapes.answers(NewSecretSchema, 201, errors=[NotFound, Conflict, InsufficientPermission])
async def replace_secret(query: dict[str, Any], client_id: UUID) -> Any:
    """Make another secret; the one before is good for a day still, unless it is revoked."""
    return await parts().clients.replace_secret(client_id, origin(), **query)
