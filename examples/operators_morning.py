"""An operator's morning, with nothing but the API.

    python -m examples.operators_morning http://127.0.0.1:8000 admin adminpass

Makes a user who may read the log, finds them, explains their access, demotes them, sees their next
request refused, ends their session, and reads it all back in the audit log.
"""

from __future__ import annotations

import secrets
import sys
from typing import Any

import httpx


class Caller:
    """Somebody who is signed in."""

    def __init__(self, client: httpx.Client, username: str, password: str) -> None:
        self._client = client
        body = {"username": username, "password": password, "transport": "json"}
        self._token = self._client.post("/login", json=body).raise_for_status().json()
        self.username = username

    def __call__(self, method: str, path: str, expect: int, **more: Any) -> Any:
        """Send a request, insist on the status, and return the body."""
        headers = {"Authorization": f"Bearer {self._token['access_token']}"}
        answer = self._client.request(method, path, headers=headers, **more)
        print(f"{self.username:>12}  {method:6} {path:60} {answer.status_code}")
        if answer.status_code != expect:
            raise SystemExit(f"expected {expect}: {answer.text}")
        return answer.json() if answer.content else None

    def refresh(self) -> None:
        """Carry on with the next pair of tokens."""
        headers = {"Authorization": f"Bearer {self._token['refresh_token']}"}
        self._token = self._client.post("/refresh", headers=headers).raise_for_status().json()


def morning(url: str, username: str, password: str) -> list[str]:
    """Do it; return the actions that the audit log tells of the user, the oldest first."""
    with httpx.Client(base_url=url, timeout=20) as client:
        return _morning(client, Caller(client, username, password))


def _morning(client: httpx.Client, operator: Caller) -> list[str]:
    suffix = secrets.token_hex(3)
    role, name, secret = f"auditor-{suffix}", f"eve-{suffix}", secrets.token_urlsafe(16)
    body = {"name": role, "description": "Reads the log.", "permissions": ["audit:read"]}
    operator("POST", "/admin/roles", 201, json=body)
    body = {"username": name, "password": secret, "roles": ["user", role]}
    operator("POST", "/admin/users", 201, json=body)
    eve = Caller(client, name, secret)
    eve("GET", "/admin/audit?limit=1", 200)

    found = operator("GET", f"/admin/users?q={name}", 200)["items"]
    path = f"/admin/users/{found[0]['id']}"
    access = operator("GET", f"{path}/access?permission=audit:read", 200)
    print(f"{'':14}{access['reason']}")

    operator("PUT", f"{path}/roles", 200, json={"roles": ["user"]})
    stale = eve("GET", "/admin/audit?limit=1", 401)
    print(f"{'':14}{stale['code']}")
    eve.refresh()
    eve("GET", "/admin/audit?limit=1", 403)

    (session,) = operator("GET", f"{path}/sessions", 200)["items"]
    operator("DELETE", f"/admin/sessions/{session['id']}", 204)
    eve("GET", "/me", 401)

    told = operator("GET", f"/admin/audit?target={found[0]['id']}", 200)["items"]
    told += operator("GET", f"/admin/audit?target={session['id']}", 200)["items"]
    told += operator("GET", f"/admin/audit?actor={found[0]['id']}&action=admin.refused", 200)[
        "items"
    ]
    actions = [row["action"] for row in sorted(told, key=lambda row: str(row["id"]))]
    print(f"{'':14}in the log: {', '.join(actions)}")
    return actions


if __name__ == "__main__":
    morning(*sys.argv[1:])
