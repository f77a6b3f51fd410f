"""What is looked up for a token, and what the answers mean."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from api.blocklist.ledger import (
    CLIENT,
    CLIENT_ENDED,
    JTI,
    NARROWED,
    ROLE,
    SCOPE,
    SID,
    USER,
    USER_ENDED,
    Found,
    Key,
)


class Verdict(enum.Enum):
    """What the blocklist says of a token."""

    VALID = "valid"
    REVOKED = "revoked"
    STALE = "stale"


def keys_of(claims: Mapping[str, Any]) -> tuple[Key, ...]:
    """Return what is to be looked up for a token, by its claims.

    ``jti``, ``sid``, ``sub`` and ``type`` are needed. A refresh token carries no rights, so no
    floor makes it stale.
    """
    sub, client_id = claims["sub"], claims.get("client_id")
    keys = [f"{JTI}:{claims['jti']}", f"{SID}:{claims['sid']}", f"{USER_ENDED}:{sub}"]
    if client_id is not None:
        keys.append(f"{CLIENT_ENDED}:{client_id}")
    if claims["type"] == "access":
        keys.append(f"{USER}:{sub}")
        if client_id is not None:
            keys.append(f"{CLIENT}:{client_id}")
        if "scope" in claims:
            keys.append(f"{SCOPE}:{NARROWED}")
        keys += [f"{ROLE}:{name}" for name in claims.get("roles", ())]
    return tuple(keys)


def verdict_of(
    claims: Mapping[str, Any], keys: tuple[Key, ...], found: Mapping[Key, Found]
) -> Verdict:
    """Return what the answers to ``keys_of`` mean. A token without a number counts as 0."""
    is_stale = False
    # most of the time there is nothing at all
    for key in keys if found else ():
        answer = found.get(key)
        if answer is None:
            continue
        kind = key.partition(":")[0]
        if kind in {JTI, SID}:
            return Verdict.REVOKED
        if kind in {USER_ENDED, CLIENT_ENDED}:
            has_ended = claims.get("opened_seq", 0) < answer.floor
            if has_ended and answer.exempt != claims["sid"]:
                return Verdict.REVOKED
        elif claims.get("seq", 0) < answer.floor:
            is_stale = True
    return Verdict.STALE if is_stale else Verdict.VALID
