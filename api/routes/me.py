"""One's own account and sessions."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask_jwt_extended import get_jwt

from api import shapes
from api.errors import BadCredentials, NotFound, TooManyRequests, WeakPassword
from api.http import origin
from api.parts import parts
from schemas.users import MeChangeSchema, MeSchema, PasswordChangeSchema, SessionListSchema


@shapes.answers(MeSchema)
async def show() -> Any:
    """Return the user whom the token speaks of."""
    return await parts().accounts.get(_me())


@shapes.body(MeChangeSchema)
@shapes.answers(MeSchema)
async def change(body: dict[str, Any]) -> Any:
    """Change one's address."""
    return await parts().accounts.set_email(_me(), body["email"], origin())


@shapes.body(PasswordChangeSchema)
@shapes.answers(None, 204, errors=[BadCredentials, WeakPassword, TooManyRequests])
async def change_password(body: dict[str, Any]) -> None:
    """Change one's password: every other session ends, this one stays."""
    await parts().accounts.change_password(
        _me(), UUID(get_jwt()["sid"]), body["current_password"], body["new_password"], origin()
    )


@shapes.answers(SessionListSchema)
async def sessions() -> dict[str, Any]:
    """Return one's live sessions, the newest first."""
    here = UUID(get_jwt()["sid"])
    found = await parts().sessions.of_user(_me())
    return {
        "items": [
            {
                "id": session.id,
                "current": session.id == here,
                "created_at": session.created_at,
                "last_used_at": session.last_used_at,
                "expires_at": session.idle_expires_at,
                "ip": session.ip,
                "user_agent": session.user_agent,
            }
            for session in found
        ],
        "next_cursor": None,
    }


@shapes.answers(None, 204, errors=[NotFound])
async def end_session(session_id: UUID) -> None:
    """End one of one's sessions."""
    await parts().sessions.end(session_id, _me(), origin(), reason="ended")


def _me() -> UUID:
    return UUID(get_jwt()["sub"])
