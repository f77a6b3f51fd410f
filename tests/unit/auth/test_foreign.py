"""Hashes of other systems: verified as they are, refused where they would cost too much."""

from __future__ import annotations

import argon2
import bcrypt
import pytest
from werkzeug.security import generate_password_hash

from api.auth import foreign

PASSWORD = "pä😀 correct-Harbour"
HASHES = {
    "argon2id": argon2.PasswordHasher(1, 64, 1).hash(PASSWORD),
    "argon2i": argon2.PasswordHasher(1, 64, 1, type=argon2.Type.I).hash(PASSWORD),
    "bcrypt": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode(),
    "pbkdf2": generate_password_hash(PASSWORD, "pbkdf2:sha256:1000"),
    "scrypt": generate_password_hash(PASSWORD, "scrypt:1024:8:1"),
}


@pytest.mark.parametrize("hashed", HASHES.values(), ids=HASHES)
def test_a_hash_is_verified_as_it_is(hashed: str) -> None:
    """The right password and no other."""
    assert foreign.refusal(hashed) is None
    assert foreign.verify(hashed, PASSWORD)
    assert not foreign.verify(hashed, PASSWORD + "x")
    assert not foreign.verify(hashed, PASSWORD.upper())


def test_bcrypt_looks_at_72_bytes_as_it_always_did() -> None:
    """A longer password is let in by its first 72 bytes until it is hashed anew."""
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    assert foreign.verify(hashed, "x" * 100)
    assert not foreign.verify(hashed, "x" * 71)


BAD = [
    "",
    "plain",
    "$1$abc$def",
    "$argon2id$nonsense",
    "md5$x$y",
    "pbkdf2:md5:1$a$" + "0" * 64,
    HASHES["bcrypt"][:-1],
    "$2b$31$" + HASHES["bcrypt"][7:],
    "$2b$03$" + HASHES["bcrypt"][7:],
    HASHES["argon2id"].replace("m=64", "m=99999999"),
    HASHES["argon2id"].replace("t=1", "t=999"),
    HASHES["pbkdf2"].replace("1000", "99999999"),
    HASHES["scrypt"].replace("1024:8:1", "1048576:8:16"),
    HASHES["scrypt"].replace("1024:8:1", "1000:8:1"),
    HASHES["scrypt"].replace("1024:8:1", "1024:0:1"),
    HASHES["argon2id"][:-1] + "é",
    HASHES["scrypt"].replace("1024:8:1", "2:1:1"),
    HASHES["pbkdf2"] + "\n",
]


# salted hashes make ids that differ from process to process
@pytest.mark.parametrize("hashed", BAD, ids=map(str, range(len(BAD))))
def test_what_is_no_hash_or_too_dear_is_refused(hashed: str) -> None:
    """With a reason; and what is unknown verifies nothing, and raises nothing."""
    assert foreign.refusal(hashed)
    if len(hashed) < 40:
        assert not foreign.verify(hashed, PASSWORD)


def test_what_a_library_cannot_read_is_wrong_and_no_error() -> None:
    """It has the looks of a hash: False, not an exception."""
    assert not foreign.verify(HASHES["argon2id"][:-1] + "é", PASSWORD)
    assert not foreign.verify("$2b$04$" + "." * 52 + "z", PASSWORD)
    assert not foreign.verify(HASHES["scrypt"].replace("1024:8:1", "2:1:1"), PASSWORD)
