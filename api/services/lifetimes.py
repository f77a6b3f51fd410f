"""How long tokens and sessions live, and until when what was taken back must be refused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from api.services.client_terms import ClientTerms

# Longer than tokens live under settings that were changed since, or of client apps.
FLOOR_KEPT = timedelta(days=31)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """In seconds: of an access token, of an idle session, of any session, and the grace.

    ``leeway`` is how long after its ``exp`` a token is accepted still.
    """

    access: int
    idle: int
    absolute: int
    grace: int
    leeway: int = 0

    def of_access(self, terms: ClientTerms | None) -> timedelta:
        """Return how long an access token lives, of a client app or of none; never too long.

        Keys verify for as long as a session may last, and no longer.
        """
        wanted = (terms and terms.access_token_expires) or self.access
        return timedelta(seconds=min(wanted, max(self.access, self.absolute)))


def access_tokens_until(lifetimes: Lifetimes) -> datetime:
    """Return when the last access token made until now will be refused for its age."""
    return datetime.now(UTC) + timedelta(seconds=lifetimes.access + lifetimes.leeway)


def floor_until(lifetimes: Lifetimes) -> datetime:
    """Return how long a floor must stand: tokens made under longer lifetimes may still be out."""
    longest = max(lifetimes.absolute, lifetimes.access) + lifetimes.leeway
    return datetime.now(UTC) + max(timedelta(seconds=longest), FLOOR_KEPT)
