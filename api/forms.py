"""Form bodies, as OAuth's endpoints take them (RFC 6749 section 3.2 and appendix B)."""

from __future__ import annotations

from urllib.parse import parse_qsl

from flask import Request

from api.auth import transport
from api.errors import InvalidRequest

FORM = "application/x-www-form-urlencoded"
MOST_MEMBERS = 32


def members(request: Request) -> dict[str, str]:
    """Return the members of the body; those without a value count as left out.

    Raises ``InvalidRequest`` for another type of body, a member given twice, text that is not
    UTF-8, and for anything in the query string: secrets there end in logs.
    """
    if request.query_string:
        raise InvalidRequest("Parameters belong in the body, not in the query.")
    if not request.get_data():
        # whoever sends nothing has not said who they are: that is told first
        return {}
    if (
        transport.media_type(request) != FORM
        or request.headers.get("Content-Encoding", "identity") != "identity"
    ):
        raise InvalidRequest(f"Send the parameters as {FORM}.")
    try:
        pairs = parse_qsl(
            request.get_data().decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MOST_MEMBERS,
        )
    except ValueError:
        raise InvalidRequest("The body is not a form in UTF-8.") from None
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("A parameter is given more than once.")
    if any(not text.isprintable() for text in found.values()):
        raise InvalidRequest("A parameter holds control characters.")
    return {name: value for name, value in found.items() if value}
