"""Background work left over by changes that affect many rows, done in batches.

Nothing that anybody may do depends on it: sessions that have ended are refused, and roles that were
deleted are held by nobody, before it begins. A batch is one transaction; a worker that stops leaves
the rest to the next batch, of whichever worker.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import delete, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from api.db import Database, db_now
from api.db.models import CleanupTask, Role, RoleInclude, Session, UserRole
from api.services.delegation import lock_role_assignments
from api.services.floors import CLIENT_SESSIONS, DELETED, USER_SESSIONS

ROLE = "role"
# In one transaction.
TASKS_AT_ONCE = 100


class Cleanup:
    """Does what is left to be done, a batch at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def batch(self, most: int) -> int:
        """Do up to ``most`` rows of the oldest tasks. Return how many, ``most`` if more is left."""
        if not await self._database.rows(select(CleanupTask.id).limit(1)):
            return 0
        left = most
        async with self._database.write() as session:
            query = select(CleanupTask).order_by(CleanupTask.id).limit(TASKS_AT_ONCE)
            tasks = (await session.scalars(query.with_for_update(skip_locked=True))).all()
            if any(task.kind == ROLE for task in tasks):
                # before any other row: an assignment must not be moved while somebody changes it
                await lock_role_assignments(session)
            for task in tasks:
                work = _role if task.kind == ROLE else _sessions
                done = await work(session, task, left)
                if done == left:
                    return most
                await session.delete(task)
                left -= done
        return most if len(tasks) == TASKS_AT_ONCE else most - left


async def _sessions(session: AsyncSession, task: CleanupTask, most: int) -> int:
    """End, or delete, the sessions of a user or a client app that a floor has ended."""
    whose = {USER_SESSIONS: Session.user_id, CLIENT_SESSIONS: Session.client_id}[task.kind]
    query = select(Session.id).where(whose == task.subject).order_by(Session.id).limit(most)
    if task.position is not None:
        query = query.where(Session.id > task.position)
    ids = list(await session.scalars(query))
    if not ids:
        return 0
    ended: Any = Session.id.in_(ids) & (Session.opened_seq < task.seq)
    if task.reason == DELETED:
        await session.execute(delete(Session).where(ended))
    else:
        await session.execute(
            update(Session)
            .where(ended, Session.revoked_at.is_(None))
            .values(revoked_at=db_now(), revoked_reason=task.reason)
            .execution_options(synchronize_session=False)
        )
    task.position = ids[-1]
    return len(ids)


async def _role(session: AsyncSession, task: CleanupTask, most: int) -> int:
    """Give users of a deleted role what they hold in its place; drop the role after the last."""
    held = UserRole.role_id == task.subject
    query = select(UserRole.user_id).where(held).order_by(UserRole.user_id).limit(most)
    ids = list(await session.scalars(query))
    for included in await session.scalars(
        select(RoleInclude.included_id).where(RoleInclude.role_id == task.subject)
    ):
        await _give(session, ids, included)
    await session.execute(delete(UserRole).where(held, UserRole.user_id.in_(ids)))
    if len(ids) < most:
        await session.execute(delete(Role).where(Role.id == task.subject))
    return len(ids)


async def _give(session: AsyncSession, user_ids: list[UUID], role_id: UUID) -> None:
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    insert: Any = sqlite.insert if is_sqlite else postgresql.insert
    theirs = select(UserRole.user_id, literal(role_id, UserRole.role_id.type))
    theirs = theirs.where(UserRole.user_id.in_(user_ids)).distinct()
    await session.execute(
        insert(UserRole).from_select(["user_id", "role_id"], theirs).on_conflict_do_nothing()
    )
