"""Django Ninja with django-ninja-jwt and its blacklist app, after its documentation.

Its blacklist app covers refresh tokens; an access token of the same mixin is refused as well. The
blacklist and the user are looked up in the database on every request.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import django
from django.conf import settings

from benchmarks.peers.data import ACCESS_SECONDS, FOLDER, PEOPLE, SECRET

NAME = "benchmarks.peers.django_ninja_jwt"

settings.configure(
    DEBUG=False,
    SECRET_KEY=SECRET,
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF="benchmarks.peers.django_urls",
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "ninja_extra",
        "ninja_jwt",
        "ninja_jwt.token_blacklist",
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": FOLDER / "django.sqlite3",
            "CONN_MAX_AGE": None,
            # as its documentation has it against "database is locked"
            "OPTIONS": {
                "init_command": "PRAGMA journal_mode=WAL",
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
            },
        }
    },
    PASSWORD_HASHERS=["benchmarks.peers.django_hasher.Argon2"],
    NINJA_JWT={
        "ACCESS_TOKEN_LIFETIME": timedelta(seconds=ACCESS_SECONDS),
        "AUTH_TOKEN_CLASSES": ("benchmarks.peers.django_urls.RevocableAccessToken",),
    },
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()


def prepare() -> None:
    """Make the people."""
    from django.contrib.auth.models import User
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    for name in ("testuser", "admin", *PEOPLE):
        User.objects.create_user(name, f"{name}@example.org", "testpass", is_staff=name == "admin")


def mint(count: int) -> None:
    """Print tokens."""
    from django.contrib.auth.models import User

    from benchmarks.peers.django_urls import RevocableAccessToken

    user = User.objects.get(username="testuser")
    for _ in range(count):
        print(RevocableAccessToken.unlisted(user))


if __name__ == "__main__":
    prepare() if sys.argv[1] == "prepare" else mint(int(sys.argv[2]))
else:
    os.environ.setdefault("DJANGO_ALLOW_ASYNC_UNSAFE", "")
    from django.core.asgi import get_asgi_application

    app = get_asgi_application()
