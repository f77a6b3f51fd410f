"""What must not be half done is finished, even when whoever asked for it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` in a task of its own; a cancelled caller leaves only after it has ended."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # `work` limits its own waiting, so this ends
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise
