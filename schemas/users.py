"""Users and their sessions."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.auth import RegisterSchema
from schemas.fields import (
    LIST_DEFAULT,
    LIST_LIMIT,
    NEW_PASSWORD_MINIMUM,
    ROLE_LENGTH,
    Email,
    Flag,
    Items,
    Password,
    Permission,
    RoleName,
    StrictSchema,
    Text,
    Time,
    Truth,
    Username,
    Whole,
)

USER_SORTS = ("created_at", "-created_at", "username", "-username")


class MeSchema(StrictSchema):
    """The user whom the token speaks of."""

    id = fields.UUID(required=True)
    username = fields.String(required=True)
    email = fields.String(required=True, allow_none=True)
    roles = fields.List(fields.String(), required=True)
    permissions = fields.List(fields.String(), required=True)
    created_at = Time(required=True)
    last_login_at = Time(required=True, allow_none=True)


class UserSchema(MeSchema):
    """A user as operators see it."""

    is_active = fields.Boolean(required=True)


class MeChangeSchema(StrictSchema):
    """What one may change of oneself."""

    email = Email(required=True, allow_none=True)


class PasswordChangeSchema(StrictSchema):
    """The current password and the new one."""

    current_password = Password(required=True)
    new_password = Password(required=True, minimum=NEW_PASSWORD_MINIMUM)


class SessionSchema(StrictSchema):
    """One login. ``current`` is the one that asks."""

    id = fields.UUID(required=True)
    current = fields.Boolean(required=True)
    created_at = Time(required=True)
    last_used_at = Time(required=True)
    expires_at = Time(required=True)
    ip = fields.String(required=True, allow_none=True)
    user_agent = fields.String(required=True, allow_none=True)


class UserCreateSchema(RegisterSchema):
    """A new account, with its roles."""

    roles = Items(RoleName(), maximum=64, load_default=lambda: ["user"])
    is_active = Truth(load_default=True)


class UserImportSchema(StrictSchema):
    """A line of an import: a user with a password, or with a hash that another system made."""

    username = Username(required=True)
    email = Email(allow_none=True, load_default=None)
    password = Password(minimum=NEW_PASSWORD_MINIMUM)
    password_hash = Text(validate=validate.Length(1, 255))
    roles = Items(RoleName(), maximum=64, load_default=lambda: ["user"])
    is_active = Truth(load_default=True)

    @validates_schema
    def _one_of_both(self, data: dict[str, Any], **_: Any) -> None:
        if ("password" in data) == ("password_hash" in data):
            raise ValidationError("Give either password or password_hash.")


class UserChangeSchema(StrictSchema):
    """What an operator may change of a user; at least one of it."""

    email = Email(allow_none=True)
    is_active = Truth()
    password = Password(minimum=NEW_PASSWORD_MINIMUM)

    @validates_schema
    def _something(self, data: dict[str, Any], **_: Any) -> None:
        if not data:
            raise ValidationError("Name at least one of email, is_active, password.")


class UserRolesSchema(StrictSchema):
    """Exactly the roles that a user is to have."""

    roles = Items(RoleName(), maximum=64, required=True)


class WaySchema(StrictSchema):
    """A way to a permission: the role given, those it includes, and what the last one holds."""

    roles = fields.List(fields.String(), required=True)
    permission = fields.String(required=True)


class AccessQuerySchema(StrictSchema):
    """Which permission is asked about."""

    permission = Permission(required=True)


class AccessSchema(StrictSchema):
    """Whether a user holds a permission, by which ways, or why not.

    ``ways`` holds at most 20, the shortest first; ``more`` says whether there are others.
    """

    permission = fields.String(required=True)
    granted = fields.Boolean(required=True)
    ways = fields.List(fields.Nested(WaySchema), required=True)
    more = fields.Boolean(required=True)
    reason = fields.String(required=True)


class AnySessionSchema(StrictSchema):
    """One login of one user."""

    id = fields.UUID(required=True)
    user_id = fields.UUID(required=True)
    username = fields.String(required=True)
    created_at = Time(required=True)
    last_used_at = Time(required=True)
    expires_at = Time(required=True)
    ip = fields.String(required=True, allow_none=True)
    user_agent = fields.String(required=True, allow_none=True)


class AnySessionListSchema(StrictSchema):
    """One page of live sessions."""

    items = fields.List(fields.Nested(AnySessionSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class SessionListSchema(StrictSchema):
    """One page of live sessions."""

    items = fields.List(fields.Nested(SessionSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class PageQuerySchema(StrictSchema):
    """Which page: ``cursor`` is the ``next_cursor`` of the one before."""

    limit = Whole(load_default=LIST_DEFAULT, validate=validate.Range(1, LIST_LIMIT))
    cursor = Text(load_default=None, validate=validate.Length(1, 512))


class SessionQuerySchema(PageQuerySchema):
    """Whose sessions, from which address."""

    user_id = fields.UUID()
    ip = Text(validate=validate.Length(1, 45))


class UserQuerySchema(PageQuerySchema):
    """Which users, in which order."""

    q = Text(validate=validate.Length(1, 254))
    role = Text(validate=validate.Length(1, ROLE_LENGTH))
    active = Flag()
    sort = fields.String(load_default="created_at", validate=validate.OneOf(USER_SORTS))


class UserListSchema(StrictSchema):
    """One page of users."""

    items = fields.List(fields.Nested(UserSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)
