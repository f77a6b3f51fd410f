"""``rolecall``: serve, look after the database, the accounts and the roles.

Passwords are prompted for (or read from standard input where it is no terminal), never arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import click

from api import logs, metrics
from api.app import compose
from api.auth.keys import LEARNT_SECONDS
from api.blocklist import OTHER_INDEX
from api.cli_clients import clients
from api.console import MOST, listed, moment, with_parts, with_running
from api.db import migrate
from api.embedded import EmbeddedRedis
from api.errors import Refused, StartupError
from api.parts import Parts
from api.server import serve as serve_workers
from api.services import bootstrap, housekeeping, reencryption
from api.services.audit import SYSTEM
from api.services.audit_log import Verification
from api.services.reencryption import Reencrypted
from api.services.roles import ensure_built_in
from api.services.transfer import Imported
from api.services.users import UserFilter
from api.settings import SUPERVISOR_ONLY, Settings, is_loopback, load

T = TypeVar("T")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rolecall")
def cli() -> None:
    """A self-hosted auth API: role claims in tokens that can be taken back."""


@cli.command()
@click.option("--bind", help="HOST:PORT, [::1]:PORT or unix:PATH; overrides ROLECALL_BIND.")
@click.option("--workers", type=int, help="Processes; overrides ROLECALL_WORKERS.")
@click.option("--demo", is_flag=True, help="Make the demo accounts; loopback only.")
def serve(bind: str | None, workers: int | None, demo: bool) -> None:
    """Migrate, then serve until told to stop."""
    for name, value in (("ROLECALL_BIND", bind), ("ROLECALL_WORKERS", workers)):
        if value is not None:
            os.environ[name] = str(value)
    settings = load(demo=demo)
    for name in SUPERVISOR_ONLY:
        # child processes inherit what is here
        os.environ.pop(name, None)
    logs.configure(settings.log_level)
    with _redis_for(settings) as redis_url:
        settings = replace(settings, redis_url=redis_url)
        asyncio.run(_prepare(settings))
        with (
            metrics.shared_folder(settings.data_dir) as numbers,
            metrics.served(settings.metrics_bind, numbers),
        ):
            code = serve_workers(
                bind=settings.bind,
                workers=settings.workers,
                environment=_for_workers(settings) | {metrics.FOLDER: str(numbers)},
                on_ready=lambda url: click.echo(_banner(url, demo=demo)),
            )
    sys.exit(code)


@cli.command()
def check() -> None:
    """Check the settings and the connections: exit code 1 and the reason where one fails."""
    settings = load()
    logs.configure("WARNING")
    click.echo("settings   ok")

    async def look(parts: Parts) -> None:
        here, head = await migrate.current(parts.database)
        state = "ok" if here == head else f"at {here or 'none'}, the code at {head}"
        click.echo(f"database   {state} ({parts.database.dialect})")
        if here != head:
            raise StartupError("Run `rolecall db upgrade`.")
        await parts.keys.load()
        click.echo("keys       ok")
        if await parts.blocklist.is_other_index():
            raise StartupError(f"Redis: {OTHER_INDEX}. Give every node the same REDIS_URL.")
        if settings.redis_url is None:
            click.echo("redis      embedded, started by `rolecall serve`")
            return
        await _ping(parts)
        click.echo("redis      ok")

    with_parts(look)


@cli.group()
def db() -> None:
    """The database's schema."""


@db.command("upgrade")
@click.argument("revision", default="head")
def db_upgrade(revision: str) -> None:
    """Apply the migrations that are missing; at the head, make the built-in roles too."""

    async def upgrade(parts: Parts) -> None:
        await migrate.upgrade(parts.database, revision)
        if revision == "head":
            # so that accounts can be made or imported before the first start
            async with parts.database.write() as session:
                await ensure_built_in(session)

    with_parts(upgrade)


@db.command("downgrade")
@click.argument("revision")
def db_downgrade(revision: str) -> None:
    """Go back to REVISION; `base` removes everything."""
    with_parts(lambda parts: migrate.downgrade(parts.database, revision))


@db.command("revision")
@click.argument("message")
def db_revision(message: str) -> None:
    """Write a migration from what the models say and the database lacks."""
    with_parts(lambda parts: migrate.revision(parts.database, message))


@cli.group()
def users() -> None:
    """Accounts."""


@users.command("create")
@click.argument("username")
@click.option("--email")
@click.option("--role", "roles", multiple=True, default=["user"], show_default=True)
def users_create(username: str, email: str | None, roles: tuple[str, ...]) -> None:
    """Make an account."""
    from marshmallow import ValidationError

    from schemas.auth import RegisterSchema

    try:
        body = RegisterSchema().load(
            {"username": username, "password": _password(), "email": email}
        )
    except ValidationError as error:
        raise StartupError(f"That account cannot be made: {error.messages}") from None
    with_running(
        lambda parts: parts.users.create(
            body["username"],
            body["password"],
            body["email"],
            roles,
            SYSTEM,
            may_be_reserved=True,
        ),
        lambda user: f"Made {user.username} ({user.id}) with the roles {listed(user.roles)}.",
    )


@users.command("list")
@click.option("-q", "q", help="Part of the username or the address.")
def users_list(q: str | None) -> None:
    """List accounts, the oldest first."""

    async def show(parts: Parts) -> None:
        cursor = None
        while True:
            page = await parts.users.page(UserFilter(q=q), MOST, cursor)
            for user in page.items:
                state = "active" if user.is_active else "disabled"
                click.echo(f"{user.id}  {state:8}  {user.username}  {listed(user.roles)}")
            if (cursor := page.next_cursor) is None:
                return

    with_running(show)


@users.command("set-password")
@click.argument("username")
def users_set_password(username: str) -> None:
    """Set a password and end every session of that account."""
    password = _password()

    async def change(parts: Parts) -> None:
        user = await parts.users.find(username)
        await parts.users.set_password(user.id, password, SYSTEM)

    with_running(change, lambda _: f"The password of {username} is set; its sessions are over.")


@users.command("set-roles")
@click.argument("username")
@click.argument("roles", nargs=-1, required=True)
def users_set_roles(username: str, roles: tuple[str, ...]) -> None:
    """Give an account exactly ROLES; its tokens are stale from now on."""

    async def change(parts: Parts) -> Any:
        user = await parts.users.find(username)
        return await parts.users.set_roles(user.id, roles, SYSTEM)

    with_running(change, lambda user: f"{user.username} has the roles {listed(user.roles)}.")


@users.command("deactivate")
@click.argument("username")
def users_deactivate(username: str) -> None:
    """Disable an account and end its sessions."""

    async def change(parts: Parts) -> None:
        user = await parts.users.find(username)
        await parts.users.deactivate(user.id, SYSTEM)

    with_running(change, lambda _: f"{username} is disabled; its sessions are over.")


@users.command("logout")
@click.argument("username")
def users_logout(username: str) -> None:
    """End every session of an account."""

    async def change(parts: Parts) -> int:
        user = await parts.users.find(username)
        return await parts.sessions.end_all_of(user.id, SYSTEM)

    with_running(change, lambda ended: f"Ended {ended} sessions of {username}.")


@users.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--partial", is_flag=True, help="Take the good lines in though others are bad.")
def users_import(file: BinaryIO, partial: bool) -> None:
    """Make users of the JSON lines in FILE (``-`` is standard input), all of them or none.

    A line is {"username", "password_hash" or "password", "email"?, "roles"?, "is_active"?}; hashes
    of argon2, bcrypt and Werkzeug are taken, and replaced when their users sign in.
    """
    lines = file.readlines()

    async def take_in(parts: Parts) -> Imported:
        with click.progressbar(length=len(lines), label="Reading", file=sys.stderr) as bar:
            return await parts.transfer.take_in(lines, SYSTEM, partial=partial, progress=bar.update)

    done = with_parts(take_in)
    for line in sorted(done.bad, key=lambda line: line.number):
        click.echo(f"line {line.number}: {' '.join(line.reasons)}", err=True)
    if done.bad and not partial:
        raise StartupError(f"{len(done.bad)} lines are bad, so nobody was taken in.")
    click.echo(f"Made {done.made} users; {len(done.bad)} lines were bad.")
    sys.exit(1 if done.bad else 0)


@users.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def users_export(file: Path) -> None:
    """Write every user to FILE as JSON lines, password hashes included; it is made 0600."""

    async def give_out(parts: Parts) -> int:
        count = 0
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            async for line in parts.transfer.give_out():
                out.write(line)
                count += 1
        return count

    try:
        click.echo(f"Wrote {with_parts(give_out)} users to {file}.")
    except OSError as error:
        raise StartupError(f"{file} cannot be written: {error.strerror}.") from None


@cli.group()
def roles() -> None:
    """Roles and what they permit."""


@roles.command("list")
def roles_list() -> None:
    """List the roles."""

    async def show(parts: Parts) -> None:
        cursor = None
        while True:
            page = await parts.roles.page(MOST, cursor)
            for role in page.items:
                held = listed(role.permissions)
                click.echo(f"{role.name:20}  {held:30}  {role.description}")
            if (cursor := page.next_cursor) is None:
                return

    with_running(show)


cli.add_command(clients)


@cli.group()
def blocklist() -> None:
    """What was taken back: the ledger, and Redis that answers for it."""


@blocklist.command("status")
def blocklist_status() -> None:
    """Show how many entries there are, and how Redis stands."""

    async def show(parts: Parts) -> None:
        report = await parts.blocklist.report()
        entries = sum(report.entries.values())
        floors = entries - report.entries.get("sid", 0) - report.entries.get("jti", 0)
        click.echo(
            f"entries         {entries} ({report.entries.get('sid', 0)} sessions, "
            f"{report.entries.get('jti', 0)} tokens, {floors} floors)"
        )
        if report.fault:
            click.echo(f"redis           away: {report.fault}; the database answers")
            return
        trusted = f"trusted for {report.lease_seconds:.1f} s more"
        click.echo(f"server          {report.server}")
        click.echo(f"index           {', '.join(sorted(report.trusted)) or 'none'}")
        click.echo(f"lease           {trusted if report.lease_seconds else 'none: untrusted'}")
        if report.is_other_index:
            click.echo(f"fault           {OTHER_INDEX}; the database answers here")

    with_parts(show)


@blocklist.command("rebuild")
def blocklist_rebuild() -> None:
    """Load the whole ledger into Redis anew; requests are answered by the database meanwhile."""

    async def rebuild(parts: Parts) -> None:
        await _ping(parts)
        logs.configure("INFO")
        await parts.blocklist.rebuild()
        report = await parts.blocklist.report()
        click.echo(f"Loaded; {sum(report.entries.values())} entries.")

    with_parts(rebuild)


@blocklist.command("prune")
def blocklist_prune() -> None:
    """Forget the entries whose tokens have all expired."""
    with_parts(_prune)


async def _prune(parts: Parts) -> None:
    click.echo(f"Forgot {await housekeeping.in_batches(parts.blocklist.prune)} entries.")


@cli.group()
def keys() -> None:
    """The keys that sign tokens."""


@keys.command("list")
def keys_list() -> None:
    """List every key there ever was, the newest first."""

    async def show(parts: Parts) -> None:
        for key in await parts.signing_keys.all():
            since, what = {
                "next": (key.created_at, "published"),
                "current": (key.activated_at, "signs since"),
                "old": (key.verifies_until, "verifies until"),
                "retired": (key.retired_at, "retired"),
            }[key.state]
            click.echo(f"{key.kid}  {key.algorithm:5}  {key.state:7}  {what} {moment(since)}")

    with_running(show)


@keys.command("rotate")
@click.option("--now", is_flag=True, help="A key is in wrong hands: retire all of them at once.")
def keys_rotate(now: bool) -> None:
    """Let the next key sign; the one before goes on verifying until its tokens have expired.

    With --now everybody has to sign in again, once every worker has learnt of it: in seven seconds.
    """

    async def rotate(parts: Parts) -> None:
        keys = parts.signing_keys
        key = await (keys.replace(SYSTEM) if now else keys.rotate(SYSTEM))
        click.echo(f"The key {key.kid} signs.")
        if now:
            await _learnt()
            click.echo("Every key before is retired: everybody has to sign in again.")

    with_running(rotate)


@keys.command("retire", context_settings={"ignore_unknown_options": True})
@click.argument("kid")
def keys_retire(kid: str) -> None:
    """Refuse every token that KID signed; the key that signs cannot be retired.

    It is done, and said so, once every worker has learnt of it: in seven seconds.
    """

    async def retire(parts: Parts) -> None:
        await parts.signing_keys.retire(kid, SYSTEM)
        await _learnt()
        click.echo(f"The key {kid} is retired; its tokens are refused.")

    with_running(retire)


async def _learnt() -> None:
    click.echo(f"Waiting {LEARNT_SECONDS:.0f} seconds, until every worker has learnt of it.")
    await asyncio.sleep(LEARNT_SECONDS)


@keys.command("reencrypt")
@click.option("--former", type=click.File(), help="A file that holds the former SECRET_KEY.")
def keys_reencrypt(former: TextIO | None) -> None:
    """Take what was kept under the former SECRET_KEY over to the one that is set now.

    That is the signing keys, the secrets of client apps and the audit log's seals. Stop the
    service first. The former secret is read from --former, from SECRET_KEY_OLD, or asked for.
    """
    secret = _former_secret(former)

    async def take_over(parts: Parts) -> Reencrypted:
        return await reencryption.reencrypt(
            parts.database, parts.signing_keys, parts.clients, parts.audit_log, secret, SYSTEM
        )

    done = with_parts(take_over)
    click.echo(
        f"Took over {done.keys} keys, {done.clients} secrets of client apps and {done.seals} seals "
        "of the audit log."
    )
    if done.faults:
        click.echo(f"{done.faults} seals did not hold and still do not: rolecall audit verify.")


@cli.group()
def audit() -> None:
    """Who did what."""


@audit.command("verify")
def audit_verify() -> None:
    """Follow the chain of seals: exit code 1 where a row was altered or removed."""

    async def verify(parts: Parts) -> Verification:
        return await parts.audit_log.verify()

    found = with_parts(verify)
    until = f", until {found.sealed_until:%Y-%m-%d %H:%M:%S} UTC" if found.sealed_until else ""
    click.echo(f"sealed    {found.sealed} rows{until}")
    click.echo(f"head      {found.head}")
    click.echo(f"unsealed  {found.unsealed} rows")
    for fault in found.faults:
        click.echo(f"FAULT     seal {fault.seq}: row {fault.event_id or '?'} {fault.what}")
    if found.faults:
        sys.exit(1)
    click.echo("The chain holds.")


def main() -> None:
    """Run the command line: what is refused is one sentence and exit code 1, no traceback."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except StartupError as error:
        click.echo(f"rolecall: {error}", err=True)
        sys.exit(1)
    except Refused as refusal:
        click.echo(f"rolecall: {_explained(refusal)}", err=True)
        sys.exit(1)


@contextlib.contextmanager
def _redis_for(settings: Settings) -> Iterator[str]:
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    with EmbeddedRedis(settings.data_dir) as embedded:
        yield embedded.url


async def _prepare(settings: Settings) -> None:
    parts = compose(settings)
    try:
        await migrate.upgrade(parts.database)
        await parts.keys.load()
        await bootstrap.prepare(
            parts.database,
            parts.accounts,
            parts.users,
            demo=settings.demo,
            public=not is_loopback(settings.bind),
            admin_username=settings.admin_username,
            admin_password=settings.admin_password,
        )
    finally:
        await parts.blocklist.stop()
        parts.passwords.close()
        await parts.database.close()


def _for_workers(settings: Settings) -> dict[str, str]:
    # workers read the environment too; this is what the command line and the parent decided
    return {
        "ROLECALL_DATA_DIR": str(settings.data_dir),
        "REDIS_URL": settings.redis_url or "",
        "JWT_COOKIE_SECURE": str(settings.cookie_secure).lower(),
    }


async def _ping(parts: Parts) -> None:
    try:
        await parts.blocklist.redis.ping()
    except Exception as error:  # noqa: BLE001  whatever it is, the operator is told
        raise StartupError(f"Redis does not answer: {error}. Check REDIS_URL.") from None


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    return password


def _former_secret(file: TextIO | None) -> str:
    try:
        secret: str = file.read().strip() if file else os.environ.get("SECRET_KEY_OLD", "")
        if not secret and not sys.stdin.isatty():
            secret = sys.stdin.readline().rstrip("\n")
        secret = secret or click.prompt("The former SECRET_KEY", hide_input=True)
        secret.encode()
    except UnicodeError:
        raise StartupError("The former SECRET_KEY is not text in UTF-8.") from None
    return secret


def _explained(refusal: Refused) -> str:
    faults = refusal.extra.get("errors") or []
    return " ".join([refusal.detail, *(fault["message"] for fault in faults)])


def _banner(url: str, *, demo: bool) -> str:
    lines = ["", f"  Rolecall serves on {url}", f"  Documentation:     {url}/docs"]
    if demo:
        lines += ["", "  Demo accounts (loopback only):"]
        lines += [
            f"    {username} / {password}  roles: {', '.join(names)}"
            for username, password, names in bootstrap.DEMO_ACCOUNTS
        ]
    return "\n".join([*lines, "", "  Ctrl-C stops it.", ""])


if __name__ == "__main__":
    main()
