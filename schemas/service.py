"""What the service says of itself."""

from __future__ import annotations

from marshmallow import fields

from schemas.fields import StrictSchema, Time


class ProblemSchema(StrictSchema):
    """An error (RFC 9457)."""

    type = fields.String(required=True, metadata={"format": "uri-reference"})
    title = fields.String(required=True)
    status = fields.Integer(required=True)
    detail = fields.String(required=True)
    code = fields.String(required=True)
    request_id = fields.String(required=True)


class FaultSchema(StrictSchema):
    """One field that is not as it must be."""

    field = fields.String(required=True)
    message = fields.String(required=True)


class ValidationProblemSchema(ProblemSchema):
    """422: ``errors`` names every fault; ``reasons`` is there for a weak password."""

    errors = fields.List(fields.Nested(FaultSchema))
    reasons = fields.List(fields.String())


class LiveSchema(StrictSchema):
    """The process runs."""

    status = fields.Constant("ok", required=True)


class ReadySchema(StrictSchema):
    """Whether requests can be served, and what stands in the way."""

    status = fields.String(required=True)
    database = fields.String(required=True)
    redis = fields.String(required=True)
    blocklist = fields.String(required=True)
    reason = fields.String(allow_none=True, metadata={"description": "Why Redis is cold."})
    last_reconcile = Time(allow_none=True)
    lag_seconds = fields.Float(allow_none=True)


class JwkSchema(StrictSchema):
    """A public key (RFC 7517, RFC 8037)."""

    kty = fields.String(required=True)
    kid = fields.String(required=True)
    use = fields.String(required=True)
    alg = fields.String(required=True)
    crv = fields.String()
    x = fields.String()
    y = fields.String()
    n = fields.String()
    e = fields.String()


class JwksSchema(StrictSchema):
    """Every key that may verify a token."""

    keys = fields.List(fields.Nested(JwkSchema), required=True)
