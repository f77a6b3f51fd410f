"""Guard a blueprint of your own: `hypercorn examples.blueprint:asgi`, with REDIS_URL set."""

from __future__ import annotations

from flask import Blueprint
from flask_jwt_extended import get_jwt

from api.app import create_app
from api.auth.guards import public, roles_accepted, roles_required
from api.settings import load

reports = Blueprint("reports", __name__, url_prefix="/reports")


@reports.get("/")
@roles_accepted("admin", "auditor")
async def index() -> dict[str, object]:
    """Whoever holds one of the two roles."""
    return {"reports": ["q1", "q2"], "for": get_jwt()["username"]}


@reports.delete("/<name>")
@roles_required("admin", fresh=True)
def remove(name: str) -> tuple[dict[str, str], int]:
    """A plain function works too, in a thread; `fresh` asks for a token from a sign-in."""
    return {"removed": name}, 200


@reports.get("/ping")
@public
async def ping() -> dict[str, bool]:
    """Nobody in particular: said aloud, so that a forgotten guard is not taken for this."""
    return {"pong": True}


app = create_app(load())
app.register_blueprint(reports)
asgi = app.asgi
