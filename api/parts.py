"""The parts of a running Rolecall, as views, guards and the CLI find them."""

from __future__ import annotations

from dataclasses import dataclass

from flask import current_app

from api.auth.counts import RedisCounts
from api.auth.keys import KeyRing
from api.auth.passwords import Passwords
from api.blocklist import Blocklist
from api.db import Database
from api.services.accounts import Accounts
from api.services.audit_log import AuditLog
from api.services.audit_rate import RepeatedEvents
from api.services.change_limit import ChangeLimit
from api.services.cleanup import Cleanup
from api.services.client_access import ClientAccess
from api.services.clients import Clients
from api.services.roles import Roles
from api.services.rotations import Rotations
from api.services.sessions import Sessions
from api.services.signing_keys import SigningKeys
from api.services.transfer import Transfer
from api.services.users import Users
from api.settings import Settings

EXTENSION = "rolecall"


@dataclass(frozen=True, slots=True)
class Parts:
    """Made once per process by ``api/app.py``; everything in it lives on one event loop."""

    settings: Settings
    database: Database
    blocklist: Blocklist
    keys: KeyRing
    passwords: Passwords
    counts: RedisCounts
    sessions: Sessions
    rotations: Rotations
    accounts: Accounts
    roles: Roles
    users: Users
    audit_log: AuditLog
    repeated_events: RepeatedEvents
    transfer: Transfer
    signing_keys: SigningKeys
    clients: Clients
    client_access: ClientAccess
    change_limit: ChangeLimit
    cleanup: Cleanup


def parts() -> Parts:
    """Return the parts of the current application."""
    found: Parts = current_app.extensions[EXTENSION]
    return found
