"""The composition root: the only room with a door to every other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

import anyio.from_thread
from flask import Flask

from api import http, openapi, problems, routes
from api.asgi import AsyncFlask
from api.auth import tokens, transport
from api.auth.client_secrets import ClientSecrets
from api.auth.counts import RedisCounts
from api.auth.keys import KeyRing
from api.auth.passwords import Passwords
from api.auth.throttle import LoginThrottle, NetworkLimits
from api.blocklist import Blocklist, Verdict
from api.db import Database, migrate
from api.errors import StartupError
from api.json import StrictJSON
from api.parts import EXTENSION, Parts
from api.services.accounts import Accounts
from api.services.audit_log import AuditLog
from api.services.audit_rate import RepeatedEvents
from api.services.change_limit import ChangeLimit
from api.services.cleanup import Cleanup
from api.services.client_access import ClientAccess
from api.services.clients import Clients
from api.services.housekeeping import EVERY_SECONDS, counting, keeping_house, repeatedly
from api.services.lifetimes import Lifetimes
from api.services.roles import Roles
from api.services.rotations import Rotations
from api.services.sessions import Sessions
from api.services.signing_keys import SigningKeys
from api.services.transfer import Transfer
from api.services.users import Users
from api.settings import Settings


def create_app(settings: Settings) -> AsyncFlask:
    """Return the application; nothing is opened before its lifespan begins."""
    app = AsyncFlask("api", static_folder=None, lifespan=_lifespan)
    app.json = StrictJSON(app)
    # its redirects would take the client's word for the host, and tokens along
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["BODY_TIMEOUT"] = settings.body_timeout
    parts = compose(settings)
    app.extensions[EXTENSION] = parts
    transport.configure(app, settings)
    tokens.install(app, parts.keys)
    _let_bare_guards_ask(app, parts.blocklist)
    problems.install(app)
    http.install(app, settings)
    routes.install(app)
    app.extensions[openapi.EXTENSION] = cache(partial(openapi.text, app, routes.TABLE))
    return app


def compose(settings: Settings) -> Parts:
    """Make the parts and hand each to those that need it."""
    if settings.redis_url is None:
        raise StartupError(
            "REDIS_URL is not set: set it, or start with `rolecall serve`, which brings a Redis."
        )
    database = Database(settings.database_url)
    blocklist = Blocklist(database, settings.redis_url, prefix=settings.redis_prefix)
    passwords = Passwords(settings.argon2_memory_kib, settings.argon2_iterations)
    lifetimes = Lifetimes(
        access=settings.access_expires,
        idle=settings.refresh_expires,
        absolute=settings.session_max_age,
        grace=settings.refresh_grace,
        leeway=settings.leeway,
    )
    sessions = Sessions(database, blocklist, lifetimes)
    rotations = Rotations(database, blocklist, sessions, lifetimes)
    counts = RedisCounts(
        settings.redis_url, prefix=settings.redis_prefix, window=settings.login_window
    )
    throttle, clients_throttle = (
        LoginThrottle(
            counts,
            window=settings.login_window,
            pair=NetworkLimits.of(
                settings.login_failures_pair,
                settings.login_failures_pair_56,
                settings.login_failures_pair_48,
            ),
            account=settings.login_failures_account,
            address=NetworkLimits.of(
                settings.login_failures_address,
                settings.login_failures_address_56,
                settings.login_failures_address_48,
            ),
            namespace=namespace,
        )
        for namespace in ("login", "client")
    )
    change_limit = ChangeLimit(counts, window=settings.login_window)
    users = Users(database, blocklist, sessions, passwords)
    accounts = Accounts(
        database,
        blocklist,
        sessions,
        users,
        passwords,
        throttle,
        registration_open=settings.registration_open,
    )
    signing_keys = SigningKeys(
        database,
        settings.secret_key,
        settings.algorithm,
        lifetimes,
        rotation_days=settings.key_rotation_days,
    )
    keys = KeyRing(signing_keys)
    roles = Roles(database, blocklist, lifetimes)
    audit_log = AuditLog(database, settings.secret_key)
    repeated_events = RepeatedEvents(database)
    transfer = Transfer(database, passwords)
    secrets = ClientSecrets(settings.secret_key)
    clients = Clients(database, blocklist, sessions, secrets)
    client_access = ClientAccess(database, secrets, clients_throttle, repeated_events)
    return Parts(
        settings, database, blocklist, keys, passwords, counts, sessions, rotations, accounts,
        roles, users, audit_log, repeated_events, transfer, signing_keys, clients, client_access,
        change_limit, Cleanup(database),
    )  # fmt: skip


@asynccontextmanager
async def opened(parts: Parts) -> AsyncIterator[None]:
    """Open what the parts need and close it again. ``StartupError`` where that cannot be."""
    try:
        here, head = await migrate.current(parts.database)
        if here != head:
            raise StartupError(
                f"The database is at revision {here or 'none'} and the code at {head}: "
                "run `rolecall db upgrade`, or install the version that made the database."
            )
        await parts.keys.load()
        await parts.blocklist.start()
        async with (
            keeping_house(revocations=parts.blocklist.prune, sessions=parts.sessions.prune),
            repeatedly(parts.blocklist.sweep, EVERY_SECONDS),
            repeatedly(parts.cleanup.batch),
            repeatedly(parts.audit_log.seal),
            counting(parts.repeated_events),
        ):
            yield
    finally:
        await parts.rotations.stop()
        await parts.blocklist.stop()
        await parts.counts.stop()
        parts.passwords.close()
        await parts.database.close()


@asynccontextmanager
async def _lifespan(app: Flask) -> AsyncIterator[None]:
    parts: Parts = app.extensions[EXTENSION]
    async with opened(parts):
        await parts.keys.start()
        try:
            yield
        finally:
            await parts.keys.stop()


def _let_bare_guards_ask(app: Flask, blocklist: Blocklist) -> None:
    """Let flask-jwt-extended's own ``jwt_required`` see what was taken back.

    Its loader is called without being awaited. In a worker thread, where the bridge runs plain
    functions, it can wait for the loop; on the loop itself it cannot, and refuses with an error.
    """

    def taken_back(_header: dict[str, object], claims: dict[str, object]) -> bool:
        return anyio.from_thread.run(blocklist.check, claims) is not Verdict.VALID

    app.extensions["flask-jwt-extended"].token_in_blocklist_loader(taken_back)
