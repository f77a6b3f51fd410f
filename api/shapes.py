"""What views take and give: Marshmallow schemas by decorator, readable by the OpenAPI document.

    @shapes.body(LoginSchema)
    @shapes.answers(LoginAnswerSchema, errors=[BadCredentials])
    async def login(body): ...

webargs reads; each decorator keeps an ``async def`` a coroutine function.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from flask import Response, current_app, request
from marshmallow import RAISE, Schema, ValidationError
from webargs.flaskparser import FlaskParser

from api import forms
from api.asgi import request_context
from api.auth import transport
from api.errors import InvalidRequest, Refused, UnsupportedMediaType, ValidationFailed
from api.json import json_response

MARK = "__rolecall_shapes__"
# More than any schema takes. Each member is validated, and its faults told, on the loop.
MOST_MEMBERS = 64
MOST_ITEMS = 512
# An answer lists no more: a client mends one kind of fault at a time.
MOST_FAULTS = 64
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
# Of a name that is nobody's we say so much back.
FIELD_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Shapes:
    """The schemas of one view, and the errors that its guard does not tell of."""

    body: Schema | None = None
    query: Schema | None = None
    form: Schema | None = None
    answer: Schema | None = None
    status: int = 200
    media_type: str = "application/json"
    conditional: bool = False
    errors: Sequence[type[Refused]] = field(default_factory=tuple)


class StrictParser(FlaskParser):
    """webargs by the rules of the contract: 415 before 400 before 422, nothing unknown."""

    DEFAULT_UNKNOWN_BY_LOCATION: dict[str, str | None] = {"json": RAISE, "query": RAISE}  # noqa: RUF012

    def load_json(self, req: Any, _schema: Any) -> Any:
        """Return the body, without the token that it may carry (``JWT_TOKEN_LOCATION=json``)."""
        encoding = req.headers.get("Content-Encoding", "identity")
        if transport.media_type(req) != "application/json" or encoding.lower() != "identity":
            raise UnsupportedMediaType
        data = req.get_json()
        if not isinstance(data, dict):
            raise ValidationFailed(errors=[{"field": "", "message": "Must be an object."}])
        _refuse_many(data)
        places = transport.places(request_context().app)
        if "json" in places.locations:
            data = {k: v for k, v in data.items() if k not in places.members.values()}
        return data

    def load_querystring(self, req: Any, _schema: Any) -> Any:
        """Return the query, each name at most once, without the token that it may carry."""
        given = transport.query_of(req)
        repeated = [name for name, values in given.lists() if len(values) > 1]
        if repeated:
            raise ValidationFailed(
                errors=[_fault(name, "Given more than once.") for name in repeated]
            )
        data = given.to_dict()
        places = transport.places(request_context().app)
        if "query_string" in places.locations:
            data.pop(places.parameter, None)
        return data

    def handle_error(self, error: ValidationError, *_args: Any, **_kwargs: Any) -> Any:
        """Raise ``ValidationFailed`` with every fault, up to ``MOST_FAULTS``."""
        messages: Any = error.messages
        # webargs files the faults under the location that it read
        inner = next(iter(messages.values())) if isinstance(messages, Mapping) else messages
        raise ValidationFailed(errors=list(itertools.islice(_flat(inner), MOST_FAULTS)))


def _refuse_many(data: dict[str, Any]) -> None:
    if len(data) > MOST_MEMBERS:
        raise ValidationFailed(errors=[{"field": "", "message": "Has too many members."}])
    for name, value in data.items():
        if isinstance(value, list) and len(value) > MOST_ITEMS:
            raise ValidationFailed(errors=[_fault(name, "Has too many items.")])


parser = StrictParser()
NO_MEMBERS = Schema()


def body(schema: type[Schema]) -> Callable[[Any], Any]:
    """Read the JSON body by ``schema`` and pass it as the keyword ``body``."""
    instance = schema()
    return _reading(instance, "json", "body")


def query(schema: type[Schema]) -> Callable[[Any], Any]:
    """Read the query string by ``schema`` and pass it as the keyword ``query``."""
    instance = schema()
    return _reading(instance, "query", "query")


def form(schema: type[Schema]) -> Callable[[Any], Any]:
    """Read the form body by ``schema`` and pass it as ``form``; a fault is ``InvalidRequest``."""
    instance = schema()

    def decorate(view: Any) -> Any:
        @functools.wraps(view)
        async def reading(*args: Any, **kwargs: Any) -> Any:
            try:
                kwargs["form"] = instance.load(forms.members(request))
            except ValidationError as error:
                missing = ", ".join(sorted(map(str, error.messages)))
                raise InvalidRequest(f"Missing or malformed: {missing}.") from None
            return await view(*args, **kwargs)

        return _mark(reading, view, form=instance)

    return decorate


def answers(
    schema: type[Schema] | None,
    status: int = 200,
    *,
    errors: Sequence[type[Refused]] = (),
    media_type: str = "application/json",
    headers: Mapping[str, str] = NO_HEADERS,
) -> Callable[[Any], Any]:
    """Dump what the view returns by ``schema``; a ``Response`` passes as it is.

    ``media_type`` is what such a response has; ``headers`` go with what was dumped.
    """
    instance = schema() if schema else None

    def decorate(view: Any) -> Any:
        @functools.wraps(view)
        async def answering(*args: Any, **kwargs: Any) -> Any:
            result = await view(*args, **kwargs)
            if isinstance(result, Response):
                return result
            if instance is None:
                return current_app.response_class(status=status)
            response = json_response(instance.dump(result))
            response.status_code = status
            response.headers.update(headers)
            return response

        said = {"answer": instance, "status": status, "errors": tuple(errors)}
        return _mark(answering, view, **said, media_type=media_type)

    return decorate


def refuses(*errors: type[Refused]) -> Callable[[Any], Any]:
    """Say which errors a view has that answers with a ``Response`` of its own making."""
    return lambda view: _mark(view, view, errors=errors)


def conditional(view: Any) -> Any:
    """Say of a view that it heeds ``If-None-Match`` (304) and ``If-Match`` (412)."""
    return _mark(view, view, conditional=True)


def no_body(view: Any) -> Any:
    """Refuse a body with members that nobody reads; none, an empty one or a token are fine."""

    @functools.wraps(view)
    async def reading(*args: Any, **kwargs: Any) -> Any:
        if request.get_data(cache=True):
            parser.parse(NO_MEMBERS, request, location="json")
        return await view(*args, **kwargs)

    return reading


def shapes_of(view: Callable[..., Any]) -> Shapes:
    """Return the shapes that the decorators left on a view."""
    found: Shapes = getattr(view, MARK, Shapes())
    return found


def _reading(schema: Schema, location: str, keyword: str) -> Callable[[Any], Any]:
    def decorate(view: Any) -> Any:
        @functools.wraps(view)
        async def reading(*args: Any, **kwargs: Any) -> Any:
            kwargs[keyword] = parser.parse(schema, request, location=location)
            return await view(*args, **kwargs)

        return _mark(reading, view, **{keyword: schema})

    return decorate


def _mark(wrapper: Any, view: Any, **found: Any) -> Any:
    setattr(wrapper, MARK, replace(shapes_of(view), **found))
    return wrapper


def _flat(messages: Any, path: str = "") -> Any:
    if isinstance(messages, Mapping):
        for name, inner in messages.items():
            own = "" if name == "_schema" else str(name)
            yield from _flat(inner, f"{path}.{own}".strip(".") if own else path)
    elif isinstance(messages, list):
        for message in messages:
            yield _fault(path, message)
    else:
        yield _fault(path, messages)


def _fault(field: str, message: object) -> dict[str, str]:
    return {"field": field[:FIELD_LENGTH], "message": str(message)}
