"""What concerns many is one row: the authorization sequence, floors, and what they leave behind.

Revision: 0005.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Rows in memory at once.
AT_ONCE = 1_000
THROUGH_ONE = sa.text("client_id IS NOT NULL")
CLIENTS = sa.table("clients", sa.column("id", sa.Uuid()), sa.column("version", sa.Integer()))
SESSIONS = sa.table(
    "sessions",
    sa.column("id", sa.Uuid()),
    sa.column("revoked_at", sa.DateTime(timezone=True)),
    sa.column("expires_at", sa.DateTime(timezone=True)),
)
ENTRIES = sa.table(
    "revocations",
    sa.column("kind", sa.String()),
    sa.column("subject", sa.String()),
    sa.column("floor", sa.BigInteger()),
    sa.column("expires_at", sa.DateTime(timezone=True)),
)
ROLES = sa.table(
    "roles", sa.column("id", sa.Uuid()), sa.column("deleted_at", sa.DateTime(timezone=True))
)
USER_ROLES = sa.table(
    "user_roles", sa.column("user_id", sa.Uuid()), sa.column("role_id", sa.Uuid())
)
INCLUDES = sa.table(
    "role_includes", sa.column("role_id", sa.Uuid()), sa.column("included_id", sa.Uuid())
)


def upgrade() -> None:
    for name, first in (
        ("authorization_sequence", int(time.time() * 1000)),
        ("transaction_counter", 0),
    ):
        table = op.create_table(
            name,
            sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
            sa.Column("value", sa.BigInteger(), nullable=False),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
        )
        op.bulk_insert(table, [{"id": 1, "value": first}])
    op.create_table(
        "index_workers",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.Column("build", sa.String(length=32), nullable=True),
        sa.Column("snapshot", sa.Text(), nullable=True),
        sa.Column("heartbeats", sa.BigInteger(), nullable=False),
        sa.Column("host", sa.String(length=128), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("last_heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_index_workers")),
    )
    op.create_table(
        "cleanup_tasks",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=False),
        sa.Column("position", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cleanup_tasks")),
    )
    for name in ("users", "clients"):
        op.add_column(name, _number("ended_below"))
    op.add_column("roles", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.drop_index(op.f("ix_user_roles_role_id"), "user_roles")
    op.create_index("ix_user_roles_role_id_user_id", "user_roles", ["role_id", "user_id"])
    op.drop_index("ix_sessions_client_id", "sessions")
    with op.batch_alter_table("sessions") as sessions:
        sessions.drop_constraint(op.f("fk_sessions_user_id"), type_="foreignkey")
        sessions.drop_constraint(op.f("fk_sessions_client_id_clients"), type_="foreignkey")
        sessions.add_column(_number("opened_seq"))
    op.create_index(
        "ix_sessions_client_id_id", "sessions", ["client_id", "id"],
        sqlite_where=THROUGH_ONE, postgresql_where=THROUGH_ONE,
    )  # fmt: skip
    op.drop_index("ix_revocations_recorded_at", "revocations")
    with op.batch_alter_table("revocations") as revocations:
        revocations.alter_column("kind", type_=sa.String(length=16), existing_nullable=False)
        revocations.alter_column("subject", type_=sa.String(length=64), existing_nullable=False)
        revocations.alter_column("floor", type_=sa.BigInteger(), existing_nullable=False)
        revocations.drop_column("recorded_at")
        revocations.add_column(sa.Column("exempt", sa.String(length=36), nullable=True))
        revocations.add_column(_number("transaction_id"))
    op.create_index("ix_revocations_transaction_id", "revocations", ["transaction_id"])
    # existing tokens have no number, which counts as 0: a refresh repairs those that are stale
    for client_id in op.get_bind().scalars(sa.select(CLIENTS.c.id)).all():
        of_client = (ENTRIES.c.kind == "sub") & (ENTRIES.c.subject == str(client_id))
        op.execute(sa.update(ENTRIES).where(of_client).values(kind="client", floor=1))
    of_user = ENTRIES.c.kind == "sub"
    op.execute(sa.update(ENTRIES).where(of_user).values(kind="user", floor=1))


def downgrade() -> None:
    """Undo it. Everybody has to sign in again: the version before knows no floors."""
    _finish_role_deletions()
    _revoke_everything()
    op.drop_index("ix_revocations_transaction_id", "revocations")
    with op.batch_alter_table("revocations") as revocations:
        revocations.drop_column("transaction_id")
        revocations.drop_column("exempt")
        revocations.add_column(
            sa.Column(
                "recorded_at", sa.DateTime(timezone=True), nullable=False,
                server_default=sa.func.current_timestamp(),
            )
        )  # fmt: skip
        revocations.alter_column("floor", type_=sa.Integer(), existing_nullable=False)
        revocations.alter_column("subject", type_=sa.String(length=36), existing_nullable=False)
        revocations.alter_column("kind", type_=sa.String(length=3), existing_nullable=False)
    op.create_index("ix_revocations_recorded_at", "revocations", ["recorded_at"])
    op.drop_index("ix_sessions_client_id_id", "sessions")
    with op.batch_alter_table("sessions") as sessions:
        sessions.drop_column("opened_seq")
        for name, table in (("user_id", "users"), ("client_id", "clients")):
            suffix = "" if table == "users" else "_clients"
            sessions.create_foreign_key(
                op.f(f"fk_sessions_{name}{suffix}"), table, [name], ["id"], ondelete="CASCADE"
            )
    op.create_index(
        "ix_sessions_client_id", "sessions", ["client_id"],
        sqlite_where=THROUGH_ONE, postgresql_where=THROUGH_ONE,
    )  # fmt: skip
    op.drop_index("ix_user_roles_role_id_user_id", "user_roles")
    op.create_index(op.f("ix_user_roles_role_id"), "user_roles", ["role_id"])
    # not by a copy of the table, as SQLite's batches do: other tables refer to its rows
    op.drop_column("roles", "deleted_at")
    for name in ("users", "clients"):
        op.drop_column(name, "ended_below")
    for name in ("cleanup_tasks", "index_workers", "transaction_counter", "authorization_sequence"):
        op.drop_table(name)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")


def _finish_role_deletions() -> None:
    """Give the users of deleted roles what they hold in their place, and drop those roles."""
    deleted = sa.select(ROLES.c.id).where(ROLES.c.deleted_at.is_not(None))
    given = USER_ROLES.alias("given")
    held = (
        sa.select(given.c.user_id, INCLUDES.c.included_id)
        .join(INCLUDES, INCLUDES.c.role_id == given.c.role_id)
        .where(given.c.role_id.in_(deleted))
        .distinct()
    )
    has = sa.exists().where(
        USER_ROLES.c.user_id == given.c.user_id, USER_ROLES.c.role_id == INCLUDES.c.included_id
    )
    op.execute(sa.insert(USER_ROLES).from_select(["user_id", "role_id"], held.where(~has)))
    op.execute(sa.delete(USER_ROLES).where(USER_ROLES.c.role_id.in_(deleted)))
    op.execute(sa.delete(INCLUDES).where(INCLUDES.c.role_id.in_(deleted)))
    op.execute(sa.delete(ROLES).where(ROLES.c.deleted_at.is_not(None)))


def _revoke_everything() -> None:
    """Refuse every token that is out, as the version before does: by session, by ``ver``."""
    bind = op.get_bind()
    op.execute(sa.delete(ENTRIES).where(ENTRIES.c.kind.not_in(("jti", "sid"))))
    # those that were revoked one by one have their rows
    rows = sa.select(SESSIONS.c.id, SESSIONS.c.expires_at).where(SESSIONS.c.revoked_at.is_(None))
    rows = rows.order_by(SESSIONS.c.id).limit(AT_ONCE)
    page = bind.execute(rows).all()
    while page:
        _refuse("sid", [(sid, 0, until) for sid, until in page])
        page = bind.execute(rows.where(SESSIONS.c.id > page[-1].id)).all()
    op.execute(sa.update(CLIENTS).values(version=CLIENTS.c.version + 1))
    until = datetime.now(UTC) + timedelta(days=1, minutes=10)
    versions = bind.execute(sa.select(CLIENTS.c.id, CLIENTS.c.version)).all()
    _refuse("sub", [(client_id, version, until) for client_id, version in versions])
    op.execute(sa.delete(SESSIONS))


def _refuse(kind: str, entries: list[tuple[UUID, int, datetime]]) -> None:
    known = sa.select(ENTRIES.c.subject).where(
        ENTRIES.c.kind == kind, ENTRIES.c.subject.in_([str(subject) for subject, _, _ in entries])
    )
    present = set(op.get_bind().scalars(known))
    missing = [
        {"kind": kind, "subject": str(subject), "floor": floor, "expires_at": until}
        for subject, floor, until in entries
        if str(subject) not in present
    ]
    if missing:
        op.bulk_insert(ENTRIES, missing)
