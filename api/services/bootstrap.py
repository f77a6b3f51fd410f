"""What must be there before the first request: built-in roles, a first admin, demo accounts."""

from __future__ import annotations

from api.db import Database
from api.errors import StartupError, UsernameTaken, WeakPassword
from api.services import roles
from api.services.accounts import Accounts
from api.services.audit import Origin

DEMO_ACCOUNTS = (
    ("testuser", "testpass", (roles.USER,)),
    ("admin", "adminpass", (roles.ADMIN, roles.USER)),
)


async def prepare(
    database: Database,
    accounts: Accounts,
    *,
    demo: bool,
    admin_username: str | None,
    admin_password: str | None,
) -> None:
    """Make what is missing; what is there is left as it is."""
    async with database.write() as session:
        await roles.ensure_built_in(session)
        has_admin = await session.scalar(roles.active_admins().limit(1)) is not None
    if demo:
        for username, password, names in DEMO_ACCOUNTS:
            await _make(accounts, username, password, names, checked=False)
    elif admin_username and admin_password and not has_admin:
        await _first_admin(accounts, admin_username, admin_password)


async def _first_admin(accounts: Accounts, username: str, password: str) -> None:
    try:
        await _make(accounts, username, password, (roles.ADMIN, roles.USER), checked=True)
    except WeakPassword as error:
        reasons = " ".join(error.extra["reasons"])
        raise StartupError(f"ROLECALL_ADMIN_PASSWORD is too weak: {reasons}") from None


async def _make(
    accounts: Accounts, username: str, password: str, names: tuple[str, ...], *, checked: bool
) -> None:
    try:
        await accounts.create(username, password, None, names, Origin(), checked=checked)
    except UsernameTaken:
        return
