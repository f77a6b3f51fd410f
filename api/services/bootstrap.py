"""What must be there before the first request: built-in roles, a first admin, demo accounts."""

from __future__ import annotations

from contextlib import suppress

from api.db import Database
from api.errors import StartupError, UsernameTaken, ValidationFailed, WeakPassword
from api.services import delegation, holding, roles
from api.services.accounts import Accounts
from api.services.audit import SYSTEM
from api.services.users import Users

DEMO_ACCOUNTS = (
    ("testuser", "testpass", (holding.USER,)),
    ("admin", "adminpass", (holding.ADMIN, holding.USER)),
)


async def prepare(
    database: Database,
    accounts: Accounts,
    users: Users,
    *,
    demo: bool,
    public: bool,
    admin_username: str | None,
    admin_password: str | None,
) -> None:
    """Make what is missing; what is there is left as it is.

    ``public``: other machines can reach the service. ``StartupError`` where they could sign in
    with a demo account, or the first admin cannot be made.
    """
    async with database.write() as session:
        await roles.ensure_built_in(session)
        has_admin = await delegation.has_active_admin(session)
    if not demo and public and await _demo_accounts_open(accounts):
        raise StartupError(
            "The demo accounts are still in this database, with passwords that everybody knows: "
            "disable them (`rolecall users deactivate testuser`, then admin), or use another "
            "database."
        )
    if demo:
        for username, password, names in DEMO_ACCOUNTS:
            with suppress(UsernameTaken):
                await users.create(
                    username, password, None, names, SYSTEM, checked=False, may_be_reserved=True
                )
    elif admin_username and admin_password and not has_admin:
        await _first_admin(users, admin_username, admin_password)


async def _first_admin(users: Users, username: str, password: str) -> None:
    try:
        await users.create(
            username, password, None, (holding.ADMIN, holding.USER), SYSTEM, may_be_reserved=True
        )
    except WeakPassword as error:
        reasons = " ".join(error.extra["reasons"])
        raise StartupError(f"ROLECALL_ADMIN_PASSWORD is too weak: {reasons}") from None
    except ValidationFailed as error:
        reasons = " ".join(one["message"] for one in error.extra["errors"])
        raise StartupError(f"ROLECALL_ADMIN_USERNAME cannot be used: {reasons}") from None
    except UsernameTaken:
        raise StartupError(
            "ROLECALL_ADMIN_USERNAME is the name of an account that is no admin, or looks like the "
            "name of another account: choose another, "
            "or make it one with `rolecall users set-roles`."
        ) from None


async def _demo_accounts_open(accounts: Accounts) -> bool:
    checks = [await accounts.opens(name, password) for name, password, _ in DEMO_ACCOUNTS]
    return any(checks)
