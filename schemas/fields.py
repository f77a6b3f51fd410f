"""Fields that every schema shares, and the limits that the contract states."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from marshmallow import RAISE, Schema, ValidationError, fields, missing, validate

USERNAME_LENGTH = 64
# So many characters, at the most, become one (UAX 15)
NFKC_SHRINKS = 4
PASSWORD_LENGTH = 256
NEW_PASSWORD_MINIMUM = 8
EMAIL_LENGTH = 254
ROLE_LENGTH = 64
LIST_LIMIT = 200
LIST_DEFAULT = 50
# what is stored lies well within
EARLIEST, LATEST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
# C0, DEL, C1: also what PostgreSQL (NUL) and terminals (the rest) choke on
# Format, separators, private use and unassigned: two names that look the same must be the same
UNSEEN = {"Cf", "Zl", "Zp", "Co", "Cn"}
# Default_Ignorable_Code_Point (Unicode's DerivedCoreProperties.txt) of other categories
IGNORABLE = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
    r"\U000e0100-\U000e01ef]"
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# What these fields leave as it is (and lists of strings a tuple): whoever writes JSON knows it.
AS_IS = {fields.String: str, fields.Boolean: bool, fields.UUID: UUID}


def _as_is(field: fields.Field[Any]) -> type | None:
    if isinstance(field, fields.List) and type(field.inner) is fields.String:
        return tuple
    return AS_IS.get(type(field))


class StrictSchema(Schema):
    """Unknown fields are refused, in every body and every query."""

    class Meta:
        unknown = RAISE

    def dump(self, obj: Any, *, many: bool | None = None) -> Any:
        """Return what marshmallow's would, at a fifth of its price.

        UUIDs, and tuples of strings, are left as they are.

        Ours have no hooks, no defaults and no other keys: how each field is found is settled
        once, not for each object.
        """
        if many:
            return [self.dump(one) for one in obj]
        shown = {}
        is_dict = isinstance(obj, dict)
        for name, as_is, write, is_constant in self._written:
            value = obj.get(name, missing) if is_dict else getattr(obj, name, missing)
            if type(value) is as_is:
                shown[name] = value
            elif is_constant:
                shown[name] = write(None, name, obj)
            elif value is not missing:
                shown[name] = write(value, name, obj)
        return shown

    @cached_property
    def _written(self) -> list[tuple[str, type | None, Callable[..., Any], bool]]:
        return [
            (name, _as_is(field), field._serialize, not field._CHECK_ATTRIBUTE)  # noqa: SLF001
            for name, field in self.dump_fields.items()
        ]


class Pattern(validate.Regexp):
    """The whole text is as a pattern says that Python and ECMA-262, OpenAPI's, read alike."""

    def __init__(self, pattern: str, *, error: str) -> None:
        super().__init__(f"^{pattern}$", error=error)

    def __call__(self, value: Any) -> Any:
        # $ alone would let a line break follow here
        if not self.regex.fullmatch(value):
            raise ValidationError(self._format_error(value))
        return value


class Text(fields.String):
    """A string without control characters, surrogates or NUL."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, *args, **kwargs)
        if not isinstance(value, str):
            raise self.make_error("invalid")
        if CONTROL.search(text):
            raise ValidationError("Must not hold control characters.")
        return _encodable(text)


class Username(Text):
    """A username in NFKC: 1 to 64 characters, no control characters, no surrounding space."""

    def __init__(self, **kwargs: Any) -> None:
        # a schema counts before NFKC
        kwargs["metadata"] = {
            "minLength": 1,
            "maxLength": NFKC_SHRINKS * USERNAME_LENGTH,
            "description": f"1 to {USERNAME_LENGTH} characters after NFKC.",
        }
        super().__init__(**kwargs)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, *args, **kwargs)
        # before a megabyte is normalized
        if len(text) <= NFKC_SHRINKS * USERNAME_LENGTH:
            text = unicodedata.normalize("NFKC", text)
        if not 1 <= len(text) <= USERNAME_LENGTH:
            raise ValidationError(f"Length must be between 1 and {USERNAME_LENGTH}.")
        if text != text.strip():
            raise ValidationError("Must not begin or end with space.")
        if IGNORABLE.search(text) or any(unicodedata.category(c) in UNSEEN for c in text):
            raise ValidationError("Must not hold characters that cannot be seen.")
        return text


class Password(fields.String):
    """A password: any characters but NUL, never cut, never folded, never shown."""

    def __init__(self, *, minimum: int = 1, **kwargs: Any) -> None:
        kwargs["load_only"] = True
        kwargs["metadata"] = {"format": "password"}
        super().__init__(validate=validate.Length(minimum, PASSWORD_LENGTH), **kwargs)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, *args, **kwargs)
        if "\0" in text:
            raise ValidationError("Must not hold NUL.")
        return _encodable(text)


class Email(fields.Email):
    """An address of at most 254 characters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=validate.Length(max=EMAIL_LENGTH), **kwargs)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if isinstance(value, str) and len(value) > EMAIL_LENGTH:
            raise ValidationError(f"Longer than maximum length {EMAIL_LENGTH}.")
        if isinstance(value, str) and CONTROL.search(value):
            raise ValidationError("Must not hold control characters.")
        return _encodable(super()._deserialize(value, *args, **kwargs))


class Time(fields.DateTime):
    """ISO 8601 in UTC with ``Z``, to the millisecond."""

    def _serialize(self, value: datetime | None, *_args: Any, **_kwargs: Any) -> str | None:
        if value is None:
            return None
        at = value.astimezone(UTC)
        # isoformat takes twice as long
        return "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ" % (  # noqa: UP031  a third of an f-string's
            at.year, at.month, at.day, at.hour, at.minute, at.second, at.microsecond // 1000,
        )  # fmt: skip


class Truth(fields.Boolean):
    """``true`` or ``false`` of JSON, no word or number for it."""

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Items(fields.List[Any]):
    """A list of at most ``maximum`` items, counted before any of them is looked at."""

    def __init__(self, item: fields.Field[Any], *, maximum: int, **kwargs: Any) -> None:
        self.maximum = maximum
        super().__init__(item, validate=validate.Length(0, maximum), **kwargs)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if isinstance(value, list) and len(value) > self.maximum:
            raise ValidationError(f"Longer than maximum length {self.maximum}.")
        return super()._deserialize(value, *args, **kwargs)


class TextList(fields.List[Any]):
    """A list of texts in an answer, written as it is: a role may hold hundreds of permissions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(fields.String(), dump_only=True, **kwargs)

    def _serialize(self, value: Any, *_args: Any, **_kwargs: Any) -> list[Any] | None:
        return None if value is None else list(value)


class RoleName(Text):
    """The name of a role: ASCII letters, digits, ``_``, ``-``, ``.``, ``:``; at most 64."""

    def __init__(self, **kwargs: Any) -> None:
        pattern = f"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{ROLE_LENGTH - 1}}}"
        super().__init__(validate=Pattern(pattern, error="Not the name of a role."), **kwargs)


class Permission(Text):
    """``area:verb``, ``area:*`` or ``*``; at most 64 characters."""

    def __init__(self, **kwargs: Any) -> None:
        checks = [
            Pattern(
                r"(\*|[a-z0-9_.-]+:(\*|[a-z0-9_.-]+))", error="Must be area:verb, area:* or *."
            ),
            validate.Length(max=ROLE_LENGTH),
        ]
        super().__init__(validate=checks, **kwargs)


class Moment(fields.AwareDateTime):
    """A time of ISO 8601 with its offset; ``Z`` for UTC."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(format="iso", **kwargs)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> datetime:
        moment: datetime = super()._deserialize(value, *args, **kwargs)
        if not EARLIEST <= moment <= LATEST:
            raise ValidationError("Out of range.")
        return moment.astimezone(UTC)


class Whole(fields.Integer):
    """A whole number in ASCII digits: Python's int() takes more, such as ``1_0``."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,18}", value, re.ASCII):
            raise self.make_error("invalid")
        return super()._deserialize(value, *args, **kwargs)


class Flag(fields.Boolean):
    """``true`` or ``false``, in those words."""

    truthy = {"true", True}  # noqa: RUF012  as marshmallow declares them
    falsy = {"false", False}  # noqa: RUF012

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool | str):
            raise self.make_error("invalid", input=value)
        return bool(super()._deserialize(value, *args, **kwargs))


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValidationError("Must be text that UTF-8 can encode.") from None
    return text
