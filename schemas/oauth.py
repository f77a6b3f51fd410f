"""OAuth's endpoints: forms in (RFC 6749, 7009, 7662), JSON out. Unknown parameters are ignored."""

from __future__ import annotations

from marshmallow import EXCLUDE, Schema, fields

from schemas.fields import StrictSchema


class FormSchema(Schema):
    """RFC 6749 section 3.2: the server MUST ignore unrecognized request parameters."""

    class Meta:
        unknown = EXCLUDE

    client_id = fields.String(metadata={"description": "Where the client uses no HTTP Basic."})
    client_secret = fields.String(metadata={"format": "password"})


class TokenRequestSchema(FormSchema):
    """``scope`` is a space-separated list of permissions."""

    grant_type = fields.String(required=True)
    scope = fields.String(
        metadata={
            "description": "Narrows the access token. Every user's session may name me:read and "
            "me:write, for /me; a client app's own token may not."
        }
    )
    refresh_token = fields.String(metadata={"description": "With grant_type=refresh_token."})


class TokenAnswerSchema(StrictSchema):
    """RFC 6749 section 5.1; ``refresh_token`` only where one was spent."""

    access_token = fields.String(required=True)
    token_type = fields.Constant("Bearer", required=True)
    expires_in = fields.Integer(required=True)
    scope = fields.String(required=True)
    refresh_token = fields.String()


class TokenQuestionSchema(FormSchema):
    """A token of whatever kind."""

    token = fields.String(required=True)
    token_type_hint = fields.String()


class IntrospectionSchema(StrictSchema):
    """RFC 7662 section 2.2; ``{"active": false}`` and nothing else where it is not."""

    active = fields.Boolean(required=True)
    scope = fields.String()
    client_id = fields.String()
    username = fields.String()
    token_type = fields.String()
    exp = fields.Integer()
    iat = fields.Integer()
    nbf = fields.Integer()
    sub = fields.String()
    aud = fields.Raw(metadata={"type": ["string", "array"], "items": {"type": "string"}})
    iss = fields.String()
    jti = fields.String()
    sid = fields.String()
    type = fields.String()
    roles = fields.List(fields.String())
    permissions = fields.List(fields.String())


class OAuthErrorSchema(StrictSchema):
    """RFC 6749 section 5.2."""

    error = fields.String(required=True)
    error_description = fields.String()


class MetadataSchema(StrictSchema):
    """RFC 8414 section 2."""

    issuer = fields.String(required=True)
    token_endpoint = fields.String(required=True)
    jwks_uri = fields.String(required=True)
    introspection_endpoint = fields.String(required=True)
    revocation_endpoint = fields.String(required=True)
    service_documentation = fields.String(required=True)
    response_types_supported = fields.List(fields.String(), required=True)
    grant_types_supported = fields.List(fields.String(), required=True)
    token_endpoint_auth_methods_supported = fields.List(fields.String(), required=True)
    introspection_endpoint_auth_methods_supported = fields.List(fields.String(), required=True)
    revocation_endpoint_auth_methods_supported = fields.List(fields.String(), required=True)
