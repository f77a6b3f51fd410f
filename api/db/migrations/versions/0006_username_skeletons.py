"""No new username is confusable with that of another user.

Revision: 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

# As the service computes it: what is stored here is compared with what is computed there.
from api.services.usernames import skeleton

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

AT_ONCE = 1_000
USERS = sa.table(
    "users",
    sa.column("id", sa.Uuid()),
    sa.column("username", sa.String()),
    sa.column("username_skeleton", sa.String()),
)


def upgrade() -> None:
    op.add_column("users", sa.Column("username_skeleton", sa.String(length=512), nullable=True))
    op.create_index("ix_users_username_skeleton", "users", ["username_skeleton"], unique=True)
    last = None
    while last := _fill_after(last):
        pass


def _fill_after(last: object) -> object:
    """Give the next users their skeletons; return the last of them, None where there are none.

    Of users whose names are confusable already the first has it. The others keep their names.
    """
    connection = op.get_bind()
    query = sa.select(USERS.c.id, USERS.c.username).order_by(USERS.c.id).limit(AT_ONCE)
    users = connection.execute(query.where(USERS.c.id > last) if last else query).all()
    if not users:
        return None
    first: dict[str, object] = {}
    for user in users:
        first.setdefault(skeleton(user.username), user.id)
    taken = connection.scalars(
        sa.select(USERS.c.username_skeleton).where(USERS.c.username_skeleton.in_(first))
    )
    for one in taken.all():
        del first[one]
    if first:
        connection.execute(
            sa.update(USERS)
            .where(USERS.c.id == sa.bindparam("user"))
            .values(username_skeleton=sa.bindparam("found")),
            [{"user": user, "found": found} for found, user in first.items()],
        )
    return users[-1].id


def downgrade() -> None:
    op.drop_index("ix_users_username_skeleton", "users")
    op.drop_column("users", "username_skeleton")
