"""Flask with async views, flask-jwt-extended and its documented Redis blocklist.

After its documentation's "Blocklist and Token Revoking" and "Refreshing Tokens" (explicit
refreshing). Its loader is called without being awaited, so its Redis client is the sync one.
"""

from __future__ import annotations

import sqlite3
import sys
from datetime import timedelta
from typing import Any

import redis
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from flask import Flask, g, jsonify, request
from flask_jwt_extended import (
    JWTManager,
    create_access_token,
    create_refresh_token,
    get_jwt,
    get_jwt_identity,
    jwt_required,
)

from benchmarks.peers.data import ACCESS_SECONDS, ARGON2, FOLDER, PEOPLE, REDIS_URL, SECRET

FILE = FOLDER / "flask.sqlite3"
EXPIRES = timedelta(seconds=ACCESS_SECONDS)

app = Flask(__name__)
app.config["JWT_SECRET_KEY"] = SECRET
app.config["JWT_ACCESS_TOKEN_EXPIRES"] = EXPIRES
jwt = JWTManager(app)
blocklist = redis.Redis.from_url(REDIS_URL, decode_responses=True)
hasher = PasswordHasher(**ARGON2)


def database() -> sqlite3.Connection:
    """Return this request's connection, as Flask's documentation has it."""
    if "database" not in g:
        # an async view runs in another thread than what is torn down after it
        g.database = sqlite3.connect(FILE, check_same_thread=False)
        g.database.row_factory = sqlite3.Row
    return g.database  # type: ignore[no-any-return]


@app.teardown_appcontext
def close(_error: BaseException | None) -> None:
    """Close it."""
    if "database" in g:
        g.pop("database").close()


@jwt.token_in_blocklist_loader
def is_revoked(_header: dict[str, Any], payload: dict[str, Any]) -> bool:
    """Ask Redis, on every request."""
    return blocklist.get(payload["jti"]) is not None


@app.post("/login")
async def login() -> Any:
    """Sign in."""
    body = request.get_json()
    row = (
        database().execute("SELECT * FROM users WHERE username = ?", (body["username"],)).fetchone()
    )
    try:
        hasher.verify(row["password"], body["password"])
    except (VerifyMismatchError, TypeError):
        return jsonify(msg="Bad username or password"), 401
    claims = {"roles": [row["role"]]}
    return jsonify(
        access_token=create_access_token(row["username"], additional_claims=claims),
        refresh_token=create_refresh_token(row["username"], additional_claims=claims),
    )


@app.post("/refresh")
@jwt_required(refresh=True)
async def refresh() -> Any:
    """Return another access token; the refresh token stays the same."""
    claims = {"roles": get_jwt()["roles"]}
    return jsonify(access_token=create_access_token(get_jwt_identity(), additional_claims=claims))


@app.post("/logout")
@jwt_required()
async def logout() -> Any:
    """Revoke the token."""
    blocklist.set(get_jwt()["jti"], "", ex=EXPIRES)
    return jsonify(msg="Access token revoked")


@app.get("/protected")
@jwt_required()
async def protected() -> Any:
    """Say who it is."""
    return jsonify(logged_in_as=get_jwt_identity(), roles=get_jwt()["roles"])


@app.get("/users")
@jwt_required()
async def users() -> Any:
    """List 50, for the role admin."""
    if "admin" not in get_jwt()["roles"]:
        return jsonify(msg="admin only"), 403
    rows = database().execute("SELECT id, username, email, role FROM users ORDER BY id LIMIT 50")
    return jsonify(items=[dict(row) for row in rows])


def prepare() -> None:
    """Make the people."""
    hashed = hasher.hash("testpass")
    people = [("testuser", "user"), ("admin", "admin"), *((name, "user") for name in PEOPLE)]
    with sqlite3.connect(FILE) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(
            "CREATE TABLE users (id INTEGER PRIMARY KEY, username TEXT UNIQUE, email TEXT,"
            " password TEXT, role TEXT)"
        )
        connection.executemany(
            "INSERT INTO users (username, email, password, role) VALUES (?, ?, ?, ?)",
            [(name, f"{name}@example.org", hashed, role) for name, role in people],
        )


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare()
    else:
        with app.app_context():
            for _ in range(int(sys.argv[2])):
                print(create_access_token("testuser", additional_claims={"roles": ["user"]}))
