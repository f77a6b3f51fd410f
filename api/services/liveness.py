"""The one rule for a live session, as conditions on the table of sessions."""

from __future__ import annotations

from sqlalchemy import ColumnElement, exists

from api.db import db_now
from api.db.models import Client, Session, User


def live() -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for sessions that may be refreshed."""
    return not_expired(), *not_ended()


def not_expired() -> ColumnElement[bool]:
    """Return the condition for sessions within both of their lifetimes."""
    # idle_expires_at never passes expires_at: one comparison is both lifetimes
    return Session.idle_expires_at > db_now()


def not_ended() -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for sessions that nothing has ended.

    Neither one by one, nor all of a user or of a client app; both must be active.
    """
    user, client = (
        exists()
        .where(whose.id == of, whose.is_active, whose.ended_below <= Session.opened_seq)
        # the statement around it may ask for users too
        .correlate(Session)
        for whose, of in ((User, Session.user_id), (Client, Session.client_id))
    )
    return Session.revoked_at.is_(None), user, Session.client_id.is_(None) | client
