"""Signing keys that are next, current, old or retired.

The newest key there is becomes the current one; whatever else verified goes on for a while.

Revision: 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from api.db.types import db_now

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Longer than a session lives, whatever its settings were: the default is 30 days.
OTHERS_VERIFY_SECONDS = 90 * 86_400
COLUMNS = ("activated_at", "replaced_at", "verifies_until")

KEYS = sa.table(
    "signing_keys",
    sa.column("kid", sa.String()),
    *(sa.column(name, sa.DateTime(timezone=True)) for name in ("created_at", "retired_at")),
    sa.column("private", sa.LargeBinary()),
    *(sa.column(name, sa.DateTime(timezone=True)) for name in COLUMNS),
)


def upgrade() -> None:
    with op.batch_alter_table("signing_keys") as table:
        for name in COLUMNS:
            table.add_column(sa.Column(name, sa.DateTime(timezone=True), nullable=True))
        table.alter_column("private", existing_type=sa.LargeBinary(), nullable=True)
    active = KEYS.c.retired_at.is_(None)
    newest = sa.select(KEYS.c.kid).where(active).order_by(KEYS.c.created_at.desc()).limit(1)
    current = op.get_bind().scalar(newest)
    op.execute(KEYS.update().values(activated_at=KEYS.c.created_at))
    op.execute(KEYS.update().where(~active).values(private=None))
    op.execute(
        KEYS.update()
        .where(active, KEYS.c.kid != (current or ""))
        .values(replaced_at=db_now(), verifies_until=db_now(OTHERS_VERIFY_SECONDS))
    )


def downgrade() -> None:
    # without its private half a key is nothing to the code before
    op.execute(KEYS.delete().where(KEYS.c.private.is_(None)))
    # and the newest signs there: it must not be one that nobody has used yet
    op.execute(KEYS.delete().where(KEYS.c.activated_at.is_(None)))
    with op.batch_alter_table("signing_keys") as table:
        table.alter_column("private", existing_type=sa.LargeBinary(), nullable=False)
        for name in COLUMNS:
            table.drop_column(name)
