"""Users taken in from, and given out as, JSON lines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
from marshmallow import ValidationError
from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from api.auth import foreign
from api.auth.claims import LARGEST_COOKIE, cookie_bytes
from api.auth.passwords import Passwords
from api.db import Database
from api.db.models import Role, RoleInclude, User, UserRole, new_id
from api.services import audit, holding
from api.services.audit import Origin
from api.services.delegation import lock_role_assignments
from api.services.usernames import fold, skeleton
from schemas.users import UserImportSchema

AT_ONCE = 500
# A whole file is one transaction, unless it is taken in part by part.
LONGEST_SECONDS = 3_600.0
CHANGED = "A name was taken or a role deleted meanwhile: try again."


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not taken in; numbers begin at 1."""

    number: int
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class Imported:
    """How many users were made, and the lines that were not."""

    made: int
    bad: list[BadLine]


class RolesChanged(Exception):
    """A role was deleted, or has grown, since the lines were checked."""


class Transfer:
    """Import and export of users. Nobody's session is touched."""

    def __init__(self, database: Database, passwords: Passwords) -> None:
        self._database = database
        self._passwords = passwords

    async def take_in(
        self,
        lines: Iterable[bytes],
        origin: Origin,
        *,
        partial: bool = False,
        progress: Callable[[int], None] = lambda _lines: None,
    ) -> Imported:
        """Make a user of each line; where one is bad, of none, unless ``partial``."""
        seen: set[str] = set()
        made, bad = 0, []
        async with self._database.read() as session:
            known = select(Role.name, Role.id).where(Role.deleted_at.is_(None))
            roles = {row.name: row.id for row in await session.execute(known)}
        batches: list[list[dict[str, Any]]] = []
        for batch in _batched(lines):
            good, faults = await self._check(batch, roles, seen)
            bad += faults
            if partial or not bad:
                # beforehand: nothing is hashed while a transaction is open
                for user in good:
                    if "password" in user:
                        user["password_hash"] = await self._passwords.hash(user.pop("password"))
            if partial and good:
                try:
                    async with self._database.write() as session:
                        made += await self._make(session, good, roles, origin)
                except (IntegrityError, RolesChanged):
                    bad += [BadLine(user["number"], [CHANGED]) for user in good]
            elif not bad:
                batches.append(good)
            progress(len(batch))
        if partial or bad:
            return Imported(made, bad)
        try:
            async with self._database.write(LONGEST_SECONDS) as session:
                for good in batches:
                    made += await self._make(session, good, roles, origin)
        except (IntegrityError, RolesChanged):
            return Imported(0, [BadLine(0, [CHANGED])])
        return Imported(made, bad)

    async def give_out(self) -> AsyncIterator[bytes]:
        """Yield a line for each user, the oldest first, with the password's hash."""
        last: UUID | None = None
        while True:
            query = select(User).order_by(User.id).limit(AT_ONCE)
            async with self._database.read() as session:
                users = (
                    await session.scalars(query.where(User.id > last) if last else query)
                ).all()
                given = await _given(session, [user.id for user in users])
            for user in users:
                yield orjson.dumps(
                    {
                        "username": user.username, "email": user.email,
                        "is_active": user.is_active, "roles": sorted(given.get(user.id, ())),
                        "password_hash": user.password_hash,
                    }
                ) + b"\n"  # fmt: skip
            if len(users) < AT_ONCE:
                return
            last = users[-1].id

    async def _check(
        self, batch: Sequence[tuple[int, bytes]], roles: dict[str, UUID], seen: set[str]
    ) -> tuple[list[dict[str, Any]], list[BadLine]]:
        good, bad = [], []
        for number, line in batch:
            user, reasons = _read(line)
            if user is not None:
                user["key"] = fold(user["username"])
                reasons += _faults(user, roles, seen)
                seen.add(user["key"])
            if reasons or user is None:
                bad.append(BadLine(number, reasons))
            else:
                good.append(user | {"number": number})
        keys = [user["key"] for user in good]
        async with self._database.read() as session:
            for named in {frozenset(user["roles"]) for user in good}:
                held = await holding.role_holding(session, [roles[name] for name in named])
                _refuse_large(named, held, good, bad)
            found = await session.scalars(
                select(User.username_key).where(User.username_key.in_(keys))
            )
            taken = set(found)
        for user in [user for user in good if user["key"] in taken]:
            bad.append(BadLine(user["number"], ["username: Is taken."]))
            good.remove(user)
        return good, bad

    async def _make(
        self,
        session: AsyncSession,
        users: Sequence[dict[str, Any]],
        roles: dict[str, UUID],
        origin: Origin,
    ) -> int:
        await lock_role_assignments(session)
        for named in {frozenset(user["roles"]) for user in users}:
            ids = [roles[name] for name in named]
            left = select(func.count()).where(Role.id.in_(ids), Role.deleted_at.is_(None))
            held = await holding.role_holding(session, ids)
            theirs = [user for user in users if set(user["roles"]) == named]
            if await session.scalar(left) != len(ids) or not all(_fits(u, held) for u in theirs):
                raise RolesChanged
        rows, given = [], []
        skeletons = await _free_skeletons(session, [user["username"] for user in users])
        for user in users:
            row = {
                "id": new_id(), "username": user["username"], "username_key": user["key"],
                "username_skeleton": skeletons.get(user["username"]),
                "email": user["email"], "password_hash": user["password_hash"],
                "is_active": user["is_active"],
            }  # fmt: skip
            rows.append(row)
            given += [{"user_id": row["id"], "role_id": roles[n]} for n in set(user["roles"])]
        await session.execute(insert(User), rows)
        if given:
            await session.execute(insert(UserRole), given)
        for row in rows:
            audit.record(session, "user.imported", origin, target=row["id"])
        return len(rows)


def _batched(lines: Iterable[bytes]) -> Iterable[list[tuple[int, bytes]]]:
    batch: list[tuple[int, bytes]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            batch.append((number, line))
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(line: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        user: dict[str, Any] = SCHEMA.load(orjson.loads(line))
    except ValidationError as error:
        return None, sorted(_told(error.messages))
    except ValueError:
        return None, ["It is not JSON."]
    return user, []


def _told(messages: Any, path: str = "") -> Iterable[str]:
    if isinstance(messages, dict):
        for name, inner in messages.items():
            yield from _told(inner, "" if name == "_schema" else f"{path}{name}: ")
    elif isinstance(messages, list):
        for message in messages:
            yield from _told(message, path)
    else:
        yield f"{path}{messages}"


def _faults(user: dict[str, Any], roles: dict[str, UUID], seen: set[str]) -> list[str]:
    reasons = [f"roles: There is no role {n!r}." for n in sorted(set(user["roles"]) - roles.keys())]
    if user["key"] in seen:
        reasons.append("username: Is in the file twice.")
    if "password_hash" in user and (why := foreign.refusal(user["password_hash"])):
        reasons.append(f"password_hash: {why}")
    return reasons


def _refuse_large(
    named: frozenset[str], held: holding.Holding, good: list[dict[str, Any]], bad: list[BadLine]
) -> None:
    """Move those whose token would not fit in a cookie from ``good`` to ``bad``."""
    for user in [user for user in good if set(user["roles"]) == named and not _fits(user, held)]:
        bad.append(BadLine(user["number"], ["roles: Together they do not fit in a token."]))
        good.remove(user)


def _fits(user: dict[str, Any], held: holding.Holding) -> bool:
    return cookie_bytes(user["username"], held.roles, held.permissions) <= LARGEST_COOKIE


async def _free_skeletons(session: AsyncSession, usernames: Sequence[str]) -> dict[str, str]:
    """Return the skeletons by username, but those that another user has, here or in the table.

    People have these names already: they are not refused, but nobody else gets the like of them.
    """
    first: dict[str, str] = {}
    for username in usernames:
        first.setdefault(skeleton(username), username)
    taken = await session.scalars(
        select(User.username_skeleton).where(User.username_skeleton.in_(first))
    )
    for one in taken.all():
        first.pop(one or "", None)
    return {username: one for one, username in first.items()}


async def _given(session: AsyncSession, user_ids: Sequence[UUID]) -> dict[UUID, list[str]]:
    theirs = UserRole.user_id.in_(user_ids)
    direct = select(UserRole.user_id, Role.name).join(Role, Role.id == UserRole.role_id)
    # what is held in place of a role that was deleted
    deleted = aliased(Role)
    replaced = (
        select(UserRole.user_id, Role.name)
        .join(deleted, deleted.id == UserRole.role_id)
        .join(RoleInclude, RoleInclude.role_id == deleted.id)
        .join(Role, Role.id == RoleInclude.included_id)
        .where(deleted.deleted_at.is_not(None))
    )
    rows = await session.execute(
        direct.where(theirs, Role.deleted_at.is_(None)).union(replaced.where(theirs))
    )
    given: dict[UUID, list[str]] = {}
    for user_id, name in rows:
        given.setdefault(user_id, []).append(name)
    return given


SCHEMA = UserImportSchema()
