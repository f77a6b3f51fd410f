"""Usernames: which are confusable, which new ones are refused, and which ordinary ones are not."""

from __future__ import annotations

import unicodedata

import pytest

from api.errors import ValidationFailed
from api.services.usernames import RESERVED, fold, refuse_deceptive, refuse_reserved, skeleton

ORDINARY = (
    "ann", "O'Brien-7", "user01@example.org", "José", "Zoë", "Nguyễn", "Łukasz", "Þór", "Işık",
    "İpek", "Привет", "Їжак", "Ἀθηνᾶ", "ᾧδε",
    "محمد", "مُحَمَّد", "يوسف٣", "שָׁלוֹם", "नमस्ते", "मोहन २", "ไทยนี้",
    "한글", "山田", "山田たろう", "ヤマダ・タロー",
    "山田Taro", "한글kim", "中文ㄓㄨㄥ", "ქართული", "Հայ", "ann 👍",
)  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_name_is_possible(name: str) -> None:
    """In one script, or in those that one language writes together, with its marks and digits."""
    name = unicodedata.normalize("NFKC", name)
    refuse_deceptive(name)
    refuse_reserved(name)
    assert 0 < len(skeleton(name)) <= 512


@pytest.mark.parametrize(
    "name",
    [
        "\u0430dmin",  # Cyrillic a
        "adm\u0456n",  # Cyrillic i
        "\u0391nn",  # Greek Alpha
        "Привеt",
        "山田Иван",
        "한글ひら",
        "ㄓひら",
        "a\u0660\u06f0",  # the digits zero of two scripts
        "1\u0661",
        "an\u2800n",  # Braille blank
        "\u2800",
        "a" + "\u0300\u0301\u0302\u0303",
        "a\u0323\u0323",
        "a\u20dd",
        "\u0301ann",
        "ש\u05b0\u05b1\u05b2\u05b3\u05b4",
    ],
)
def test_a_deceptive_name_is_refused(name: str) -> None:
    """Scripts or digits that are mixed, what cannot be seen, marks on marks."""
    with pytest.raises(ValidationFailed) as refused:
        refuse_deceptive(unicodedata.normalize("NFKC", name))
    (error,) = refused.value.extra["errors"]
    assert error["field"] == "username"
    assert name not in error["message"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("scope", "\u0455\u0441\u043e\u0440\u0435"),  # all Cyrillic
        ("paul", "pauI"),
        ("Paul", "PAu1"),
        ("bob", "b0b"),
        ("modem", "modern"),
        ("işık", "i\u0307şık"),
        ("ann", "a\u0274n"),  # small capital
        ("ann", "\U0001f170nn"),  # in a black square
        ("ann smith", "ann  smith"),
        ("ann", "\uff41nn"),
        ("口", "ロ"),
    ],
)
def test_confusable_names_have_one_skeleton(one: str, other: str) -> None:
    """Of two scripts, of one, and by case."""
    assert skeleton(one) == skeleton(other)


def test_other_names_have_other_skeletons() -> None:
    """No two of many ordinary names, nor of numbered ones, are confusable."""
    names = [*ORDINARY, *(f"user{n}" for n in range(2_000)), "jose", "zoe", "anna", "иван", "ivan"]
    assert len({skeleton(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name",
    [
        "admin", "ADMIN", "Admin", "adm1n", "ADMlN", "\uff41dmin", "adm\u0131n", "adm\u0130n",
        "a.d.m.i.n",
        "\u1d00\u1d05\u1d0d\u026a\u0274", "r00t", "R O O T", "supp\u00f6rt",
        "root_", "adrnin", *RESERVED,
    ],
)  # fmt: skip
def test_reserved_names_are_refused_in_any_guise(name: str) -> None:
    """Case, width, dots, accents, digits for letters, spaces between."""
    with pytest.raises(ValidationFailed) as refused:
        refuse_reserved(unicodedata.normalize("NFKC", name))
    assert refused.value.extra["errors"][0]["field"] == "username"


def test_every_character_has_a_skeleton_that_fits() -> None:
    """64 of any character are less than the column holds, on PostgreSQL's index too."""
    for number in [*range(0xD800), *range(0xE000, 0x110000)]:
        text = unicodedata.normalize("NFKC", chr(number))
        if len(text) == 1:
            found = skeleton(text)
            assert len(found) <= 8, hex(number)
            assert len(found.encode()) * 64 < 2_700, hex(number)


def test_folding_is_what_it_was() -> None:
    """Existing users sign in by it."""
    assert fold("\uff34e\u017ftUser") == "testuser"
