"""Who is measured: how each is started, and by which requests it does the same work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PEERS = "benchmarks.peers"
OWN = Path(".venv/bin")
BENCH = Path(".venv/bench/bin")
PASSWORD = "testpass"


@dataclass(frozen=True)
class Contestant:
    """One service on one server, in one process.

    ``command`` has ``{port}``. ``module`` prepares its data and mints its tokens. ``username`` is
    a template for the name of a person. ``lacks`` says what it does not do, or does otherwise.
    """

    name: str
    server: str
    command: str
    module: str | None = None
    protected: str = "/protected"
    users: str | None = "/users"
    login: str | None = "/login"
    form: bool = False
    username: str = "{}"
    field: str = "access_token"
    header: str = "Authorization: Bearer "
    refresh: str | None = "/refresh"
    refresh_in_body: bool = False
    logout: str = "/logout"
    leaver: str = "testuser"
    lacks: str = ""

    @property
    def label(self) -> str:
        """Its name and server."""
        return f"{self.name} ({self.server})"

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return (OWN if self.name == "Rolecall" else BENCH) / "python"

    @property
    def is_limit(self) -> bool:
        """Whether it does nothing but answer."""
        return self.name == "empty ASGI app"

    def credentials(self, name: str) -> bytes:
        """Return the body of a login."""
        who = self.username.format(name)
        if self.form:
            return f"username={who.replace('@', '%40')}&password={PASSWORD}".encode()
        key = "email" if "@" in self.username else "username"
        return json.dumps({key: who, "password": PASSWORD}).encode()


def _hypercorn(binary: Path, app: str) -> str:
    return f"{binary}/hypercorn -c hypercorn.toml -b 127.0.0.1:{{port}} {app}"


def _uvicorn(command: str, app: str) -> str:
    return f"{command} --port {{port}} --loop uvloop --no-access-log --log-level warning {app}"


def _granian(command: str, app: str) -> str:
    return f"{command} --interface asgi --port {{port}} --loop uvloop --log-level warning {app}"


def _gunicorn(app: str) -> str:
    return (
        f"{BENCH}/gunicorn -b 127.0.0.1:{{port}} -k gthread --threads 8 --keep-alive 75"
        f" --log-level warning {app}"
    )


EMPTY = f"{PEERS}.empty:asgi"
OWN_APP = "api.main:asgi"
UVICORN, GRANIAN = f"{BENCH}/uvicorn", f"{BENCH}/granian"
# these servers, with Rolecall's own packages
BORROW = f"{OWN}/python -m benchmarks.borrow"
SAME_TOKEN = "a refresh token stays the same: nothing is rotated or stored"
IN_REDIS = f"{SAME_TOKEN}; revokes in Redis alone"


def _empty(server: str, command: str) -> Contestant:
    return Contestant("empty ASGI app", server, command, login=None, refresh=None, users=None)


def _rolecall(server: str, command: str) -> Contestant:
    return Contestant(
        "Rolecall", server, command, module="benchmarks.mint", users="/admin/users?limit=50"
    )


def _flask(server: str, command: str) -> Contestant:
    return Contestant("Flask + flask-jwt-extended", server, command, module=FLASK, lacks=IN_REDIS)


def _fastapi(server: str, command: str) -> Contestant:
    return Contestant("FastAPI + PyJWT", server, command, module=FASTAPI, lacks=IN_REDIS)


FLASK, FASTAPI = f"{PEERS}.flask_jwt", f"{PEERS}.fastapi_jwt"
FASTAPI_USERS = f"{PEERS}.fastapi_users_redis"
FLASK_SECURITY = f"{PEERS}.flask_security_token"
DJANGO = f"{PEERS}.django_ninja_jwt"

CONTESTANTS = (
    _empty("hypercorn", _hypercorn(OWN, EMPTY)),
    _empty("uvicorn", _uvicorn(UVICORN, EMPTY)),
    _empty("granian", _granian(GRANIAN, EMPTY)),
    _rolecall("hypercorn", _hypercorn(OWN, OWN_APP)),
    # as it is deployed: Hypercorn with what api/wire.py makes of it, and a supervisor
    _rolecall("rolecall serve", f"{OWN}/rolecall serve --bind 127.0.0.1:{{port}} --workers 1"),
    _rolecall("uvicorn", _uvicorn(f"{BORROW} uvicorn", OWN_APP)),
    _rolecall("granian", _granian(f"{BORROW} granian", OWN_APP)),
    _flask("hypercorn", _hypercorn(BENCH, f"{FLASK}:app")),
    _flask("gunicorn", _gunicorn(f"{FLASK}:app")),
    _fastapi("hypercorn", _hypercorn(BENCH, f"{FASTAPI}:app")),
    _fastapi("uvicorn", _uvicorn(UVICORN, f"{FASTAPI}:app")),
    Contestant(
        "fastapi-users, Redis strategy",
        "uvicorn",
        _uvicorn(UVICORN, f"{FASTAPI_USERS}:app"),
        module=FASTAPI_USERS,
        form=True,
        username="{}@example.org",
        refresh=None,
        lacks="random tokens that only Redis knows, no claims; no refresh tokens",
    ),
    Contestant(
        "Flask-Security",
        "gunicorn",
        _gunicorn(f"{FLASK_SECURITY}:app"),
        module=FLASK_SECURITY,
        username="{}@example.org",
        field="authentication_token",
        login="/login?include_auth_token",
        header="Authentication-Token: ",
        refresh=None,
        logout="/revoke",
        leaver="leaver",
        lacks="no refresh tokens; revokes all of a user's tokens, none alone; "
        "asks the database, not Redis",
    ),
    Contestant(
        "Django Ninja + ninja-jwt",
        "uvicorn",
        _uvicorn(UVICORN, f"{DJANGO}:app"),
        module=DJANGO,
        login="/token/pair",
        field="access",
        refresh="/token/refresh",
        refresh_in_body=True,
        lacks=f"{SAME_TOKEN}; asks the database, not Redis; its views are sync, in threads",
    ),
)
