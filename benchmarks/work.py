"""The work: which request a connection sends next."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import cycle

from benchmarks.contestants import Contestant
from benchmarks.load import CONNECTIONS, Next
from benchmarks.running import Running, login_message, message

MIX = {"protected": 90, "list": 5, "refresh": 4, "login": 1}


def same(one: Running) -> Next:
    """One token, over and over."""
    asking = message(one.contestant, "GET", one.contestant.protected, one.token)
    return lambda _number, _last: asking


def different(one: Running) -> Next:
    """Many tokens, in turn."""
    if one.contestant.is_limit:
        return same(one)
    paths = cycle([message(one.contestant, "GET", one.contestant.protected, t) for t in one.tokens])
    return lambda _number, _last: next(paths)


def login(one: Running) -> Next:
    """The same person signs in."""
    asking = login_message(one.contestant, "testuser")
    return lambda _number, _last: asking


def refresh(one: Running) -> Next:
    """Each connection goes on with the refresh token that its last answer brought."""
    contestant = one.contestant
    assert contestant.refresh is not None

    def following(number: int, last: bytes) -> bytes:
        if last and contestant.name == "Rolecall":
            one.refresh[number] = json.loads(last)["refresh_token"]
        token = one.refresh[number]
        if contestant.refresh_in_body:
            body = json.dumps({"refresh": token}).encode()
            return message(contestant, "POST", str(contestant.refresh), "", body)
        return message(contestant, "POST", str(contestant.refresh), token)

    return following


def listing(one: Running) -> Next:
    """Fifty users, for an administrator."""
    asking = message(one.contestant, "GET", str(one.contestant.users), one.admin)
    return lambda _number, _last: asking


def mix(one: Running) -> Next:
    """Each connection draws by the same seed; its refresh answers are kept for its next refresh."""
    kinds = {"protected": different(one), "list": listing(one), "login": login(one)}
    if one.contestant.refresh:
        kinds["refresh"] = refresh(one)
    draws = [random.Random(n) for n in range(CONNECTIONS)]
    last_kind = [""] * CONNECTIONS

    def following(number: int, last: bytes) -> bytes:
        body = last if last_kind[number] == "refresh" else b""
        if body and one.contestant.name == "Rolecall":
            one.refresh[number] = json.loads(body)["refresh_token"]
        (kind,) = draws[number].choices(list(MIX), list(MIX.values()))
        kind = kind if kind in kinds else "protected"
        last_kind[number] = kind
        return kinds[kind](number, b"")

    return following


MANY = "protected, 10,000 tokens"
FIRST_SIGHT = "protected, each token for the first time"
WORK: dict[str, Callable[[Running], Next]] = {
    "protected": same,
    MANY: different,
    "login": login,
    "refresh": refresh,
    "list of 50": listing,
    "mix": mix,
}


def can(one: Contestant, work: str) -> bool:
    """Return whether a contestant does this work at all."""
    if one.is_limit:
        return work.startswith("protected")
    return work != "refresh" or one.refresh is not None
