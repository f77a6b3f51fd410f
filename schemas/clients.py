"""Client apps."""

from __future__ import annotations

from typing import Any

import orjson
from marshmallow import ValidationError, fields, validate, validates, validates_schema

from schemas.fields import Flag, Items, Pattern, RoleName, StrictSchema, Text, Time, Truth

GRANTS = ("client_credentials", "refresh_token")
NAME_LENGTH = 64
# Together, as a token's JSON has them: they travel in a cookie with the roles.
AUDIENCES_BYTES = 300
SHORTEST, LONGEST = 10, 86_400


class Audience(Text):
    """Whom a token is meant for (RFC 7519 section 4.1.3): no white space."""

    def __init__(self, **kwargs: Any) -> None:
        checks = [
            validate.Length(1, 255),
            # U+FEFF is white space to ECMA-262, and not to Python
            Pattern(r"[^\s\ufeff]+", error="Must not hold white space."),
        ]
        super().__init__(validate=checks, **kwargs)


class ClientSchema(StrictSchema):
    """A client app; without audiences its tokens are meant for this service."""

    client_id = fields.UUID(required=True)
    name = fields.String(required=True)
    allowed_roles = fields.List(fields.String(), required=True)
    audiences = fields.List(fields.String(), required=True)
    grants = fields.List(fields.String(), required=True)
    public = fields.Boolean(required=True)
    access_token_expires = fields.Integer(required=True, allow_none=True)
    is_active = fields.Boolean(required=True)
    created_at = Time(required=True)
    updated_at = Time(required=True)


class ClientListSchema(StrictSchema):
    """One page of clients."""

    items = fields.List(fields.Nested(ClientSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class NewClientSchema(ClientSchema):
    """A client as it was registered; a confidential one's secret is shown this once."""

    client_secret = fields.String()


class _ClientFields(StrictSchema):
    name = Text(validate=validate.Length(1, NAME_LENGTH))
    allowed_roles = Items(RoleName(), maximum=64)
    audiences = Items(Audience(), maximum=8)
    grants = Items(fields.String(validate=validate.OneOf(GRANTS)), maximum=8)
    access_token_expires = fields.Integer(
        strict=True,
        allow_none=True,
        validate=validate.Range(SHORTEST, LONGEST),
        metadata={"description": "Seconds; the service's own setting where null."},
    )

    @validates("audiences")
    def _short(self, value: list[str], **_: Any) -> None:
        # in UTF-8, with quotes and backslashes escaped
        if sum(len(orjson.dumps(audience)) - len('""') for audience in value) > AUDIENCES_BYTES:
            raise ValidationError(f"Together at most {AUDIENCES_BYTES} bytes in a token's JSON.")


class ClientCreateSchema(_ClientFields):
    """A new client; ``public`` ones have no secret."""

    name = Text(required=True, validate=validate.Length(1, NAME_LENGTH))
    allowed_roles = Items(RoleName(), maximum=64, required=True)
    audiences = Items(Audience(), maximum=8, required=True)
    grants = Items(fields.String(validate=validate.OneOf(GRANTS)), maximum=8, required=True)
    public = Truth(load_default=False)
    access_token_expires = fields.Integer(
        strict=True,
        allow_none=True,
        load_default=None,
        validate=validate.Range(SHORTEST, LONGEST),
        metadata={"description": "Seconds; the service's own setting where null."},
    )


class ClientChangeSchema(_ClientFields):
    """What may be changed of a client; at least one of it."""

    is_active = Truth()

    @validates_schema
    def _something(self, data: dict[str, Any], **_: Any) -> None:
        if not data:
            raise ValidationError("Name at least one thing to change.")


class SecretQuerySchema(StrictSchema):
    """Whether the secret before is refused at once."""

    revoke_previous = Flag(load_default=False)


class NewSecretSchema(StrictSchema):
    """Another secret, shown this once; until when the one before it is good."""

    client_id = fields.UUID(required=True)
    client_secret = fields.String(required=True)
    previous_expires_at = Time(required=True, allow_none=True)
