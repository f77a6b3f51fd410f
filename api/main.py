"""What servers import: ``api.main:asgi`` for Hypercorn, ``api.main:wsgi`` for a WSGI server."""

from __future__ import annotations

from api import logs
from api.app import create_app
from api.settings import load

settings = load()
logs.configure(settings.log_level)
wsgi = create_app(settings)
asgi = wsgi.asgi
