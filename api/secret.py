"""Whether a SECRET_KEY is one that somebody made up: by its looks, not by a list of known ones."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from zxcvbn import zxcvbn

MINIMUM_BYTES = 32
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
    if _is_made_up(secret) or any(_is_made_up(hidden) for hidden in _hidden(secret)):
        return "is made of words or repeats itself, as examples do"
    return None


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
    for decode in (bytes.fromhex, _from_base64):
        try:
            text = decode(secret).decode("ascii")
        except ValueError:
            continue
        if len(text) >= MINIMUM_BYTES // 2 and text.isprintable():
            found.append(text)
    return found


def _from_base64(text: str) -> bytes:
    padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
    try:
        return base64.b64decode(padded, altchars=b"-_", validate=True)
    except binascii.Error:
        return base64.b64decode(padded, validate=True)
