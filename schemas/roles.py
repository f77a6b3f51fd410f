"""Roles and permissions."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.fields import Items, Permission, RoleName, StrictSchema, Text, TextList

DESCRIPTION = validate.Length(max=255)


class RoleSchema(StrictSchema):
    """A role: what it permits itself, and the roles whose names and permissions it holds too."""

    name = fields.String(required=True)
    description = fields.String(required=True)
    permissions = TextList(required=True)
    includes = TextList(required=True)


class RoleListSchema(StrictSchema):
    """One page of roles; ``next_cursor`` is null on the last."""

    items = fields.List(fields.Nested(RoleSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class RoleChangeSchema(StrictSchema):
    """What may be changed of a role; at least one of it."""

    description = Text(validate=DESCRIPTION)
    permissions = Items(Permission(), maximum=256)
    includes = Items(RoleName(), maximum=64)

    @validates_schema
    def _something(self, data: dict[str, Any], **_: Any) -> None:
        if not data:
            raise ValidationError("Name at least one of description, permissions, includes.")


class RoleCreateSchema(StrictSchema):
    """A new role."""

    name = RoleName(required=True)
    description = Text(load_default="", validate=DESCRIPTION)
    permissions = Items(Permission(), maximum=256, load_default=list)
    includes = Items(RoleName(), maximum=64, load_default=list)


class RoleDeleteQuerySchema(StrictSchema):
    """Which role its users get instead."""

    reassign_to = RoleName(load_default=None)
