"""The audit log, the numbers of a dashboard, and tokens taken back by operators."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.fields import Moment, StrictSchema, Text, Time, Whole
from schemas.users import PageQuerySchema

WORD = validate.Length(1, 64)


class AuditQuerySchema(PageQuerySchema):
    """Which rows: ``since`` is the first moment, ``until`` the first no more."""

    actor = Text(validate=WORD)
    action = Text(validate=WORD)
    target = Text(validate=WORD)
    since = Moment()
    until = Moment()


class AuditEventSchema(StrictSchema):
    """Who did what to whom, from where; ``detail`` names what was changed, never a secret."""

    id = fields.UUID(required=True)
    at = Time(required=True)
    actor = fields.String(required=True, allow_none=True)
    action = fields.String(required=True)
    target = fields.String(required=True, allow_none=True)
    ip = fields.String(required=True, allow_none=True)
    request_id = fields.String(required=True, allow_none=True)
    detail = fields.Dict(keys=fields.String(), required=True)


class AuditListSchema(StrictSchema):
    """One page, the newest first."""

    items = fields.List(fields.Nested(AuditEventSchema), required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class StatsQuerySchema(StrictSchema):
    """How many days back."""

    days = Whole(load_default=30, validate=validate.Range(1, 366))


class BucketSchema(StrictSchema):
    """From ``start`` on: sign-ins, and what client apps asked for in their own name."""

    start = Time(required=True)
    logins = fields.Integer(required=True)
    failures = fields.Integer(required=True, metadata={"description": "Sign-ins that failed."})
    client_tokens = fields.Integer(
        required=True, metadata={"description": "Tokens that client apps got for themselves."}
    )
    client_failures = fields.Integer(
        required=True, metadata={"description": "Client apps that did not prove who they are."}
    )


class FailingSchema(StrictSchema):
    """An account at which sign-ins fail; no username where it was deleted."""

    user_id = fields.UUID(required=True)
    username = fields.String(required=True, allow_none=True)
    failures = fields.Integer(required=True)


class StatsSchema(StrictSchema):
    """Numbers for a dashboard; empty buckets are filled with zeros."""

    days = fields.Integer(required=True)
    bucket_seconds = fields.Integer(required=True)
    users = fields.Dict(keys=fields.String(), values=fields.Integer(), required=True)
    sessions = fields.Dict(keys=fields.String(), values=fields.Integer(), required=True)
    clients = fields.Dict(keys=fields.String(), values=fields.Integer(), required=True)
    revocations = fields.Integer(required=True)
    activity = fields.List(fields.Nested(BucketSchema), required=True)
    top_failing = fields.List(fields.Nested(FailingSchema), required=True)


class TokenRevokeSchema(StrictSchema):
    """A token, or what names it: ``exp`` is its expiry in seconds since the epoch."""

    token = Text(validate=validate.Length(1, 8_192))
    jti = fields.UUID()
    sub = fields.UUID()
    exp = fields.Integer(strict=True, validate=validate.Range(0, 2**53))

    @validates_schema
    def _one_of_both(self, data: dict[str, Any], **_: Any) -> None:
        if ("token" in data) == bool(data.keys() & {"jti", "sub", "exp"}):
            raise ValidationError("Give either token, or jti, sub and exp.")
        missing = [] if "token" in data else [n for n in ("jti", "sub", "exp") if n not in data]
        if missing:
            raise ValidationError({name: ["Missing data for required field."] for name in missing})


class RevokedSchema(StrictSchema):
    """The token is refused from now on."""

    revoked = fields.Constant(constant=True, required=True)
