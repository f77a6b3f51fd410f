"""Client apps, their roles and secrets; sessions know through which one they were opened.

Revision: 0004.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

THROUGH_ONE = sa.text("client_id IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "clients",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("is_public", sa.Boolean(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("audiences", sa.JSON(), nullable=False),
        sa.Column("grants", sa.JSON(), nullable=False),
        sa.Column("access_token_expires", sa.Integer(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_clients")),
    )
    op.create_table(
        "client_roles",
        sa.Column("client_id", sa.Uuid(), nullable=False),
        sa.Column("role_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["client_id"], ["clients.id"], name=op.f("fk_client_roles_client_id_clients"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["role_id"], ["roles.id"], name=op.f("fk_client_roles_role_id_roles"),
            ondelete="RESTRICT",
        ),
        sa.PrimaryKeyConstraint("client_id", "role_id", name=op.f("pk_client_roles")),
    )  # fmt: skip
    op.create_index(op.f("ix_client_roles_role_id"), "client_roles", ["role_id"])
    op.create_table(
        "client_secrets",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("client_id", sa.Uuid(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["client_id"], ["clients.id"], name=op.f("fk_client_secrets_client_id_clients"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_client_secrets")),
    )  # fmt: skip
    op.create_index(op.f("ix_client_secrets_client_id"), "client_secrets", ["client_id"])
    with op.batch_alter_table("sessions") as table:
        table.add_column(sa.Column("client_id", sa.Uuid(), nullable=True))
        table.create_foreign_key(
            op.f("fk_sessions_client_id_clients"), "clients", ["client_id"], ["id"],
            ondelete="CASCADE",
        )  # fmt: skip
    op.create_index(
        "ix_sessions_client_id", "sessions", ["client_id"],
        sqlite_where=THROUGH_ONE, postgresql_where=THROUGH_ONE,
    )  # fmt: skip


def downgrade() -> None:
    # what was opened through a client would come back with all of its user's roles
    op.execute(sa.text("DELETE FROM sessions WHERE client_id IS NOT NULL"))
    op.drop_index("ix_sessions_client_id", "sessions")
    with op.batch_alter_table("sessions") as table:
        table.drop_constraint(op.f("fk_sessions_client_id_clients"), type_="foreignkey")
        table.drop_column("client_id")
    for name in ("client_secrets", "client_roles", "clients"):
        op.drop_table(name)
