"""Numbers for a dashboard, by one or two queries each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, ColumnElement, Float, case, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database, db_now
from api.db.models import AuditEvent, Client, Revocation, Session, User
from api.services.audit_log import OVERLAP, earliest_id

# Up to so many days are counted by the hour.
HOURLY_DAYS = 2
TOP = 10
# In the order of a bucket.
ACTIVITY = ("login", "login.failed", "token.issued", "client.refused")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sign-ins that succeeded and failed, tokens given to client apps and clients refused.

    From ``start`` until the next bucket's.
    """

    start: datetime
    logins: int
    failures: int
    client_tokens: int
    client_failures: int


@dataclass(frozen=True, slots=True)
class Stats:
    """``users`` and ``sessions`` by name of the count; ``top_failing`` by user and failures."""

    days: int
    bucket_seconds: int
    users: dict[str, int]
    sessions: dict[str, int]
    clients: dict[str, int]
    revocations: int
    activity: list[Bucket]
    top_failing: list[dict[str, Any]]


async def stats(database: Database, days: int) -> Stats:
    """Return the numbers of the last ``days``, to the hour where these are few."""
    seconds = 3_600 if days <= HOURLY_DAYS else 86_400
    async with database.read() as session:
        now: datetime = (await session.execute(select(db_now()))).scalar_one()
        last = int(now.timestamp()) // seconds * seconds
        starts = range(last - days * 86_400 + seconds, last + 1, seconds)
        since = datetime.fromtimestamp(starts[0], UTC)
        return Stats(
            days=days,
            bucket_seconds=seconds,
            users=await _users(session, since),
            sessions={"live": await _live_sessions(session)},
            clients=await _clients(session),
            revocations=await _count(session, Revocation.subject, Revocation.expires_at > db_now()),
            activity=await _activity(session, database.dialect, starts, seconds),
            top_failing=await _top_failing(session, since),
        )


async def _count(session: AsyncSession, column: Any, *where: ColumnElement[bool]) -> int:
    return await session.scalar(select(func.count(column)).where(*where)) or 0


async def _live_sessions(session: AsyncSession) -> int:
    live = (Session.revoked_at.is_(None), Session.idle_expires_at > db_now())
    return await _count(session, Session.id, *live)


async def _users(session: AsyncSession, since: datetime) -> dict[str, int]:
    row = (
        await session.execute(
            select(
                func.count(User.id),
                func.count(case((User.is_active, 1))),
                func.count(case((User.created_at >= since, 1))),
            )
        )
    ).one()
    return {"total": row[0], "active": row[1], "new": row[2]}


async def _clients(session: AsyncSession) -> dict[str, int]:
    return {
        "total": await _count(session, Client.id),
        "active": await _count(session, Client.id, Client.is_active.is_(True)),
    }


async def _activity(
    session: AsyncSession, dialect: str, starts: range, seconds: int
) -> list[Bucket]:
    at = AuditEvent.at
    epoch = func.extract("epoch", at) if dialect == "postgresql" else func.strftime("%s", at)
    bucket = (cast(func.floor(cast(epoch, Float) / seconds), BigInteger) * seconds).label("bucket")
    # a row may stand for many events that were repeated
    count = func.coalesce(AuditEvent.detail["count"].as_integer(), 1)
    rows = await session.execute(
        select(bucket, AuditEvent.action, func.sum(count))
        .where(AuditEvent.action.in_(ACTIVITY), *_since(starts[0]))
        .group_by(bucket, AuditEvent.action)
    )
    found = {(int(start), action): count for start, action, count in rows}
    return [
        Bucket(
            datetime.fromtimestamp(start, UTC),
            *(found.get((start, action), 0) for action in ACTIVITY),
        )
        for start in starts
    ]


async def _top_failing(session: AsyncSession, since: datetime) -> list[dict[str, Any]]:
    failures = func.count().label("failures")
    rows = (
        await session.execute(
            select(AuditEvent.target, failures)
            .where(
                AuditEvent.action == "login.failed",
                AuditEvent.target.is_not(None),
                *_since(int(since.timestamp())),
            )
            .group_by(AuditEvent.target)
            .order_by(failures.desc(), AuditEvent.target)
            .limit(TOP)
        )
    ).all()
    ids = [UUID(row.target) for row in rows]
    users = await session.execute(select(User.id, User.username).where(User.id.in_(ids)))
    names = {str(row.id): row.username for row in users}
    return [
        {"user_id": row.target, "username": names.get(row.target), "failures": row.failures}
        for row in rows
    ]


def _since(start: int) -> tuple[ColumnElement[bool], ...]:
    since = datetime.fromtimestamp(start, UTC)
    return AuditEvent.at >= since, AuditEvent.id >= earliest_id(since - OVERLAP)
