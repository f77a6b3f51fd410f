"""Users and their sessions."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.fields import (
    LIST_DEFAULT,
    LIST_LIMIT,
    NEW_PASSWORD_MINIMUM,
    ROLE_LENGTH,
    Email,
    Flag,
    Password,
    StrictSchema,
    Text,
    Time,
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


class SessionListSchema(StrictSchema):
    """One page of live sessions."""

    items = fields.List(fields.Nested(SessionSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class PageQuerySchema(StrictSchema):
    """Which page: ``cursor`` is the ``next_cursor`` of the one before."""

    limit = Whole(load_default=LIST_DEFAULT, validate=validate.Range(1, LIST_LIMIT))
    cursor = Text(load_default=None, validate=validate.Length(1, 512))


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
