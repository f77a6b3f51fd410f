"""The command line of clients and keys, in this process: what it says, and how it refuses."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import structlog

from api import cli
from tests._redis import RedisServer
from tests.conftest import SECRET

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
Rolecall = Callable[..., str]


@pytest.fixture
def rolecall(
    database_url: str,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Rolecall]:
    """`rolecall …`: returns what it printed, and fails unless it exits with ``code``."""
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_server.url, "SECRET_KEY": SECRET}
    for name, value in (environ | {"ROLECALL_DATA_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str, code: int = 0, said: bytes = b"") -> str:
        monkeypatch.setattr("sys.argv", ["rolecall", *arguments])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), "utf-8"))
        exited = 0
        try:
            cli.main()
        except SystemExit as end:
            exited = int(end.code or 0)
        printed = "".join(capsys.readouterr())
        assert exited == code, printed
        return printed

    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield run
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    structlog.reset_defaults()


def told(lines: str) -> dict[str, str]:
    """Return what `clients show` says, by name."""
    return dict(line.split(maxsplit=1) for line in lines.splitlines())


def test_a_clients_life_at_the_console(rolecall: Rolecall) -> None:
    """Registered, listed, shown, changed, given another secret, disabled, enabled, deleted."""
    made = told(
        rolecall("clients", "create", "reports", "--role", "user", "--grant", "client_credentials")
    )
    client_id, secret = made["client_id"], made["client_secret"]
    assert rolecall("clients", "list").split() == [client_id, "secret", "reports", "user"]
    shown = told(rolecall("clients", "show", client_id))
    assert shown["state"] == "confidential, active"
    assert (shown["audiences"], shown["expires"]) == ("-", "as the setting says")
    changed = told(
        rolecall(
            "clients", "change", client_id, "--name", "wiki", "--role", "user", "--role", "admin",
            "--audience", "wiki", "--audience", "rolecall", "--expires", "60", "--clear", "grants",
        )
    )  # fmt: skip
    assert changed == shown | {
        "name": "wiki", "roles": "admin, user", "audiences": "wiki, rolecall", "grants": "-",
        "expires": "60 s", "changed": changed["changed"],
    }  # fmt: skip
    cleared = ("roles", "audiences", "expires")
    options = [word for what in cleared for word in ("--clear", what)]
    changed = told(rolecall("clients", "change", client_id, *options))
    assert [changed[what] for what in cleared] == ["-", "-", "as the setting says"]
    another = rolecall("clients", "secret", client_id)
    assert "The one before is good until" in another
    assert "refused" in rolecall("clients", "secret", client_id, "--revoke-previous")
    assert rolecall("clients", "disable", client_id) == "wiki is disabled.\n"
    assert told(rolecall("clients", "show", client_id))["state"] == "confidential, disabled"
    assert rolecall("clients", "enable", client_id) == "wiki is enabled.\n"
    assert secret not in rolecall("clients", "show", client_id)
    assert "is deleted" in rolecall("clients", "delete", client_id)
    assert rolecall("clients", "list") == ""


@ON_SQLITE
def test_what_no_client_can_be_is_one_sentence(rolecall: Rolecall) -> None:
    """Exit code 1 and the field, or 2 and how it is used; nothing is registered or changed."""
    for arguments, why in (
        (("--role", "nobody"), "There is no role 'nobody'."),
        (("--audience", "a b"), "white space"),
        (("--expires", "9"), "greater than or equal to 10"),
        (("--public", "--grant", "client_credentials"), "client_credentials needs a secret."),
    ):
        said = rolecall("clients", "create", "x", *arguments, code=1)
        assert said.startswith("rolecall: ")
        assert why in said
    assert rolecall("clients", "list") == ""
    client_id = told(rolecall("clients", "create", "x"))["client_id"]
    assert "at least one thing" in rolecall("clients", "change", client_id, code=1)
    both = ("--role", "user", "--clear", "roles")
    assert "Either" in rolecall("clients", "change", client_id, *both, code=2)
    for command in ("show", "change", "secret", "disable", "enable", "delete"):
        assert "not a valid UUID" in rolecall("clients", command, "x", code=2)
        more = ("--name", "y") if command == "change" else ()
        said = rolecall("clients", command, str(uuid4()), *more, code=1)
        assert said == "rolecall: There is no such client.\n"


@ON_SQLITE
@pytest.mark.parametrize("place", ["file", "input", "variable"])
def test_a_former_secret_that_is_no_text_is_said(
    place: str, rolecall: Rolecall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are not UTF-8, wherever they come from: one sentence, no traceback."""
    junk, arguments = b"\xff\xfe" * 20, ("keys", "reencrypt")
    if place == "file":
        (tmp_path / "former").write_bytes(junk)
        arguments += ("--former", str(tmp_path / "former"))
    elif place == "variable":
        monkeypatch.setenv("SECRET_KEY_OLD", junk.decode("utf-8", "surrogateescape"))
    said = rolecall(*arguments, code=1, said=junk + b"\n")
    assert said == "rolecall: The former SECRET_KEY is not text in UTF-8.\n"
