"""Signing in, refreshing, signing out."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.fields import NEW_PASSWORD_MINIMUM, Email, Password, StrictSchema, Username

TRANSPORTS = ("json", "cookies")


class LoginSchema(StrictSchema):
    """``transport`` says how the tokens travel; without it, both ways.

    A confidential client app authenticates with ``client_secret``, or by HTTP Basic.
    """

    username = Username(required=True)
    password = Password(required=True)
    transport = fields.String(validate=validate.OneOf(TRANSPORTS))
    client_id = fields.UUID(
        metadata={"description": "The client app that asks: its roles bound the user's."}
    )
    client_secret = Password(minimum=0)


class RegisterSchema(StrictSchema):
    """A new account."""

    username = Username(required=True)
    password = Password(required=True, minimum=NEW_PASSWORD_MINIMUM)
    email = Email(allow_none=True, load_default=None)


class SignedInUserSchema(StrictSchema):
    """Who signed in."""

    id = fields.UUID(required=True)
    username = fields.String(required=True)
    roles = fields.List(fields.String(), required=True)


class GrantSchema(StrictSchema):
    """Tokens; those that travel by cookie are not in the body."""

    token_type = fields.Constant("Bearer", required=True)
    expires_in = fields.Integer(
        required=True, metadata={"description": "Seconds until the access token expires."}
    )
    access_token = fields.String()
    refresh_token = fields.String()


class LoginAnswerSchema(GrantSchema):
    """The answer to a login."""

    login = fields.Constant(constant=True, required=True)
    user = fields.Nested(SignedInUserSchema, required=True)


class RefreshAnswerSchema(GrantSchema):
    """The answer to a refresh: the presented token is spent."""

    refresh = fields.Constant(constant=True, required=True)


class LogoutAnswerSchema(StrictSchema):
    """The session is over."""

    logout = fields.Constant(constant=True, required=True)


class LogoutAllAnswerSchema(LogoutAnswerSchema):
    """How many sessions are over."""

    sessions = fields.Integer(required=True)


class ProtectedSchema(StrictSchema):
    """What the token says of its bearer."""

    logged_in_as = fields.String(required=True)
    roles = fields.List(fields.String(), required=True)
