"""The heads of answers over HTTP/1: what most of them have is made once, and checked once."""

from __future__ import annotations

import functools
import time

from h11._headers import Headers, normalize_and_validate
from hypercorn.config import Config

Header = tuple[bytes, bytes]

# They say the same in many answers, nothing that is secret, and nothing of where an answer ends.
STEADY = frozenset({
    b"cache-control", b"content-security-policy", b"content-type", b"date", b"referrer-policy",
    b"vary", b"x-content-type-options", b"x-frame-options",
})  # fmt: skip


class Dated(Config):
    """Hypercorn's settings; what it adds to every answer, the date, is made once a second."""

    _made: tuple[tuple[int, str], list[Header]] | None = None

    def response_headers(self, protocol: str) -> list[Header]:
        """As Hypercorn has them."""
        now = (int(time.time()), protocol)
        if self._made is None or self._made[0] != now:
            self._made = (now, super().response_headers(protocol))
        return self._made[1].copy()


def checked(headers: list[Header]) -> Headers:
    """Return what h11 makes of them, the steady ones last.

    Raises ``LocalProtocolError`` for what could be read as two headers, or as two lengths.
    """
    # together: h11 compares those that say where an answer ends
    others = normalize_and_validate([header for header in headers if header[0] not in STEADY])
    steady = [_checked(header) for header in headers if header[0] in STEADY]
    return Headers([*others._full_items, *steady])  # noqa: SLF001  what it is made of


@functools.lru_cache(maxsize=256)
def _checked(header: Header) -> tuple[bytes, bytes, bytes]:
    name, value = normalize_and_validate([header])[0]
    return name, name, value
