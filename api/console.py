"""What every command of the command line needs: parts to work on, and words to say it in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

import click

from api import logs
from api.app import compose, opened
from api.embedded import EmbeddedRedis
from api.parts import Parts
from api.settings import Settings, load

T = TypeVar("T")
# In one page of a list.
MOST = 200


def with_parts(work: Callable[[Parts], Awaitable[T]]) -> T:
    """Run ``work`` on parts that are not opened: the database may lack its tables."""

    async def run() -> T:
        parts = compose(reachable(load()))
        try:
            return await work(parts)
        finally:
            await parts.blocklist.stop()
            parts.passwords.close()
            await parts.database.close()

    return asyncio.run(run())


def with_running(
    work: Callable[[Parts], Awaitable[T]], said: Callable[[T], str] | None = None
) -> None:
    """Run ``work`` on opened parts; what it takes back holds in every worker at once."""

    async def run() -> T:
        parts = compose(reachable(load()))
        async with opened(parts):
            return await work(parts)

    logs.configure("WARNING")
    result = asyncio.run(run())
    if said is not None:
        click.echo(said(result))


def reachable(settings: Settings) -> Settings:
    """Return settings with a Redis in them."""
    # beside a running `rolecall serve` its Redis answers; without one, the ledger is enough
    if settings.redis_url is not None:
        return settings
    return replace(settings, redis_url=EmbeddedRedis(settings.data_dir).url)


def listed(names: tuple[str, ...]) -> str:
    """Return names as a person reads them."""
    return ", ".join(names) or "-"


def moment(at: datetime | None) -> str:
    """Return a time in UTC as a person reads it."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "-"
