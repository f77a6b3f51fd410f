"""``rolecall clients``: client apps, and their secrets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import click
from marshmallow import Schema, ValidationError

from api.console import MOST, listed, moment, with_running
from api.errors import StartupError
from api.parts import Parts
from api.services.audit import SYSTEM
from api.services.clients import ClientView, NewSecret
from schemas.clients import GRANTS, ClientChangeSchema, ClientCreateSchema

LISTS = ("allowed_roles", "audiences", "grants")
TERMS = (
    click.option("--role", "allowed_roles", multiple=True, help="A role that it may be given."),
    click.option("--audience", "audiences", multiple=True, help="Whom its tokens are meant for."),
    click.option(
        "--grant",
        "grants",
        multiple=True,
        type=click.Choice(GRANTS),
        help="What /oauth/token gives.",
    ),
    click.option(
        "--expires", "access_token_expires", type=int, help="Seconds; else the setting's."
    ),
)
# What --clear names, as the API has it.
CLEARED: dict[str, dict[str, Any]] = {
    "roles": {"allowed_roles": []},
    "audiences": {"audiences": []},
    "grants": {"grants": []},
    "expires": {"access_token_expires": None},
}


def _terms(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(TERMS):
        command = option(command)
    return command


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
@click.option("--public", is_flag=True, help="It can keep no secret: a browser, a telephone.")
@_terms
def clients_create(**wanted: Any) -> None:
    """Register a client app; its secret is printed this once."""
    body = _checked(ClientCreateSchema(), wanted | {name: list(wanted[name]) for name in LISTS})

    def said(made: tuple[ClientView, str | None]) -> str:
        client, secret = made
        lines = [f"client_id      {client.client_id}"]
        return "\n".join([*lines, f"client_secret  {secret}"] if secret else lines)

    with_running(lambda parts: parts.clients.create(body, SYSTEM), said)


@clients.command("show")
@click.argument("client_id", type=click.UUID)
def clients_show(client_id: UUID) -> None:
    """Show all that is kept of a client app, but for its secrets."""
    with_running(lambda parts: parts.clients.get(client_id), _described)


@clients.command("change")
@click.argument("client_id", type=click.UUID)
@click.option("--name", help="Another name.")
@_terms
@click.option(
    "--clear", "cleared", multiple=True, type=click.Choice(list(CLEARED)), help="Leave none of it."
)
def clients_change(client_id: UUID, cleared: tuple[str, ...], **wanted: Any) -> None:
    """Change a client app; it bites on the next request.

    What is named takes the place of what was: name every role that it shall have.
    """
    body = {name: given for name, given in wanted.items() if given not in (None, ())}
    body |= {name: list(body[name]) for name in LISTS if name in body}
    for what in cleared:
        if body.keys() & CLEARED[what].keys():
            raise click.UsageError(f"Either --clear {what}, or what there shall be of it.")
        body |= CLEARED[what]
    body = _checked(ClientChangeSchema(), body)
    with_running(lambda parts: parts.clients.change(client_id, body, SYSTEM), _described)


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
            client_id, SYSTEM, revoke_previous=revoke_previous
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
        lambda parts: parts.clients.delete(client_id, SYSTEM),
        lambda _: f"The client {client_id} is deleted; the sessions through it are over.",
    )


def _checked(schema: Schema, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        body: dict[str, Any] = schema.load(wanted)
    except ValidationError as error:
        raise StartupError(f"That does not make a client: {error.messages}") from None
    return body


def _described(client: ClientView) -> str:
    kind = "public" if client.public else "confidential"
    expires = client.access_token_expires
    lines = {
        "client_id": client.client_id,
        "name": client.name,
        "state": f"{kind}, {'active' if client.is_active else 'disabled'}",
        "roles": listed(client.allowed_roles),
        "audiences": listed(client.audiences),
        "grants": listed(client.grants),
        "expires": f"{expires} s" if expires else "as the setting says",
        "created": moment(client.created_at),
        "changed": moment(client.updated_at),
    }
    return "\n".join(f"{name:13}  {value}" for name, value in lines.items())


def _switch(client_id: UUID, *, on: bool) -> None:
    with_running(
        lambda parts: parts.clients.change(client_id, {"is_active": on}, SYSTEM),
        lambda client: f"{client.name} is {'enabled' if on else 'disabled'}.",
    )
