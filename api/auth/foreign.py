"""Password hashes that other systems made: verified as they are, replaced at the next sign-in.

argon2 (PHC), bcrypt (``$2a$``, ``$2b$``, ``$2y$``), and Werkzeug's ``pbkdf2:…`` and ``scrypt:…``.
What a hash costs to verify is limited when it is taken in, since each sign-in pays it.
"""

from __future__ import annotations

import functools
import hashlib
import re

import argon2
import bcrypt
from argon2.exceptions import InvalidHashError, VerificationError
from werkzeug.security import check_password_hash

LARGEST_MEMORY_KIB = 1_048_576
LARGEST_TIME = 32
LARGEST_LANES = 16
BCRYPT = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}", re.ASCII)
LARGEST_BCRYPT_COST = 16
# bcrypt never looked further, so neither did whoever made the hash
BCRYPT_BYTES = 72
PBKDF2 = re.compile(
    r"pbkdf2:(sha1|sha256|sha512):(\d{1,8})\$[^$]{1,64}\$[0-9a-f]{32,128}", re.ASCII
)
LARGEST_ITERATIONS = 5_000_000
SCRYPT = re.compile(r"scrypt:(\d{1,8}):(\d{1,3}):(\d{1,2})\$[^$]{1,64}\$[0-9a-f]{128}", re.ASCII)
LARGEST_SCRYPT_BYTES = 256 * 1024 * 1024


def verify(hashed: str, password: str) -> bool:
    """Return whether ``password`` is the one; False for a hash of no kind that is known."""
    try:
        return _verify(hashed, password)
    except ValueError:
        # it has the looks of one, and the library cannot read it
        return False


def _verify(hashed: str, password: str) -> bool:
    if hashed.startswith("$argon2"):
        try:
            return argon2.PasswordHasher().verify(hashed, password)
        except (VerificationError, InvalidHashError):
            return False
    if BCRYPT.fullmatch(hashed):
        return bcrypt.checkpw(password.encode()[:BCRYPT_BYTES], hashed.encode())
    if PBKDF2.fullmatch(hashed) or SCRYPT.fullmatch(hashed):
        return check_password_hash(hashed, password)
    return False


def refusal(hashed: str) -> str | None:
    """Return why a hash is not taken in, None where it is."""
    if not hashed.isascii():
        return "It is no hash of a known kind."
    if hashed.startswith("$argon2"):
        return _argon2_refusal(hashed)
    dear = "It costs more to verify than is allowed."
    if found := BCRYPT.fullmatch(hashed):
        return None if 4 <= int(found[1]) <= LARGEST_BCRYPT_COST else dear
    if found := PBKDF2.fullmatch(hashed):
        return None if 1 <= int(found[2]) <= LARGEST_ITERATIONS else dear
    if found := SCRYPT.fullmatch(hashed):
        cost, block, lanes = (int(number) for number in found.groups())
        if cost < 2 or cost & (cost - 1) or not block or not lanes:
            return "It is no hash of a known kind."
        if 128 * cost * block * lanes > LARGEST_SCRYPT_BYTES:
            return dear
        return None if _can_scrypt(cost, block, lanes) else "Its parameters go beyond a limit."
    return "It is no hash of a known kind: argon2, bcrypt, pbkdf2 or scrypt."


@functools.cache
def _can_scrypt(cost: int, block: int, lanes: int) -> bool:
    # as Werkzeug calls it; what OpenSSL allows is its own affair
    try:
        hashlib.scrypt(b"", salt=b"", n=cost, r=block, p=lanes, maxmem=132 * cost * block * lanes)
    except ValueError:
        return False
    return True


def _argon2_refusal(hashed: str) -> str | None:
    try:
        found = argon2.extract_parameters(hashed)
    except InvalidHashError:
        return "It is no argon2 hash."
    if (
        found.memory_cost > LARGEST_MEMORY_KIB
        or found.time_cost > LARGEST_TIME
        or found.parallelism > LARGEST_LANES
    ):
        return "It costs more to verify than is allowed."
    return None
