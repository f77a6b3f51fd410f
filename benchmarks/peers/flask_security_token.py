"""Flask-Security with authentication tokens, after its documentation's quick start.

Its tokens are signed, and the user is looked up in the database on every request: changing the
user's ``fs_token_uniquifier`` revokes all of a user's tokens (``/logout`` here does). It has no
refresh tokens.
"""

from __future__ import annotations

import sys
import uuid
from typing import Any

from flask import Flask, jsonify
from flask_security import (
    Security,
    SQLAlchemyUserDatastore,
    auth_required,
    current_user,
    hash_password,
    roles_required,
)
from flask_security.models import fsqla_v3 as fsqla
from flask_sqlalchemy import SQLAlchemy

from benchmarks.peers.data import ACCESS_SECONDS, ARGON2, FOLDER, PEOPLE, SECRET

app = Flask(__name__)
app.config.update(
    SECRET_KEY=SECRET,
    SECURITY_PASSWORD_SALT="146585145368132386173505678016728509634",
    SECURITY_PASSWORD_HASH="argon2",
    SECURITY_PASSWORD_HASH_PASSLIB_OPTIONS={
        "argon2__rounds": ARGON2["time_cost"],
        "argon2__memory_cost": ARGON2["memory_cost"],
        "argon2__parallelism": ARGON2["parallelism"],
    },
    SECURITY_TOKEN_MAX_AGE=ACCESS_SECONDS,
    SECURITY_USERNAME_ENABLE=False,
    WTF_CSRF_ENABLED=False,
    SQLALCHEMY_DATABASE_URI=f"sqlite:///{FOLDER / 'flask_security.sqlite3'}",
)
db = SQLAlchemy(app)
fsqla.FsModels.set_db_info(db)


class Role(db.Model, fsqla.FsRoleMixin):  # type: ignore[name-defined, misc]
    """A role."""


class User(db.Model, fsqla.FsUserMixin):  # type: ignore[name-defined, misc]
    """A person."""

    fs_token_uniquifier = db.Column(db.String(64), unique=True, nullable=True)


datastore = SQLAlchemyUserDatastore(db, User, Role)
security = Security(app, datastore)


@app.get("/protected")
@auth_required("token")
def protected() -> Any:
    """Say who it is."""
    return jsonify(logged_in_as=current_user.email, roles=[r.name for r in current_user.roles])


@app.post("/revoke")
@auth_required("token")
def revoke() -> Any:
    """Revoke the user's tokens."""
    datastore.reset_user_access(current_user)
    datastore.commit()
    return jsonify(logout=True)


@app.get("/users")
@auth_required("token")
@roles_required("admin")
def users() -> Any:
    """List 50, for the role admin."""
    found = db.session.scalars(db.select(User).order_by(User.id).limit(50))
    return jsonify(items=[{"id": u.id, "email": u.email, "active": u.active} for u in found])


def prepare() -> None:
    """Make the people."""
    db.create_all()
    datastore.find_or_create_role("user")
    datastore.find_or_create_role("admin")
    hashed = hash_password("testpass")
    for name in ("testuser", "admin", "leaver", *PEOPLE):
        roles = ["admin", "user"] if name == "admin" else ["user"]
        datastore.create_user(
            email=f"{name}@example.org",
            password=hashed,
            roles=roles,
            fs_token_uniquifier=uuid.uuid4().hex,
        )
    datastore.commit()


if __name__ == "__main__":
    with app.app_context():
        if sys.argv[1] == "prepare":
            prepare()
        else:
            user = datastore.find_user(email="testuser@example.org")
            for _ in range(int(sys.argv[2])):
                print(user.get_auth_token())
