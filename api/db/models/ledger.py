"""The ledger of what was revoked: the truth that Redis is an index of."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Index, SmallInteger, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from api.db.models.base import Base
from api.db.types import db_now


class Revocation(Base):
    """One entry: a token (``jti``) or session (``sid``) that is revoked, or a floor.

    A floor of a user, a client app, a role (by its name) or of all tokens narrowed by a scope:
    access tokens with a lower ``seq`` are stale. The floor of a user or a client app of kind
    ``…_ended``: tokens of sessions with a lower ``opened_seq`` are revoked, but for the session
    ``exempt``.

    ``transaction_id`` is of the transaction that wrote it last. The row is deleted some time after
    ``expires_at``, when every token that it concerns has expired.
    """

    __tablename__ = "revocations"
    __table_args__ = (
        Index("ix_revocations_transaction_id", "transaction_id"),
        Index("ix_revocations_expires_at", "expires_at"),
    )

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    subject: Mapped[str] = mapped_column(String(64), primary_key=True)
    floor: Mapped[int] = mapped_column(BigInteger, default=0)
    exempt: Mapped[str | None] = mapped_column(String(36))
    expires_at: Mapped[datetime]
    transaction_id: Mapped[int] = mapped_column(BigInteger, default=0)


class IndexWorker(Base):
    """A running worker, and the Redis server that it trusts to know all of the ledger.

    ``run_id`` is that server's, None where it trusts none. Every transaction that ``snapshot``
    covers is in that server. ``heartbeats`` counts the updates of the row. ``host`` and ``pid``
    tell whether the process still runs.
    """

    __tablename__ = "index_workers"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    run_id: Mapped[str | None] = mapped_column(String(64))
    build: Mapped[str | None] = mapped_column(String(32))
    snapshot: Mapped[str | None] = mapped_column(Text)
    heartbeats: Mapped[int] = mapped_column(BigInteger, default=0)
    host: Mapped[str] = mapped_column(String(128))
    pid: Mapped[int]
    last_heartbeat_at: Mapped[datetime] = mapped_column(default=db_now())


class AuthorizationSequence(Base):
    """One row: the number that orders changes of what tokens may do (``api/db/sequence.py``)."""

    __tablename__ = "authorization_sequence"

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)


class TransactionCounter(Base):
    """One row: how many transactions asked for an id, on SQLite (``api/db/snapshot.py``)."""

    __tablename__ = "transaction_counter"

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)
