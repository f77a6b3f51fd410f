"""Compact JWS (RFC 7515 section 7.1): written, and read in one way or not at all.

Signatures are PyJWT's algorithms'. What it would parse once more, and leniently, is parsed here:
no member twice, no NaN, base64url in its one spelling, no extension, 8 KiB at most.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

import jwt

from api.auth.keypairs import Key
from api.errors import InvalidToken

LARGEST_TOKEN = 8_192
# Whoever sends these asks for what is not done here (RFC 7515 section 4.1.11, RFC 7797).
MUST_UNDERSTAND = {"crit", "b64"}
COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Compact:
    """A token taken apart. Nothing in it is to be believed before ``is_signed_by``."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes
    signature: bytes

    def is_signed_by(self, algorithm: str, public: Any) -> bool:
        """Return whether the signature is that key's; the algorithm is ours to say."""
        return jwt.get_algorithm_by_name(algorithm).verify(self.signed, public, self.signature)


def parse(token: str) -> Compact:
    """Take a token apart. Raises ``InvalidToken``."""
    match = COMPACT.fullmatch(token) if len(token) <= LARGEST_TOKEN else None
    if match is None:
        raise InvalidToken
    try:
        header, claims, signature = (_decoded(part) for part in match.groups())
        parsed = [
            json.loads(part.decode(), object_pairs_hook=_once, parse_constant=_refuse)
            for part in (header, claims)
        ]
    except (ValueError, RecursionError):
        raise InvalidToken from None
    if not all(isinstance(part, dict) for part in parsed) or MUST_UNDERSTAND & parsed[0].keys():
        raise InvalidToken
    return Compact(parsed[0], parsed[1], token.rpartition(".")[0].encode(), signature)


def write(key: Key, header: bytes, claims: bytes) -> str:
    """Return the token with these two as JSON, signed by ``key``."""
    signing_input = _encoded(header) + b"." + _encoded(claims)
    signature = jwt.get_algorithm_by_name(key.algorithm).sign(signing_input, key.private)
    return (signing_input + b"." + _encoded(signature)).decode()


def _encoded(part: bytes) -> bytes:
    return base64.urlsafe_b64encode(part).rstrip(b"=")


def _decoded(part: str) -> bytes:
    decoded = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if _encoded(decoded) != part.encode():
        raise ValueError("trailing bits")
    return decoded


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member given twice")
    return members


def _refuse(constant: str) -> None:
    raise ValueError(constant)
