"""What is made and checked once for many answers: as Hypercorn and h11 make it of each."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import h11
import pytest
from h11._headers import normalize_and_validate
from hypercorn.config import Config

from api import heads
from api.heads import Dated, checked
from api.server import load_config

STEADY = [
    (b"content-type", b"text/plain"),
    (b"cache-control", b"no-store"),
    (b"vary", b"Origin"),
    (b"vary", b"Cookie"),
]


def test_headers_are_those_that_h11_makes() -> None:
    """All of them, those of one name in their order, however often; names keep their spelling."""
    given = [
        (b"set-cookie", b"a=1"),
        *STEADY,
        (b"Content-Type", b"text/html"),
        (b"content-length", b"5, 5"),
        (b"content-length", b"5"),
        (b"set-cookie", b"b=2"),
    ]
    wanted = normalize_and_validate(given)
    for _ in range(2):
        found = checked(given)
        assert sorted(found.raw_items()) == sorted(wanted.raw_items())
        for name in (b"set-cookie", b"vary"):
            assert [v for n, v in found if n == name] == [v for n, v in wanted if n == name]
    assert checked([]) == []


@pytest.mark.parametrize("name", [b"x-team", b"content-type", b"vary", b"date"])
@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb", b"a\0b"])
def test_a_value_of_two_lines_is_refused(name: bytes, value: bytes) -> None:
    """Every time, beside those that were taken before."""
    for _ in range(2):
        checked([(name, b"a")])
        with pytest.raises(h11.LocalProtocolError):
            checked([*STEADY, (name, value)])


def test_a_name_of_two_lines_is_refused() -> None:
    """Also where it begins as one that is known."""
    for name in (b"vary\r\nx", b"va ry", b"vary:", b""):
        with pytest.raises(h11.LocalProtocolError):
            checked([*STEADY, (name, b"a")])


@pytest.mark.parametrize("framing", [
    [(b"content-length", b"5"), (b"content-length", b"6")],
    [(b"Content-Length", b"5"), (b"content-length", b"6")],
    [(b"content-length", b"5, 6")], [(b"content-length", b"+5")],
    [(b"transfer-encoding", b"gzip")], [(b"transfer-encoding", b"chunked")] * 2,
])  # fmt: skip
def test_an_answer_has_one_length(framing: list[heads.Header]) -> None:
    """What says where it ends is compared as h11 does, other headers in between or not."""
    for _ in range(2):
        with pytest.raises(h11.LocalProtocolError):
            checked([framing[0], *STEADY, *framing[1:]])


def test_no_secret_is_remembered() -> None:
    """What is kept from one answer to the next holds no cookie."""
    before = heads._checked.cache_info().currsize
    checked([(b"set-cookie", b"access_token=secret"), (b"x-request-id", b"1")])
    assert heads._checked.cache_info().currsize == before


def test_the_date_changes_with_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forth and back, as the clock does."""
    found = []
    config = Dated()
    config.include_server_header = True
    for now in (1_000_000.2, 1_000_000.9, 1_000_001.0, 1_000_000.9):
        monkeypatch.setattr(heads, "time", SimpleNamespace(time=lambda at=now: at))
        monkeypatch.setattr("hypercorn.config.time", lambda at=now: at)
        for protocol in ("h11", "h2"):
            assert config.response_headers(protocol) == Config.response_headers(config, protocol)
        found.append(dict(config.response_headers("h11"))[b"date"])
    assert found[0] == b"Mon, 12 Jan 1970 13:46:40 GMT"
    assert [one == other for one, other in pairwise(found)] == [True, False, False]


def test_the_date_is_made_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each answer; and nobody's list is another's."""
    monkeypatch.setattr(heads, "time", SimpleNamespace(time=lambda: 7.0))
    made = []
    monkeypatch.setattr("hypercorn.config.time", lambda: made.append(1) or 7.0)
    config = Dated()
    for _ in range(5):
        given = config.response_headers("h11")
        assert [name for name, _ in given] == [b"date", b"server"]
        given.clear()
    assert len(made) == 1
    assert isinstance(load_config(None), Dated)
