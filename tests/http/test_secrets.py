"""Every secret that passes through is looked for wherever something is written down (58)."""

from __future__ import annotations

import base64
import gc
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from sqlalchemy import select
from sqlalchemy import text as sql

from api import logs, metrics
from api.app import create_app
from api.asgi import AsyncFlask
from api.db import Database
from api.db.models import Base
from api.parts import EXTENSION, Parts
from api.settings import Settings
from tests.conftest import SECRET, bearer, client_of, sign_in
from tests.http._forge import opened
from tests.http.test_hostile_headers import NOBODY

TYPED = {
    "the right password": "kumquat vienna 77", "a wrong password": "wrong-Lantern-5501",
    "a new password": "new-Harbour-9173", "a set password": "set-Meadow-4410",
    "a password for a name": "typed-as-name-8821", "a weak password": "password1234",
    "a wrong client secret": "wrong-Quarry-3316",
}  # fmt: skip


@pytest.fixture
async def verbose(settings: Settings, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Any]:
    """A service that logs everything there is; gives the application and what it has said."""
    before = logging.getLogger().handlers[:], logging.getLogger().level
    logs.configure("DEBUG")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the test's own client
    app = create_app(replace(settings, log_level="DEBUG", registration_open=True))
    said: list[str] = []

    def heard() -> str:
        out, err = capsys.readouterr()
        said.append(out + err)
        return "".join(said)

    async with app.running():
        yield app, heard
    logging.getLogger().handlers[:] = before[0]
    logging.getLogger().setLevel(before[1])
    for ours in ("rolecall", "api"):
        logging.getLogger(ours).setLevel(logging.NOTSET)
    structlog.reset_defaults()


async def used(app: AsyncFlask) -> tuple[dict[str, str], list[httpx.Response]]:
    """Do everything that a secret goes into; return the secrets, and answers that hold none."""
    parts: Parts = app.extensions[EXTENSION]
    secrets, answers = dict(TYPED), []

    def keep(kind: str, tokens: Any) -> None:
        for name in ("access_token", "refresh_token"):
            secrets[f"{name} of {kind}"] = str(tokens[name])

    async with client_of(app) as client:
        me = {"username": "newcomer", "password": TYPED["the right password"]}
        answers += [await client.post("/register", json=me) for _ in range(2)]
        weak = {"username": "other", "password": TYPED["a weak password"]}
        answers.append(await client.post("/register", json=weak))
        keep("a login", tokens := await sign_in(client, **me))
        secrets |= {f"{name} cookie": value for name, value in client.cookies.items()}
        client.cookies.clear()
        for body in (
            me | {"password": TYPED["a wrong password"]}, me | {"transport": "pigeon"},
            {"username": TYPED["a password for a name"], "password": "x"},
            me | {"unknown": 1}, [me],
        ):  # fmt: skip
            answers.append(await client.post("/login", json=body))
        broken = b'{"username": "newcomer", "password": "kumquat vienna 77"'
        as_json = {"Content-Type": "application/json"}
        answers.append(await client.post("/login", content=broken, headers=as_json))
        access, refresh = str(tokens["access_token"]), str(tokens["refresh_token"])
        for token in (access + "x", access[:-9] + "AAAAAAAAA", refresh):
            answers.append(await client.get("/protected", headers=bearer(token)))
            answers.append(await client.get(f"/protected?jwt={token}", headers=bearer(token)))
        rotated = (await client.post("/refresh", headers=bearer(refresh))).json()
        keep("a refresh", rotated)
        access = rotated["access_token"]
        for new in ("a new password", "a weak password"):
            change = {"current_password": TYPED["the right password"], "new_password": TYPED[new]}
            answers.append(await client.post("/me/password", json=change, headers=bearer(access)))
        answers += [
            await client.get(path, headers=bearer(access))
            for path in ("/me", "/me/sessions", "/protected", "/admin/users")
        ]
        keep("an admin", boss := await sign_in(client, "admin", "adminpass", transport="json"))
        admin = bearer(boss["access_token"])
        user = (await client.get("/admin/users?q=newcomer", headers=admin)).json()["items"][0]
        path = f"/admin/users/{user['id']}"
        put = {"password": TYPED["a set password"]}
        answers.append(await client.patch(path, json=put, headers=admin))
        app_body = {"name": "x", "allowed_roles": ["user"], "audiences": [], "grants": []}
        made = (await client.post("/admin/clients", json=app_body, headers=admin)).json()
        secrets["a client's secret"] = made["client_secret"]
        through = {name: made[name] for name in ("client_id", "client_secret")}
        newcomer = {"username": "newcomer", "password": TYPED["a set password"]}
        keep("a login through a client", await sign_in(client, **newcomer, **through))
        client.cookies.clear()
        wrong = through | {"client_secret": TYPED["a wrong client secret"]}
        for body, basic in (
            (wrong, None), (through, tuple(through.values())), ({}, tuple(wrong.values())),
            (through | {"client_id": NOBODY}, None), (through | {"transport": "pigeon"}, None),
        ):  # fmt: skip
            answers.append(await client.post("/login", json=newcomer | body, auth=basic))
        for token in (access, "a.b.c"):
            revoke = {"token": token}
            answers.append(await client.post("/admin/tokens/revoke", json=revoke, headers=admin))
        answers += [
            await client.get(path, headers=admin)
            for path in ("/admin/users", "/admin/sessions", "/admin/audit", "/admin/stats",
                         "/openapi.json", "/.well-known/jwks.json", "/health/ready", "/metrics")
        ]  # fmt: skip
        for failing, how in (
            ("read", crash),
            ("rows", crash),
            ("run", crash),
            ("run", refused(parts.database)),
        ):
            original = getattr(parts.database, failing)
            setattr(parts.database, failing, how)
            parts.blocklist._index.close("a bug")  # so that the check asks the database as well
            keep_quiet = {"username": "newcomer", "password": TYPED["a set password"]}
            answers.append(await client.post("/login", json=keep_quiet))
            answers.append(await client.post("/login", json=keep_quiet | through))
            answers.append(await client.get("/me", headers=admin))
            setattr(parts.database, failing, original)
    for kind, token in list(secrets.items()):
        if token.count(".") == 2:
            if opened(token)[1]["type"] == "refresh":  # an access token's is told to operators
                secrets[f"jti of {kind}"] = opened(token)[1]["jti"]
            secrets[f"signature of {kind}"] = token.rpartition(".")[2]
    return secrets, answers


def crash(*_: Any, **__: Any) -> Any:
    """Fail as nothing was expected to, with the secrets in the frames around."""
    raise RuntimeError("a bug")


def refused(database: Database) -> Any:
    """Return a transaction whose statement the database refuses, with a secret for a parameter."""
    run = database.run
    statement = sql(f"INSERT INTO users (id, username_key) VALUES ('{NOBODY}', :typed)")

    async def running(_work: Any) -> Any:
        return await run(lambda db: db.execute(statement, {"typed": TYPED["a set password"]}))

    return running


async def test_no_secret_is_written_down(verbose: Any) -> None:
    """Not in logs at DEBUG, tracebacks, errors, audit rows, metrics, or the repr of anything."""
    app, heard = verbose
    parts: Parts = app.extensions[EXTENSION]
    gc.disable()  # an error that was raised keeps what its frames held
    try:
        secrets, answers = await used(app)
    finally:
        gc.enable()
    assert {answer.status_code for answer in answers} >= {200, 201, 204, 401, 403, 409, 422, 500}
    private = parts.keys.current.private.private_bytes_raw()
    der = parts.keys.current.private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    secrets |= {
        "SECRET_KEY": SECRET, "the signing key": private.hex(), "its repr": repr(private)[2:-1],
        "its base64": base64.b64encode(private).decode(), "its DER": base64.b64encode(der).decode(),
    }  # fmt: skip
    async with parts.database.read() as session:
        stored = {
            name: "\n".join(repr(tuple(row)) for row in await session.execute(select(table)))
            for name, table in Base.metadata.tables.items()
        }
        hashes = list(await session.scalars(select(Base.metadata.tables["users"].c.password_hash)))
    kept = {hashed: f"hash {number}" for number, hashed in enumerate(hashes)}
    written = {
        "the logs": heard(), "the metrics": metrics.exposition().decode(),
        "the answers": "\n".join(f"{a.headers} {a.text}" for a in answers),
        "the audit rows": stored["audit_events"],
        "reprs": "\n".join(map(repr, [parts, parts.settings, app, app.config, *_ours()])),
    }  # fmt: skip
    assert "unexpected_error" in written["the logs"]
    assert "IntegrityError" in written["the logs"]
    assert "/login" in written["the logs"]
    found = {
        (name, place) for place, text in written.items() for name, secret in secrets.items()
        if secret in text
    }  # fmt: skip
    assert found == set()
    assert not {(name, place) for place, text in written.items() for hashed, name in kept.items()
                if hashed in text}  # fmt: skip
    for name, text in stored.items():
        # what a refresh is compared with; it opens nothing without a signature
        known = [k for k in secrets if k.startswith("jti of")] if name == "sessions" else []
        assert not {k for k, v in secrets.items() if v in text and k not in known}, name


def _ours() -> list[Any]:
    return [
        thing for thing in gc.get_objects()
        if str(type(thing).__module__).startswith(("api.", "schemas."))
    ]  # fmt: skip


async def test_redis_holds_no_secret(app: AsyncFlask, parts: Parts) -> None:
    """Names and values alike: ids of what was taken back, and hashes."""
    secrets: dict[str, str] = dict(TYPED)
    async with client_of(app) as client:
        tokens = await sign_in(client, transport="json")
        secrets |= {name: str(tokens[name]) for name in ("access_token", "refresh_token")}
        await client.post("/login", json={
            "username": TYPED["a password for a name"], "password": TYPED["a wrong password"],
        })  # fmt: skip
        await client.post("/logout", headers=bearer(tokens["access_token"]))
    redis = parts.blocklist.redis
    keys = redis.scan_iter(f"{parts.settings.redis_prefix}*")
    texts = [f"{key!r} {await redis.dump(key)!r}" async for key in keys]
    assert texts
    assert not {name for name, secret in secrets.items() if any(secret in text for text in texts)}
