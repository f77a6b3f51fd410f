"""A token that verified once is remembered: never past exp, across keys, beyond capacity."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flask_jwt_extended import JWTManager

from api.asgi import AsyncFlask
from api.auth.tokens import RolecallJWTManager, VerifiedTokens
from api.parts import Parts
from tests.conftest import bearer, sign_in


def claims(seconds: float) -> dict[str, Any]:
    """Return claims that expire in ``seconds``."""
    return {"exp": int(time.time() + seconds)}


def test_a_remembered_token_is_itself_alone() -> None:
    """Its header and claims come back as copies; no other token's do."""
    memory = VerifiedTokens(SimpleNamespace(changes=0))
    memory.remember("a.b.c", {"alg": "x"}, claims(60))
    header, said = memory.recall("a.b.c", 0)
    header["alg"] = said["exp"] = "changed"
    assert memory.recall("a.b.c", 0)[0] == {"alg": "x"}
    assert memory.recall("a.b.d", 0) is None


def test_it_is_forgotten_when_it_expires() -> None:
    """At exp and the leeway, to the second."""
    memory = VerifiedTokens(SimpleNamespace(changes=0))
    memory.remember("old", {}, claims(-1))
    assert memory.recall("old", 0) is None
    assert memory.recall("old", 5) is not None


def test_it_is_forgotten_when_the_keys_change() -> None:
    """A retired key's tokens are not accepted from memory."""
    keys = SimpleNamespace(changes=0)
    memory = VerifiedTokens(keys)
    memory.remember("a", {}, claims(60))
    keys.changes += 1
    assert memory.recall("a", 0) is None
    assert memory.recall("a", 0) is None


def test_the_oldest_makes_room() -> None:
    """No more than the capacity is kept."""
    memory = VerifiedTokens(SimpleNamespace(changes=0), capacity=2)
    for name in "abc":
        memory.remember(name, {}, claims(60))
    assert [memory.recall(name, 0) is not None for name in "abc"] == [False, True, True]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_one_verification_serves_many_requests(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature is checked once a token, and the blocklist asked every time."""
    verified: list[str] = []
    decode = JWTManager._decode_jwt_from_config

    def counting(self: JWTManager, token: str, *rest: Any) -> Any:
        verified.append(token)
        return decode(self, token, *rest)

    monkeypatch.setattr(JWTManager, "_decode_jwt_from_config", counting)
    token = (await sign_in(client, transport="json"))["access_token"]
    for _ in range(5):
        assert (await client.get("/protected", headers=bearer(token))).status_code == 200
    assert verified == [token]
    assert (await client.post("/logout", headers=bearer(token))).status_code == 200
    answer = await client.get("/protected", headers=bearer(token))
    assert answer.json()["code"] == "token_revoked"
    assert verified == [token]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_loader_that_would_not_be_awaited_is_refused(app: AsyncFlask, parts: Parts) -> None:
    """An async loader revokes everybody or lets everybody in: it cannot be registered."""
    manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]

    async def loader(*_: Any) -> bool:
        return False

    for register in (
        manager.token_in_blocklist_loader,
        manager.token_verification_loader,
        manager.user_lookup_loader,
        manager.additional_claims_loader,
    ):
        with pytest.raises(TypeError, match="async"):
            register(loader)
