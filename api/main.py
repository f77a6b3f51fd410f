"""What servers import: ``api.main:asgi`` for Hypercorn, ``api.main:wsgi`` for a WSGI server."""

from __future__ import annotations

import gc
from dataclasses import replace

from api import logs
from api.app import create_app
from api.settings import load

# Only the supervisor makes the first administrator, and a .env would name the password here too.
settings = replace(load(), admin_username=None, admin_password=None)
logs.configure(settings.log_level)
wsgi = create_app(settings)
asgi = wsgi.asgi

# What is there by now stays as long as the process does: the collector need not walk it each time
# (a protected request costs a tenth less).
gc.collect()
gc.freeze()
