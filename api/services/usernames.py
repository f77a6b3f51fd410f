"""Usernames: the form in which they are compared, and which new ones are refused.

A new username is in one script, or in scripts that one language writes together (Unicode
Technical Standard 39, "highly restrictive"), and is not confusable with another user's: by the
skeleton of the same standard, which is a unique column. The tables of Unicode come from the
library confusable-homoglyphs.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import groupby

from confusable_homoglyphs.categories import alias as script_of
from confusable_homoglyphs.confusables import confusables_data

from api.errors import ValidationFailed

# UTS 39 section 5.2; each with Latin.
WRITTEN_TOGETHER = (
    {"LATIN", "HAN", "HIRAGANA", "KATAKANA"},
    {"LATIN", "HAN", "BOPOMOFO"},
    {"LATIN", "HAN", "HANGUL"},
)
ANY_SCRIPT = {"COMMON", "INHERITED"}
# Nonspacing marks in a row: of any kind (UTS 39 section 5.4), and of those that no script owns,
# of which Greek and Vietnamese write up to three.
MARKS_AT_MOST, COMMON_MARKS_AT_MOST = 4, 3
# They look like nothing or like a space, and no category of Unicode says so.
BLANK = {"\u2800", "\U0001d159"}
# Names by which somebody could pass for whoever runs the service; RFC 2142 has some of them.
RESERVED = (
    "abuse", "admin", "administrator", "console", "helpdesk", "hostmaster", "moderator", "noreply",
    "postmaster", "rolecall", "root", "security", "staff", "superuser", "support", "sysadmin",
    "system", "webmaster",
)  # fmt: skip
# Letters that differ from a capital in size or frame alone: confusables.txt does not have them.
STYLED_LETTER = re.compile(
    r"(?:LATIN LETTER SMALL CAPITAL|NEGATIVE (?:CIRCLED|SQUARED) LATIN CAPITAL LETTER"
    r"|REGIONAL INDICATOR SYMBOL LETTER) ([A-Z])"
)
# On these the dot is there already, and is not drawn again.
SECOND_DOT = re.compile("(?<=[ij])\u0307")
LEFT_TO_RIGHT_MARK = "\u200e"


def fold(username: str) -> str:
    """Return the form in which two usernames are compared: NFKC, case folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", username).casefold())


def skeleton(username: str) -> str:
    """Return a form that two usernames share if they are confusable (UTS 39 section 4).

    As they are written and with the case folded: ``PauI`` is confusable with ``Paul``, and so is
    ``b0b`` with ``bOb``, which is another spelling of ``bob``. It is for comparing alone.
    """
    text = "".join(map(_plain, unicodedata.normalize("NFKC", username)))
    text = _prototypes(_prototypes(text).casefold())
    return SECOND_DOT.sub("", " ".join(text.split()))


def refuse_deceptive(username: str) -> None:
    """Raise ``ValidationFailed`` for a new username that is made to look like another."""
    if message := _fault(username):
        raise _refusal(message)


def refuse_reserved(username: str) -> None:
    """Raise ``ValidationFailed`` for a name that is reserved, or looks like one that is."""
    if _without_detail(username) in _reserved():
        raise _refusal("Is reserved, or looks like a name that is.")


def _refusal(message: str) -> ValidationFailed:
    return ValidationFailed(errors=[{"field": "username", "message": message}])


def _fault(username: str) -> str | None:
    scripts = {script_of(char) for char in username} - ANY_SCRIPT
    if len(scripts) > 1 and not any(scripts <= together for together in WRITTEN_TOGETHER):
        return "Must not mix letters of different scripts."
    if len({ord(char) - unicodedata.decimal(char) for char in username if char.isdecimal()}) > 1:
        return "Must not mix digits of different scripts."
    if not BLANK.isdisjoint(username):
        return "Must not hold characters that cannot be seen."
    for is_mark, chars in groupby(unicodedata.normalize("NFD", username), _is_mark):
        marks = list(chars) if is_mark else []
        if (
            len(marks) > MARKS_AT_MOST
            or sum(script_of(mark) in ANY_SCRIPT for mark in marks) > COMMON_MARKS_AT_MOST
            or len(marks) > len(set(marks))
            or any(unicodedata.category(mark) == "Me" for mark in marks)
        ):
            return "Must not hold stacked or enclosing marks."
    if _is_mark(username[0]):
        return "Must not begin with a mark that belongs to the character before it."
    return None


def _is_mark(char: str) -> bool:
    return unicodedata.category(char) in {"Mn", "Me"}


def _plain(char: str) -> str:
    styled = None if char.isascii() else STYLED_LETTER.fullmatch(unicodedata.name(char, ""))
    return styled[1].lower() if styled else char


def _prototypes(text: str) -> str:
    prototypes = _table()
    mapped = "".join(prototypes.get(char, char) for char in unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFD", mapped)


def _without_detail(username: str) -> str:
    # letters and digits alone; i like l, for a capital I is confusable with both
    return "".join(char for char in skeleton(username) if char.isalnum()).replace("i", "l")


@cache
def _reserved() -> frozenset[str]:
    return frozenset(map(_without_detail, RESERVED))


@cache
def _table() -> dict[str, str]:
    """Return the prototype of each character that has one.

    The library keeps Unicode's confusables.txt as pairs in both directions: a prototype is joined
    to each character that it stands for, and those to it alone. Of one pair that is joined to
    nothing else, the longer or the first is taken: which one makes no difference to equality.
    """
    table = {}
    for char, pairs in confusables_data.items():
        prototype = pairs[0]["c"]
        is_pair = len(pairs) == len(confusables_data[prototype]) == 1
        if len(pairs) > 1 or (is_pair and _prototype_rank(char) < _prototype_rank(prototype)):
            continue
        table[_unmarked(char)] = _unmarked(prototype)
    return table


def _prototype_rank(text: str) -> tuple[int, str]:
    text = _unmarked(text)
    return -len(text), text


def _unmarked(text: str) -> str:
    # the file has these around characters that are written from right to left
    return text.strip(LEFT_TO_RIGHT_MARK)
