"""fastapi-users with its Redis strategy, after its documentation's full example.

Its tokens are random and looked up in Redis, and the user in the database, on every request: a
token is revoked by deleting it. It has no refresh tokens.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, RedisStrategy
from fastapi_users.db import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
from fastapi_users.password import PasswordHelper
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from redis import asyncio as aioredis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from benchmarks.peers.data import ACCESS_SECONDS, ARGON2, FOLDER, PEOPLE, REDIS_URL, SECRET

engine = create_async_engine(f"sqlite+aiosqlite:///{FOLDER / 'fastapi_users.sqlite3'}")
sessions = async_sessionmaker(engine, expire_on_commit=False)
redis = aioredis.from_url(REDIS_URL, decode_responses=True)
helper = PasswordHelper(PasswordHash((Argon2Hasher(**ARGON2),)))


class Base(DeclarativeBase):
    """The models."""


class User(SQLAlchemyBaseUserTableUUID, Base):
    """A person; ``is_superuser`` is the role admin."""


class UserRead(schemas.BaseUser[UUID]):
    """A person as shown."""


class Manager(UUIDIDMixin, BaseUserManager[User, UUID]):
    """What the documentation asks for."""

    reset_password_token_secret = SECRET
    verification_token_secret = SECRET


async def get_session() -> AsyncIterator[AsyncSession]:
    """One a request."""
    async with sessions() as session:
        yield session


async def get_manager(
    session: Annotated[AsyncSession, Depends(get_session)],
) -> AsyncIterator[Manager]:
    """One a request."""
    yield Manager(SQLAlchemyUserDatabase(session, User), helper)


def get_strategy() -> RedisStrategy[User, UUID]:
    """Tokens in Redis."""
    return RedisStrategy(redis, lifetime_seconds=ACCESS_SECONDS)


backend = AuthenticationBackend("redis", BearerTransport("login"), get_strategy)
fastapi_users = FastAPIUsers[User, UUID](get_manager, [backend])
app = FastAPI()
app.include_router(fastapi_users.get_auth_router(backend))


@app.get("/protected")
async def protected(
    user: Annotated[User, Depends(fastapi_users.current_user(active=True))],
) -> dict[str, Any]:
    """Say who it is."""
    return {"logged_in_as": user.email, "roles": ["user"]}


@app.get("/users", dependencies=[Depends(fastapi_users.current_user(superuser=True))])
async def users(
    session: Annotated[AsyncSession, Depends(get_session)],
) -> dict[str, list[UserRead]]:
    """List 50, for superusers."""
    found = await session.scalars(select(User).order_by(User.email).limit(50))
    return {"items": [UserRead.model_validate(user) for user in found]}


async def prepare() -> None:
    """Make the people."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    hashed = helper.hash("testpass")
    async with sessions() as session:
        for name in ("testuser", "admin", *PEOPLE):
            session.add(
                User(
                    email=f"{name}@example.org",
                    hashed_password=hashed,
                    is_superuser=name == "admin",
                )
            )
        await session.commit()


async def mint(count: int) -> None:
    """Print tokens."""
    async with sessions() as session:
        user = await session.scalar(select(User).where(User.email == "testuser@example.org"))
    for _ in range(count):
        print(await get_strategy().write_token(user))  # type: ignore[arg-type]


if __name__ == "__main__":
    asyncio.run(prepare() if sys.argv[1] == "prepare" else mint(int(sys.argv[2])))
