"""The life of a signing key: next, current, old, retired. Nothing is refused for a rotation.

- **next** is published and verifies, but signs nothing.
- **current** signs. It was next for ``PUBLISHED_SECONDS`` before: longer than the JWKS may be
  cached and than a worker takes to learn of a key. So no worker signs with a key that another
  one, or an application, could not verify, whenever each of them learns of the rotation.
- **old** verifies only, until every token that it can have signed has expired.
- **retired** is gone from the JWKS, refuses, and its private half is destroyed.

There is one next and one current key, of whatever algorithm: a changed JWT_ALGORITHM makes a next
key, which takes over once it has been published for long enough. What is due is decided by the
database's clock, in a transaction that one process at a time is in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.auth.keypairs import Safe, WrongSecret
from api.db import Database, db_now
from api.db.models import Session, SigningKey
from api.errors import Conflict, NotFound
from api.services import audit
from api.services.audit import Origin
from api.services.lifetimes import Lifetimes

log = structlog.get_logger("rolecall.keys")

ADVISORY_LOCK = 7_265_109
# How long applications may keep the JWKS (its max-age), and for how long a key is in it at the
# least before it signs: until every copy has it, and every worker.
JWKS_SECONDS = 300
PUBLISHED_SECONDS = JWKS_SECONDS + 60
# Clocks that stamp tokens may run ahead of the database's.
MARGIN = timedelta(seconds=60)
NOBODY = Origin()


@dataclass(frozen=True, slots=True)
class Standing:
    """The keys that are not retired, as they stand at ``now`` by the database's clock."""

    now: datetime
    keys: Sequence[SigningKey]

    @property
    def current(self) -> SigningKey | None:
        """The one that signs."""
        return self._first("current")

    @property
    def next(self) -> SigningKey | None:
        """The one that will sign."""
        return self._first("next")

    @property
    def expired(self) -> list[SigningKey]:
        """The old ones of which no token is left."""
        return [key for key in self.keys if key.verifies_until and key.verifies_until <= self.now]

    @property
    def ripe_at(self) -> datetime:
        """When the next key may sign: whoever verifies tokens has it by then."""
        since = self.next.created_at if self.next else self.now
        return since + timedelta(seconds=PUBLISHED_SECONDS)

    def _first(self, state: str) -> SigningKey | None:
        return next((key for key in self.keys if key.state == state), None)


class SigningKeys:
    """The keys in the database. Every change is one transaction, and audited."""

    def __init__(
        self,
        database: Database,
        secret: str,
        algorithm: str,
        lifetimes: Lifetimes,
        rotation_days: int = 0,
    ) -> None:
        self._database = database
        self.safe = Safe(secret)
        self._algorithm = algorithm
        self._lifetimes = lifetimes
        self._rotation = timedelta(days=rotation_days)

    async def read(self) -> Standing:
        """Return the keys that are not retired."""
        async with self._database.read() as session:
            return await _standing(session)

    async def all(self) -> Sequence[SigningKey]:
        """Return every key there ever was, the newest first."""
        async with self._database.read() as session:
            query = select(SigningKey).order_by(SigningKey.created_at.desc())
            return (await session.scalars(query)).all()

    def is_due(self, standing: Standing, *, starting: bool = False) -> bool:
        """Return whether ``keep`` would change something."""
        return bool(
            standing.expired
            or standing.current is None
            or self._lacks_next(standing, starting)
            or self._rotates_because(standing)
        )

    async def keep(self, *, starting: bool = False) -> None:
        """Do what is due: make keys that are missing, rotate by age, retire what has expired.

        ``starting``: this process has come to serve with its JWT_ALGORITHM. Raises
        ``WrongSecret``, having changed nothing.
        """
        if not self.is_due(await self.read(), starting=starting):
            return
        async with self._turn() as (session, standing):
            for key in standing.expired:
                _retire(session, key, standing.now, NOBODY, "expired")
            current = standing.current
            if current is None:
                current = await self._add(session, self._algorithm, standing.now)
            if self._lacks_next(standing, starting):
                if standing.next is not None:
                    _retire(session, standing.next, standing.now, NOBODY, "algorithm")
                wanted = self._algorithm if starting else current.algorithm
                await self._add(session, wanted)
            elif reason := self._rotates_because(standing):
                await self._promote(session, standing, NOBODY, reason)

    async def rotate(self, origin: Origin) -> SigningKey:
        """Let the next key sign and return it. ``Conflict`` where it is not known well enough."""
        async with self._turn() as (session, standing):
            if standing.ripe_at > standing.now:
                wait = (standing.ripe_at - standing.now).total_seconds()
                raise Conflict(
                    "Applications may not know the next key yet: it may sign in "
                    f"{wait:.0f} seconds. If the key that signs is in wrong hands, do not wait: "
                    "`rolecall keys rotate --now`."
                )
            return await self._promote(session, standing, origin, "asked")

    async def replace(self, origin: Origin) -> SigningKey:
        """Retire every key at once and return a new one that signs: some are in wrong hands.

        Every token there is will be refused. The next key goes too: it lay beside the others.
        """
        async with self._turn() as (session, standing):
            algorithm = standing.current.algorithm if standing.current else self._algorithm
            for key in standing.keys:
                _retire(session, key, standing.now, origin, "compromised")
            fresh = await self._add(session, algorithm, standing.now)
            await self._add(session, algorithm)
            audit.record(session, "key.rotated", origin, target=fresh.kid, reason="compromised")
            return fresh

    async def retire(self, kid: str, origin: Origin) -> None:
        """Refuse at once what ``kid`` signed. ``NotFound``; ``Conflict`` where it signs."""
        async with self._turn() as (session, standing):
            key = await session.get(SigningKey, kid)
            if key is None:
                raise NotFound(f"There is no key {kid}: see `rolecall keys list`.")
            if key.state == "retired":
                raise Conflict(f"The key {kid} is retired already.")
            if key.state == "current":
                raise Conflict(
                    f"The key {kid} is the only one that signs: `rolecall keys rotate` first, or "
                    "`rolecall keys rotate --now` if it is in wrong hands."
                )
            if key.state == "next":
                await self._add(session, key.algorithm)
            _retire(session, key, standing.now, origin, "asked")

    async def reseal(self, session: AsyncSession, former: str) -> int:
        """Seal what was kept under the secret ``former`` under ours; return how many keys.

        In the caller's transaction. Raises ``WrongSecret`` where neither opens a key.
        """
        await self._database.one_at_a_time(session, ADVISORY_LOCK)
        rows = await session.scalars(select(SigningKey).where(SigningKey.private.is_not(None)))
        count, safe = 0, Safe(former)
        for row in rows:
            try:
                self.safe.open(row)
            except WrongSecret:
                row.private = self.safe.seal(safe.open(row).private)
                count += 1
        return count

    def _lacks_next(self, standing: Standing, starting: bool) -> bool:
        found = standing.next
        # only who starts has a say: of two that run with two settings neither undoes the other's
        return found is None or (starting and found.algorithm != self._algorithm)

    def _rotates_because(self, standing: Standing) -> str | None:
        """Return why the next key should sign from now on."""
        current, following = standing.current, standing.next
        if current is None or following is None or standing.ripe_at > standing.now:
            return None
        if following.algorithm != current.algorithm:
            return "algorithm"
        since = current.activated_at
        if self._rotation and since and since + self._rotation <= standing.now:
            return "age"
        return None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[tuple[AsyncSession, Standing]]:
        """A transaction that is alone. Raises ``WrongSecret`` before anything can be written."""
        async with self._database.write() as session:
            await self._database.one_at_a_time(session, ADVISORY_LOCK)
            standing = await _standing(session)
            for key in standing.keys:
                await asyncio.to_thread(self.safe.open, key)
            yield session, standing

    async def _add(
        self, session: AsyncSession, algorithm: str, activated_at: datetime | None = None
    ) -> SigningKey:
        kid, private = await asyncio.to_thread(self.safe.make, algorithm)
        row = SigningKey(kid=kid, algorithm=algorithm, private=private, activated_at=activated_at)
        session.add(row)
        return row

    async def _promote(
        self, session: AsyncSession, standing: Standing, origin: Origin, reason: str
    ) -> SigningKey:
        former, following = standing.current, standing.next
        if former is None or following is None:
            raise RuntimeError("keep has not been awaited")
        former.replaced_at = following.activated_at = standing.now
        former.verifies_until = await self._last_expiry(session, standing.now)
        # of the kind that signs, not of this process's setting: see _lacks_next
        await self._add(session, following.algorithm)
        audit.record(
            session, "key.rotated", origin, target=following.kid, former=former.kid, reason=reason
        )
        log.info("key_rotated", kid=following.kid, former=former.kid, reason=reason)
        return following

    async def _last_expiry(self, session: AsyncSession, now: datetime) -> datetime:
        """Return when the last token made until ``now`` will be refused for its age."""
        lifetimes = self._lifetimes
        longest = now + timedelta(seconds=max(lifetimes.absolute, lifetimes.access))
        # sessions opened under longer lifetimes than today's
        latest = await session.scalar(select(func.max(Session.expires_at))) or longest
        return max(longest, latest) + timedelta(seconds=lifetimes.leeway) + MARGIN


async def _standing(session: AsyncSession) -> Standing:
    now = (await session.execute(select(db_now()))).scalar_one()
    query = select(SigningKey).where(SigningKey.retired_at.is_(None))
    rows = await session.scalars(query.order_by(SigningKey.created_at.desc()))
    return Standing(now, rows.all())


def _retire(
    session: AsyncSession, key: SigningKey, now: datetime, origin: Origin, reason: str
) -> None:
    key.retired_at, key.private = now, None
    audit.record(session, "key.retired", origin, target=key.kid, reason=reason)
