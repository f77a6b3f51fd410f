"""``rolecall clients``: client apps, and their secrets."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import click
from marshmallow import ValidationError

from api.console import CONSOLE, MOST, listed, moment, with_running
from api.errors import StartupError
from api.parts import Parts
from api.services.clients import ClientView, NewSecret
from schemas.clients import GRANTS, ClientCreateSchema


@click.group()
def clients() -> None:
    """Client apps: what may ask for tokens, and for which roles."""


@clients.command("list")
def clients_list() -> None:
    """List client apps, the oldest first."""

    async def show(parts: Parts) -> None:
        cursor = None
        while True:
            page = await parts.clients.page(MOST, cursor)
            for client in page.items:
                kind = "public" if client.public else "secret"
                state = kind if client.is_active else "off"
                roles = listed(client.allowed_roles)
                click.echo(f"{client.client_id}  {state:7}  {client.name:20}  {roles}")
            if (cursor := page.next_cursor) is None:
                return

    with_running(show)


@clients.command("create")
@click.argument("name")
@click.option("--role", "allowed_roles", multiple=True, help="A role that it may be given.")
@click.option("--audience", "audiences", multiple=True, help="Whom its tokens are meant for.")
@click.option(
    "--grant", "grants", multiple=True, type=click.Choice(GRANTS), help="What /oauth/token gives."
)
@click.option("--public", is_flag=True, help="It can keep no secret: a browser, a telephone.")
@click.option("--expires", "access_token_expires", type=int, help="Seconds; else the setting's.")
def clients_create(**wanted: Any) -> None:
    """Register a client app; its secret is printed this once."""
    wanted |= {name: list(wanted[name]) for name in ("allowed_roles", "audiences", "grants")}
    try:
        body = ClientCreateSchema().load(wanted)
    except ValidationError as error:
        raise StartupError(f"That client cannot be made: {error.messages}") from None

    def said(made: tuple[ClientView, str | None]) -> str:
        client, secret = made
        lines = [f"client_id      {client.client_id}"]
        return "\n".join([*lines, f"client_secret  {secret}"] if secret else lines)

    with_running(lambda parts: parts.clients.create(body, CONSOLE), said)


@clients.command("secret")
@click.argument("client_id", type=click.UUID)
@click.option("--revoke-previous", is_flag=True, help="The one before is refused at once.")
def clients_secret(client_id: UUID, revoke_previous: bool) -> None:
    """Make another secret; the one before is good for a day still."""

    def said(made: NewSecret) -> str:
        until = made.previous_expires_at
        before = f"good until {moment(until)}" if until else "refused"
        return f"client_secret  {made.client_secret}\nThe one before is {before}."

    with_running(
        lambda parts: parts.clients.replace_secret(
            client_id, CONSOLE, revoke_previous=revoke_previous
        ),
        said,
    )


@clients.command("disable")
@click.argument("client_id", type=click.UUID)
def clients_disable(client_id: UUID) -> None:
    """Refuse a client app, its tokens, and the sessions through it."""
    _switch(client_id, on=False)


@clients.command("enable")
@click.argument("client_id", type=click.UUID)
def clients_enable(client_id: UUID) -> None:
    """Let a disabled client app ask for tokens again."""
    _switch(client_id, on=True)


@clients.command("delete")
@click.argument("client_id", type=click.UUID)
def clients_delete(client_id: UUID) -> None:
    """Delete a client app; its tokens and the sessions through it end."""
    with_running(
        lambda parts: parts.clients.delete(client_id, CONSOLE),
        lambda _: f"The client {client_id} is deleted; the sessions through it are over.",
    )


def _switch(client_id: UUID, *, on: bool) -> None:
    with_running(
        lambda parts: parts.clients.change(client_id, {"is_active": on}, CONSOLE),
        lambda client: f"{client.name} is {'enabled' if on else 'disabled'}.",
    )
