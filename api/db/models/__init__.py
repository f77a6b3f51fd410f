"""The tables. Ids are UUIDv7 (sortable by time of making); times are aware and in UTC."""

from api.db.models.audit import AuditEvent, AuditSeal
from api.db.models.base import Base, new_id, table_of
from api.db.models.clients import Client, ClientRole, ClientSecret
from api.db.models.keys import SigningKey
from api.db.models.ledger import Revocation
from api.db.models.roles import Role, RoleInclude, RolePermission, UserRole
from api.db.models.sessions import Session
from api.db.models.users import User

__all__ = [
    "AuditEvent",
    "AuditSeal",
    "Base",
    "Client",
    "ClientRole",
    "ClientSecret",
    "Revocation",
    "Role",
    "RoleInclude",
    "RolePermission",
    "Session",
    "SigningKey",
    "User",
    "UserRole",
    "new_id",
    "table_of",
]
