"""The tables. Ids are UUIDv7 (sortable by time of making); times are aware and in UTC."""

from api.db.models.audit import AuditEvent, AuditSeal
from api.db.models.base import Base, new_id, table_of
from api.db.models.cleanup import CleanupTask
from api.db.models.clients import Client, ClientRole, ClientSecret
from api.db.models.keys import SigningKey
from api.db.models.ledger import (
    AuthorizationSequence,
    IndexWorker,
    Revocation,
    TransactionCounter,
)
from api.db.models.roles import DELETED_NAME, Role, RoleInclude, RolePermission, UserRole
from api.db.models.sessions import Session
from api.db.models.users import User

__all__ = [
    "DELETED_NAME",
    "AuditEvent",
    "AuditSeal",
    "AuthorizationSequence",
    "Base",
    "CleanupTask",
    "Client",
    "ClientRole",
    "ClientSecret",
    "IndexWorker",
    "Revocation",
    "Role",
    "RoleInclude",
    "RolePermission",
    "Session",
    "SigningKey",
    "TransactionCounter",
    "User",
    "UserRole",
    "new_id",
    "table_of",
]
