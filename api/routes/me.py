"""One's own account and sessions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from uuid import UUID

from flask_jwt_extended import get_jwt

from api import shapes
from api.errors import BadCredentials, NotFound, TooManyRequests, WeakPassword
from api.http import origin
from api.parts import parts
from api.services.sessions import SessionFilter
from schemas.users import (
    MeChangeSchema,
    MeSchema,
    PageQuerySchema,
    PasswordChangeSchema,
    SessionListSchema,
)


@shapes.answers(MeSchema)
async def show() -> Any:
    """Return the user whom the token speaks of."""
    claims = get_jwt()
    client_id = claims.get("client_id")
    return await parts().users.get(_me(), UUID(client_id) if client_id else None)


@shapes.body(MeChangeSchema)
@shapes.answers(MeSchema, errors=[TooManyRequests])
async def change(body: dict[str, Any]) -> Any:
    """Change one's address; twenty times in ``ROLECALL_LOGIN_WINDOW`` at most."""
    await parts().change_limit.count(_me())
    return await parts().accounts.set_email(_me(), body["email"], origin())


@shapes.body(PasswordChangeSchema)
@shapes.answers(None, 204, errors=[BadCredentials, WeakPassword, TooManyRequests])
async def change_password(body: dict[str, Any]) -> None:
    """Change one's password: every other session ends, this one stays."""
    await parts().accounts.change_password(
        _me(), UUID(get_jwt()["sid"]), body["current_password"], body["new_password"], origin()
    )


@shapes.query(PageQuerySchema)
@shapes.answers(SessionListSchema)
async def sessions(query: dict[str, Any]) -> Any:
    """Return one's live sessions, the newest first."""
    here = UUID(get_jwt()["sid"])
    page = await parts().sessions.page(
        SessionFilter(user_id=_me()), query["limit"], query["cursor"]
    )
    items = [{**asdict(session), "current": session.id == here} for session in page.items]
    return {"items": items, "next_cursor": page.next_cursor}


@shapes.answers(None, 204, errors=[NotFound])
async def end_session(session_id: UUID) -> None:
    """End one of one's sessions."""
    await parts().sessions.end_own(session_id, _me(), origin())


def _me() -> UUID:
    return UUID(get_jwt()["sub"])
