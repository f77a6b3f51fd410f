"""Whether a SECRET_KEY is publicly known, or one that somebody made up (by its looks)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from zxcvbn import zxcvbn

MINIMUM_BYTES = 32
# One hash a line: the first digits of the SHA-256, in hexadecimal, of a secret that is published.
KNOWN_SECRETS = "known-secret-hashes.txt"
HASH_DIGITS = 16
# zxcvbn takes no more; what follows 72 random characters does not matter.
SCORED = 72
# Decimal digits of guesses a character: random base64 comes to 0.97, English in all its
# spellings stays below 0.87. Four bits of hexadecimal are less, and hold no words.
LEAST_GUESSES, LEAST_GUESSES_HEX = 0.88, 0.7
# No random text of this size holds a word of so many small letters, in a million years of starts.
WORD = 8
HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+", re.ASCII)
# Words of whatever language: zxcvbn knows English. No generator leaves out capitals and digits.
SENTENCE = re.compile(r"([a-z]+[ _.-]+){3,}[a-z]+[ _.!?-]*", re.IGNORECASE)
# A row or a repetition goes on from one of the characters shortly before, in most places.
STEPS, MOST = range(1, 5), 0.75


def weakness(secret: str) -> str | None:
    """Return why ``secret`` is too weak to keep keys under, or None."""
    size = len(secret.encode("utf-8", "surrogateescape"))
    if size < MINIMUM_BYTES:
        return f"has {size} bytes; at least {MINIMUM_BYTES} are needed"
    if _is_known(secret):
        return "is publicly known: it is in lists of secrets from examples and breaches"
    if _is_made_up(secret) or any(_is_made_up(hidden) for hidden in _hidden(secret)):
        return "is made of words or repeats itself, as examples do"
    return None


def _is_known(secret: str) -> bool:
    """Return whether the secret, or what it encodes, is on the list; space and quotes aside."""
    bare = secret.strip().strip("'\"").strip()
    # letters of hexadecimal and UUIDs are written in either case
    spellings = {secret, bare, bare.lower(), bare.upper()}
    found = {text.encode("utf-8", "surrogateescape") for text in spellings}
    found.update(_decoded(bare))
    return any(hashlib.sha256(one).hexdigest()[:HASH_DIGITS] in _known() for one in found)


@cache
def _known() -> frozenset[str]:
    lines = resources.files("api").joinpath(KNOWN_SECRETS).read_text("ascii").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def _is_made_up(text: str) -> bool:
    # zxcvbn sees a word better without the spaces beside it
    scored = "".join(text.split())[:SCORED]
    if not scored or _is_sentence(text) or _goes_on(scored):
        return True
    found: dict[str, Any] = zxcvbn(scored)
    least = LEAST_GUESSES_HEX if HEX.fullmatch(scored) else LEAST_GUESSES
    if found["guesses_log10"] < least * len(scored):
        return True
    return any(
        match["pattern"] == "dictionary"
        and len(match["token"]) >= WORD
        and match["token"].isalpha()
        and match["token"].islower()
        for match in found["sequence"]
    )


def _is_sentence(text: str) -> bool:
    return text in {text.lower(), text.upper(), text.title()} and bool(SENTENCE.fullmatch(text))


def _goes_on(text: str) -> bool:
    """Return whether most characters are that of ``n`` places before, or next to it."""
    pairs = (list(zip(text, text[step:], strict=False)) for step in STEPS)
    return any(
        sum(abs(ord(one) - ord(other)) <= 1 for one, other in found) > MOST * len(found)
        for found in pairs
    )


def _hidden(secret: str) -> list[str]:
    """Return the text that the secret is the base64 or the hexadecimal of, if any."""
    found = []
    for decoded in _decoded(secret):
        text = decoded.decode("ascii", "replace")
        if len(text) >= MINIMUM_BYTES // 2 and text.isascii() and text.isprintable():
            found.append(text)
    return found


def _decoded(secret: str) -> Iterator[bytes]:
    for decode in (bytes.fromhex, _from_base64):
        try:
            yield decode(secret)
        except ValueError:
            continue


def _from_base64(text: str) -> bytes:
    padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
    try:
        return base64.b64decode(padded, altchars=b"-_", validate=True)
    except binascii.Error:
        return base64.b64decode(padded, validate=True)
