"""orjson behind Flask's JSON provider: strict in, RFC 8259 out."""

from __future__ import annotations

import json
from typing import Any

import orjson
from flask import Response
from flask.json.provider import JSONProvider

from api.errors import MalformedJson, ValidationFailed

WRITE = orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS


class StrictJSON(JSONProvider):
    """Refuses NaN, bad UTF-8, depth over 1,024, and a member given twice (RFC 7493)."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        """Return JSON text; ``indent`` and ``sort_keys`` as the standard library knows them."""
        option = WRITE
        if kwargs.get("indent"):
            option |= orjson.OPT_INDENT_2
        if kwargs.get("sort_keys"):
            option |= orjson.OPT_SORT_KEYS
        return orjson.dumps(obj, default=kwargs.get("default") or _default, option=option).decode()

    def loads(self, s: str | bytes, **_kwargs: Any) -> Any:
        """Raise ``MalformedJson``, or ``ValidationFailed`` for a surrogate without its pair."""
        try:
            orjson.loads(s)
            # orjson keeps the last of two equal members, silently
            return json.loads(s, object_pairs_hook=_once)
        except orjson.JSONDecodeError as error:
            if "surrogate in string" in str(error):
                raise ValidationFailed(
                    errors=[{"field": "", "message": "Must be text that UTF-8 can encode."}]
                ) from None
            raise MalformedJson from None
        except (ValueError, RecursionError):
            raise MalformedJson from None

    def response(self, *args: Any, **kwargs: Any) -> Any:
        """Return a response whose body is the JSON of the arguments."""
        return json_response(self._prepare_response_obj(args, kwargs))


def json_response(members: Any) -> Response:
    """Return a response whose body is ``members``, on one line."""
    return Response(encoded(members), mimetype="application/json")


def encoded(members: Any) -> bytes:
    """Return ``members`` as JSON on one line."""
    return orjson.dumps(members, _default, WRITE) + b"\n"


def _default(value: Any) -> Any:
    # what flask's own provider knows beyond orjson: anything that renders itself, decimals
    if hasattr(value, "__html__"):
        return str(value.__html__())
    return str(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedJson("A member of an object is given twice.")
    return members
