"""A generation of a session: what its access token and its refresh token are made from.

Functions here run within a transaction of the caller's, in SQLAlchemy's own greenlet
(``Database.run``, ``AsyncSession.run_sync``): a greenlet for each statement costs too much where
people sign in and refresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BindParameter, Row, Select, bindparam, select

from api.db import Executor, sequence
from api.db.models import Session, User, table_of
from api.errors import TokenRevoked
from api.services import holding
from api.services.client_terms import ClientTerms, terms
from api.services.holding import Holding

TABLE = table_of(Session)
SESSIONS, USERS = TABLE.c, table_of(User).c
SIDS: BindParameter[Sequence[UUID]] = bindparam("sids", expanding=True)
# What a grant is made from, of a session's columns.
GRANTED = (
    SESSIONS.id, SESSIONS.user_id, SESSIONS.client_id, SESSIONS.current_jti, SESSIONS.opened_seq,
    SESSIONS.idle_expires_at, SESSIONS.expires_at,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grant:
    """What the tokens of one generation of a session are made from.

    ``seq`` is the authorization sequence as it was before the rights were read, ``opened_seq`` as
    it was when the session was opened.
    """

    sid: UUID
    user_id: UUID
    username: str
    version: int
    seq: int
    opened_seq: int
    holding: Holding
    refresh_jti: str
    refresh_expires_at: datetime
    client: ClientTerms | None = None
    scope: tuple[str, ...] | None = None


def granted(
    db: Executor,
    row: Row[Any],
    scope: tuple[str, ...] | None = None,
    grant_type: str | None = None,
) -> Grant:
    """Return the grant of a session, a row with the columns ``GRANTED``.

    ``grant_type`` is what its client app uses at /oauth/token. Raises ``TokenRevoked`` where that
    or the user is no more, ``InvalidScope``, ``UnauthorizedClient``: nothing is spent.
    """
    # before anything that the tokens will say: what changes later makes them stale
    before = sequence.current(db) if row.client_id else None
    through = terms(db, row.client_id) if row.client_id else None
    if row.client_id and through is None:
        # disabled in this moment
        raise TokenRevoked
    if through is not None and grant_type is not None:
        through.ensure_grant(grant_type)
    bearer = holding.bearer(db, row.user_id, within=row.client_id)
    held = holding.narrowed(bearer.holding, scope, is_user=True)
    if scope is not None:
        audiences = through.audiences if through else ()
        holding.refuse_long_scope(bearer.username, held, scope, audiences)
    return Grant(
        sid=row.id,
        user_id=row.user_id,
        username=bearer.username,
        version=bearer.version,
        seq=bearer.seq if before is None else before,
        opened_seq=row.opened_seq,
        holding=held,
        refresh_jti=row.current_jti,
        refresh_expires_at=row.idle_expires_at,
        client=through,
        scope=scope,
    )


def granted_together(db: Executor, sids: Sequence[UUID]) -> dict[str, Grant]:
    """Return the grants of many sessions, of no client app, by the ids of refresh tokens."""
    rows = db.execute(GRANTED_MANY, {"sids": sids}).all()
    return {grant.refresh_jti: grant for grant in _grants(rows)}


def _granted_many() -> Select[Any]:
    """Select sessions, their users and what these hold: a row for each permission, or one."""
    asked = SESSIONS.id.in_(SIDS)
    users = select(SESSIONS.user_id).where(asked)
    held = holding.all_held(holding.GIVEN.user_id.in_(users)).subquery()
    return (
        select(
            *GRANTED,
            USERS.username,
            USERS.version,
            # in one statement, which sees one moment: no later than what is held
            sequence.CURRENT.scalar_subquery().label("seq"),
            held.c.name,
            held.c.permission,
        )
        .select_from(TABLE)
        .join(table_of(User), USERS.id == SESSIONS.user_id)
        .outerjoin(held, held.c.user_id == SESSIONS.user_id)
        .where(asked)
    )


def _grants(rows: Iterable[Row[Any]]) -> Iterator[Grant]:
    of_sessions: dict[UUID, list[Row[Any]]] = {}
    for row in rows:
        of_sessions.setdefault(row.id, []).append(row)
    for sid, (row, *more) in of_sessions.items():
        yield Grant(
            sid=sid,
            user_id=row.user_id,
            username=row.username,
            version=row.version,
            seq=row.seq,
            opened_seq=row.opened_seq,
            holding=holding.gathered((one.name, one.permission) for one in (row, *more)),
            refresh_jti=row.current_jti,
            refresh_expires_at=row.idle_expires_at,
        )


# Made once: building such a statement costs more than running it. Of tables, not of classes: rows
# are all that is wanted.
GRANTED_MANY = _granted_many()
