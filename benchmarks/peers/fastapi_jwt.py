"""FastAPI with PyJWT, redis.asyncio and SQLAlchemy, after FastAPI's "OAuth2 with JWT tokens".

Its tutorial has no revocation and no refresh token: both are added as the idiom would have them,
one awaited GET on a pooled client, and a second kind of token.
"""

from __future__ import annotations

import sys
import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from fastapi import Depends, FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from redis import asyncio as aioredis
from sqlalchemy import String, create_engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.peers.data import ACCESS_SECONDS, ARGON2, FOLDER, PEOPLE, REDIS_URL, SECRET

FILE = FOLDER / "fastapi.sqlite3"

app = FastAPI()
redis = aioredis.Redis.from_url(REDIS_URL)
sessions = async_sessionmaker(create_async_engine(f"sqlite+aiosqlite:///{FILE}"))
hasher = PasswordHasher(**ARGON2)


class Base(DeclarativeBase):
    """The models."""


class User(Base):
    """A person."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    username: Mapped[str] = mapped_column(String(64), unique=True)
    email: Mapped[str]
    password: Mapped[str]
    role: Mapped[str]


class Login(BaseModel):
    """The body of a login."""

    username: str
    password: str


class Person(BaseModel):
    """A person as shown."""

    id: int
    username: str
    email: str
    role: str


def token(username: str, role: str, kind: str, lifetime: timedelta) -> str:
    """Return a signed token."""
    now = datetime.now(UTC)
    claims = {"sub": username, "roles": [role], "type": kind, "jti": str(uuid.uuid4())}
    return jwt.encode(claims | {"iat": now, "exp": now + lifetime}, SECRET, algorithm="HS256")


def access_token(username: str, role: str) -> str:
    """Return an access token."""
    return token(username, role, "access", timedelta(seconds=ACCESS_SECONDS))


async def _claims(credentials: HTTPAuthorizationCredentials, kind: str) -> dict[str, Any]:
    try:
        claims: dict[str, Any] = jwt.decode(credentials.credentials, SECRET, algorithms=["HS256"])
    except jwt.PyJWTError:
        raise HTTPException(401, "Could not validate credentials") from None
    if claims["type"] != kind or await redis.get(claims["jti"]) is not None:
        raise HTTPException(401, "Could not validate credentials")
    return claims


Bearer = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def current(credentials: Bearer) -> dict[str, Any]:
    """The dependency behind every guarded route."""
    return await _claims(credentials, "access")


Current = Annotated[dict[str, Any], Depends(current)]


@app.post("/login")
async def login(body: Login) -> dict[str, str]:
    """Sign in."""
    async with sessions() as session:
        user = await session.scalar(select(User).where(User.username == body.username))
    try:
        if user is None:
            raise VerifyMismatchError
        await run_in_threadpool(hasher.verify, user.password, body.password)
    except VerifyMismatchError:
        raise HTTPException(401, "Incorrect username or password") from None
    return {
        "access_token": access_token(user.username, user.role),
        "refresh_token": token(user.username, user.role, "refresh", timedelta(days=7)),
    }


@app.post("/refresh")
async def refresh(credentials: Bearer) -> dict[str, str]:
    """Return another access token; the refresh token stays the same."""
    claims = await _claims(credentials, "refresh")
    return {"access_token": access_token(claims["sub"], claims["roles"][0])}


@app.post("/logout")
async def logout(claims: Current) -> dict[str, bool]:
    """Revoke the token."""
    await redis.set(claims["jti"], "", ex=ACCESS_SECONDS)
    return {"logout": True}


@app.get("/protected")
async def protected(claims: Current) -> dict[str, Any]:
    """Say who it is."""
    return {"logged_in_as": claims["sub"], "roles": claims["roles"]}


@app.get("/users")
async def users(claims: Current) -> dict[str, list[Person]]:
    """List 50, for the role admin."""
    if "admin" not in claims["roles"]:
        raise HTTPException(403, "admin only")
    async with sessions() as session:
        found = await session.scalars(select(User).order_by(User.id).limit(50))
        return {"items": [Person.model_validate(u, from_attributes=True) for u in found]}


def prepare() -> None:
    """Make the people."""
    engine = create_engine(f"sqlite:///{FILE}")
    Base.metadata.create_all(engine)
    hashed = hasher.hash("testpass")
    people = [("testuser", "user"), ("admin", "admin"), *((name, "user") for name in PEOPLE)]
    with Session(engine) as session:
        session.add_all(
            User(username=n, email=f"{n}@example.org", password=hashed, role=r) for n, r in people
        )
        session.commit()


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare()
    else:
        for _ in range(int(sys.argv[2])):
            print(access_token("testuser", "user"))
