"""Who did what, and how much of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import orjson
from flask import Response, g, request

from api import shapes
from api.errors import Forbidden, Unavailable, ValidationFailed
from api.http import origin
from api.parts import parts
from api.services.audit_log import AuditFilter, AuditLog
from api.services.stats import stats as numbers
from schemas.audit import (
    AuditEventSchema,
    AuditListSchema,
    AuditQuerySchema,
    StatsQuerySchema,
    StatsSchema,
)

EVENT = AuditEventSchema()
NDJSON = "application/x-ndjson"
LONGEST_ACCEPT = 1_024


@shapes.query(AuditQuerySchema)
@shapes.answers(AuditListSchema)
async def index(query: dict[str, Any]) -> Any:
    """List audit rows, the newest first.

    With ``Accept: application/x-ndjson`` all of them, the oldest first, one a line, as a stream.
    """
    limit, cursor = query.pop("limit"), query.pop("cursor")
    which = AuditFilter(**query)
    if _wants_lines():
        if cursor is not None:
            raise ValidationFailed(
                errors=[{"field": "cursor", "message": "An export is not in pages."}]
            )
        return Response(_lines(parts().audit_log, which), mimetype=NDJSON)  # type: ignore[arg-type]
    return await parts().audit_log.page(which, limit, cursor)


@shapes.query(StatsQuerySchema)
@shapes.answers(StatsSchema)
async def stats(query: dict[str, Any]) -> Any:
    """Return the numbers of the last ``days``."""
    return await numbers(parts().database, query["days"])


async def note_refusals(response: Response) -> Response:
    """Write down who was refused which admin route; repeated refusals are counted."""
    if response.status_code != Forbidden.status or not request.path.startswith("/admin/"):
        return response
    if g.get("_jwt_extended_jwt"):
        with suppress(Unavailable):  # it is refused all the same
            await parts().repeated_events.note(
                "admin.refused",
                origin(),
                distinct_by=("method", "route"),
                method=request.method,
                route=request.url_rule.rule if request.url_rule else None,
            )
    return response


def _wants_lines() -> bool:
    # what is longer than any client's would take long to read
    if len(request.headers.get("Accept", "")) > LONGEST_ACCEPT:
        return False
    return request.accept_mimetypes.best_match(["application/json", NDJSON]) == NDJSON


async def _lines(log: AuditLog, which: AuditFilter) -> AsyncIterator[bytes]:
    async for rows in log.export(which):
        yield b"".join(orjson.dumps(EVENT.dump(row)) + b"\n" for row in rows)
