"""How long a token becomes."""

from __future__ import annotations

import orjson

from api.auth.claims import cookie_bytes


def test_the_size_is_that_of_the_json_which_is_written() -> None:
    """Characters beyond ASCII count as their UTF-8, a quote as its escape."""
    plain = cookie_bytes("x" * 64, (), ())
    for username in ("é" * 32, "語" * 21 + "x", "😀" * 16, '"' * 32):
        assert len(orjson.dumps(username)) == 66
        assert cookie_bytes(username, (), ()) == plain


def test_a_scope_counts_beside_the_permissions() -> None:
    """A narrowed token carries both."""
    permissions = [f"area{number}:read" for number in range(10)]
    both = cookie_bytes("", (), permissions, scope=permissions)
    text = len(',"scope":""') + len(" ".join(permissions))
    assert abs(both - cookie_bytes("", (), permissions) - text * 4 / 3) <= 1


def test_audiences_count_as_they_are_or_as_the_most_that_there_can_be() -> None:
    """Those of a client app, 300 bytes at the most; without them room is left for any."""
    few = cookie_bytes("", (), (), audiences=["a"])
    most = cookie_bytes("", (), (), audiences=["語" * 100, *("" for _ in range(7))])
    assert few < most == cookie_bytes("", (), ())
