"""OAuth's endpoints: RFC 6749 to the letter, and nothing told that should not be."""

from __future__ import annotations

import base64
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest

from api.asgi import AsyncFlask
from api.parts import Parts
from tests.conftest import bearer, client_of, sign_in
from tests.http.test_admin import ON_SQLITE, PASSWORD, code, made, role
from tests.http.test_admin import admin as admin
from tests.http.test_clients import CLIENTS, granted, refreshed, registered, said, through

TOKEN, INTROSPECT, REVOKE = "/oauth/token", "/oauth/introspect", "/oauth/revoke"
INACTIVE = {"active": False}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
GRANT = {"grant_type": "client_credentials", "token": "x"}


def auth(app: dict[str, Any]) -> tuple[str, str]:
    """Return what HTTP Basic takes."""
    return app["client_id"], app["client_secret"]


def oauth(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the error; the answer is RFC 6749's and no problem document."""
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json().keys() == {"error", "error_description"}
    is_401 = answer.status_code == 401
    assert answer.headers.get("WWW-Authenticate", "").startswith("Basic ") == is_401
    return answer.status_code, answer.json()["error"]


@pytest.fixture
async def reports(admin: httpx.AsyncClient) -> dict[str, Any]:
    """A confidential client that may read users."""
    await role(admin, "reader", "users:read", "roles:read")
    return await registered(
        admin, "user", "reader", grants=["client_credentials", "refresh_token"],
        access_token_expires=600,
    )  # fmt: skip


async def test_a_client_gets_a_token_of_its_own(
    client: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """By Basic and by form; signed by a key of the JWKS, typed, bounded, and good here."""
    by_form = {"grant_type": "client_credentials"} | {
        name: reports[name] for name in ("client_id", "client_secret")
    }
    keys = jwt.PyJWKSet.from_dict((await client.get("/.well-known/jwks.json")).json())
    for answer in (await granted(client, reports), await client.post(TOKEN, data=by_form)):
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Pragma"] == "no-cache"
        assert "set-cookie" not in answer.headers
        body = answer.json()
        assert body.keys() == {"access_token", "token_type", "expires_in", "scope"}
        assert (body["token_type"], body["expires_in"]) == ("Bearer", 600)
        assert body["scope"] == "roles:read users:read"
        token = body["access_token"]
        header = jwt.get_unverified_header(token)
        assert header["typ"] == "at+jwt"
        key = keys[header["kid"]]
        claims = jwt.decode(token, key, ["EdDSA"], audience="rolecall", issuer="rolecall")
        assert claims["sub"] == claims["client_id"] == reports["client_id"]
        assert (claims["aud"], claims["iss"], claims["type"]) == ("rolecall", "rolecall", "access")
        assert (claims["roles"], claims["fresh"]) == (["reader", "user"], False)
        assert claims["exp"] - claims["iat"] == 600
        assert not {"username", "csrf", "scope"} & claims.keys()
        headers = bearer(body["access_token"])
        assert (await client.get("/admin/users", headers=headers)).status_code == 200
        assert (await client.get("/admin/audit", headers=headers)).status_code == 403


async def test_a_scope_narrows_and_never_widens(
    client: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """What was asked for and is held; roles, which stand for more, are left out then."""
    body = (await granted(client, reports, scope="users:read")).json()
    assert body["scope"] == "users:read"
    claims = said(body["access_token"])
    assert (claims["permissions"], claims["scope"]) == (["users:read"], "users:read")
    assert claims["roles"] == []
    headers = bearer(body["access_token"])
    assert (await client.get("/admin/users", headers=headers)).status_code == 200
    assert (await client.get("/admin/roles", headers=headers)).status_code == 403
    whole = (await granted(client, reports, scope="users:read roles:read users:read")).json()
    assert said(whole["access_token"])["roles"] == ["reader", "user"]
    for scope in (
        "users:write", "users:read users:write", "*", "users:*", "admin", " users:read",
        "users:read  roles:read", "users:read\tx", "é", "a" * 65, "USERS:READ",
    ):  # fmt: skip
        answer = await granted(client, reports, scope=scope)
        assert answer.status_code == 400, scope
        expected = "invalid_request" if "\t" in scope else "invalid_scope"
        assert oauth(answer) == (400, expected), scope


async def test_no_scope_makes_a_token_that_is_refused_for_its_size(
    client: httpx.AsyncClient, admin: httpx.AsyncClient
) -> None:
    """One that does not fit is invalid_scope, and nothing is spent or written (81)."""
    await role(admin, "everything", "long:*")
    await made(admin, "ed", "user", "everything")
    app = await registered(
        admin, "user", "everything", grants=["client_credentials", "refresh_token"],
        audiences=["rolecall", "語" * 90],
    )  # fmt: skip
    names = [f"long:{number:02}".ljust(64, "x") for number in range(64)]
    tokens = await sign_in(client, "ed", PASSWORD, **through(app), transport="json")
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    for count in (64, 40, 24, 20):
        scope = " ".join(names[:count])
        refused = await granted(client, app, scope=scope)
        assert oauth(refused) == (400, "invalid_scope"), count
        refused = await client.post(TOKEN, data=form | {"scope": scope}, auth=auth(app))
        assert oauth(refused) == (400, "invalid_scope"), count
        assert names[0] not in refused.text
    query = {"target": app["client_id"], "action": "token.issued"}
    assert (await admin.get("/admin/audit", params=query)).json()["items"] == []
    scope = " ".join(names[:8])
    own = await granted(client, app, scope=scope)
    theirs = await client.post(TOKEN, data=form | {"scope": scope}, auth=auth(app))
    for answer in (own, theirs):
        assert (answer.status_code, answer.json()["scope"]) == (200, scope)
        token = answer.json()["access_token"]
        assert 1_000 < len(token) < 4_096
        assert (await client.get("/protected", headers=bearer(token))).status_code == 200


@ON_SQLITE
async def test_who_does_not_prove_who_it_is_gets_nothing(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """401 invalid_client with a Basic challenge, whatever is wrong, on all three endpoints."""
    public = await registered(admin, "user", public=True, grants=["refresh_token"])
    client_id, secret = auth(reports)
    wrong = [
        {},
        {"client_id": client_id},
        {"client_id": client_id, "client_secret": "wrong"},
        {"client_id": client_id, "client_secret": secret + "x"},
        {"client_id": str(uuid4()), "client_secret": secret},
        {"client_id": "' OR 1=1 --", "client_secret": secret},
        {"client_id": public["client_id"], "client_secret": secret},
        {"client_secret": secret},
    ]
    for path in (TOKEN, INTROSPECT, REVOKE):
        for form in wrong[:3] if path != TOKEN else wrong:
            assert oauth(await client.post(path, data=GRANT | form)) == (401, "invalid_client")
        for header in ("Basic", "Basic é".encode(), "Basic !!", "Basic Og==", f"Bearer {secret}"):
            answer = await client.post(path, data=GRANT, headers={"Authorization": header})
            assert oauth(answer) == (401, "invalid_client"), header
    assert secret not in answer.text
    # a public client cannot prove who it is: it may not ask about tokens
    answer = await client.post(INTROSPECT, data={"client_id": public["client_id"], "token": "x"})
    assert oauth(answer) == (401, "invalid_client")


@ON_SQLITE
async def test_a_malformed_request_is_invalid_request(
    client: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """Two ways of authentication, secrets in the query, twice the same, no form: 400."""
    client_id, secret = auth(reports)
    grant = {"grant_type": "client_credentials"}
    both = grant | {"client_secret": secret}
    other = grant | {"client_id": str(uuid4())}
    twice = "grant_type=client_credentials&grant_type=client_credentials"
    basic = "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()
    headers = FORM | {"Authorization": basic}
    asked = [
        client.post(TOKEN, data=both, auth=auth(reports)),
        client.post(TOKEN, data=other, auth=auth(reports)),
        client.post(TOKEN, data=GRANT, auth=auth(reports), params={"client_secret": secret}),
        client.post(TOKEN, data=GRANT, auth=auth(reports), params={"scope": "users:read"}),
        client.post(TOKEN, json=grant, auth=auth(reports)),
        client.post(TOKEN, auth=auth(reports)),
        client.post(TOKEN, content=twice, headers=headers),
        client.post(TOKEN, content="grant_type=%ff", headers=headers),
        client.post(TOKEN, content=b"grant_type=\xff", headers=headers),
        client.post(TOKEN, content="grant_type=a%00b", headers=headers),
        client.post(TOKEN, content="&".join(f"a{n}=1" for n in range(99)), headers=headers),
        client.post(TOKEN, content="scope=users%3Aread", headers=headers),
        client.post(TOKEN, data={"grant_type": ""}, auth=auth(reports)),
        client.post(TOKEN, data={"grant_type": "refresh_token"}, auth=auth(reports)),
        client.post(INTROSPECT, data={"token": ""}, auth=auth(reports)),
        client.post(REVOKE, data={"x": "y"}, auth=auth(reports)),
    ]
    for request in asked:
        answer = await request
        assert oauth(answer) == (400, "invalid_request"), answer.request.url
        assert secret not in answer.text
    for method in ("GET", "PUT", "DELETE"):
        assert (await client.request(method, TOKEN)).status_code == 405
    # what is not known is ignored (RFC 6749 section 3.2), Basic's halves are form-encoded
    quoted = base64.b64encode(f"{client_id.replace('-', '%2D')}:{secret}".encode()).decode()
    answer = await client.post(
        TOKEN, data=GRANT | {"resource": "x"}, headers={"Authorization": f"basic {quoted}"}
    )
    assert answer.status_code == 200


@ON_SQLITE
async def test_grants_that_are_not_given(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """An unknown grant, and one that this client may not use, have codes of their own."""
    for grant in ("password", "authorization_code", "implicit", "CLIENT_CREDENTIALS"):
        answer = await client.post(TOKEN, data={"grant_type": grant}, auth=auth(reports))
        assert oauth(answer) == (400, "unsupported_grant_type")
    none = await registered(admin, "user")
    assert oauth(await granted(client, none)) == (400, "unauthorized_client")
    path = f"{CLIENTS}/{reports['client_id']}"
    assert (await admin.patch(path, json={"grants": ["refresh_token"]})).status_code == 200
    assert oauth(await granted(client, reports)) == (400, "unauthorized_client")


@ON_SQLITE
async def test_wrong_secrets_are_throttled_and_a_right_one_is_not(
    app: AsyncFlask, admin: httpx.AsyncClient, parts: Parts, reports: dict[str, Any]
) -> None:
    """So many wrong ones are looked at, then 429 with Retry-After; sign-ins have another count.

    Those that were looked at are in the audit log.
    """
    most = parts.settings.login_failures_pair
    wrong = {**reports, "client_secret": "wrong"}
    async with client_of(app, "192.0.2.7") as client:
        statuses = [(await granted(client, wrong)).status_code for _ in range(most + 2)]
        assert statuses == [401] * most + [429] * 2
        answer = await granted(client, wrong)
        assert code(answer) == (429, "too_many_requests")
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await granted(client, reports)).status_code == 200
        await sign_in(client)
    query = {"target": reports["client_id"], "action": "client.refused"}
    log = (await admin.get("/admin/audit", params=query)).json()["items"]
    assert [row["ip"] for row in log] == ["192.0.2.7"] * most


@ON_SQLITE
async def test_a_client_id_has_one_spelling(
    client: httpx.AsyncClient, reports: dict[str, Any], admin: httpx.AsyncClient
) -> None:
    """Any other is an unknown client, with the right secret too: no spelling has its own count."""
    public = await registered(admin, "user", public=True, grants=["refresh_token"])
    for app in (reports, public):
        one = app["client_id"]
        digits = one.translate({ord("0") + n: 0x0660 + n for n in range(10)})
        for spelling in (one.upper(), one.replace("-", ""), f"{{{one}}}", f"urn:uuid:{one}", digits,
                         f" {one}", f"{one}-"):  # fmt: skip
            assert spelling != one
            form = {"client_id": spelling, "client_secret": app.get("client_secret", "")}
            for path in (TOKEN, REVOKE):
                answer = await client.post(path, data=GRANT | form)
                assert oauth(answer) == (401, "invalid_client"), spelling
    assert (await granted(client, reports)).status_code == 200


async def test_a_client_refreshes_what_was_issued_to_it(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """The next generation, narrowed if asked; another client's, or used twice, is invalid_grant."""
    await made(admin, "ed", "user", "reader", "admin")
    other = await registered(admin, "user", grants=["refresh_token"])
    tokens = await sign_in(client, "ed", PASSWORD, **through(reports), transport="json")
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    assert oauth(await client.post(TOKEN, data=form, auth=auth(other))) == (400, "invalid_grant")
    wide = form | {"scope": "users:write"}
    assert oauth(await client.post(TOKEN, data=wide, auth=auth(reports))) == (400, "invalid_scope")
    # neither of these spent it
    answer = await client.post(TOKEN, data=form | {"scope": "users:read"}, auth=auth(reports))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {
        "access_token", "token_type", "expires_in", "scope", "refresh_token",
    }  # fmt: skip
    claims = said(body["access_token"])
    assert (claims["permissions"], claims["roles"]) == (["users:read"], [])
    assert claims["username"] == "ed"
    again = await client.post(
        TOKEN, data=form | {"refresh_token": body["refresh_token"]}, auth=auth(reports)
    )
    assert said(again.json()["access_token"])["roles"] == ["reader", "user"]
    assert "csrf" not in said(again.json()["access_token"])
    reused = await client.post(TOKEN, data=form, auth=auth(reports))
    assert oauth(reused) == (400, "invalid_grant")
    # and the session is over
    headers = bearer(again.json()["access_token"])
    assert code(await client.get("/protected", headers=headers)) == (401, "token_revoked")
    direct = await sign_in(client, transport="json")
    for token in (
        direct["refresh_token"], direct["access_token"], again.json()["refresh_token"], "x.y.z",
        again.json()["access_token"],
    ):  # fmt: skip
        answer = await client.post(TOKEN, data=form | {"refresh_token": token}, auth=auth(reports))
        assert oauth(answer) == (400, "invalid_grant")


@ON_SQLITE
async def test_a_public_client_refreshes_without_a_secret(
    client: httpx.AsyncClient, admin: httpx.AsyncClient
) -> None:
    """By its client_id alone; with a secret it lies."""
    public = await registered(admin, "user", public=True, grants=["refresh_token"])
    tokens = await sign_in(client, **through(public), transport="json")
    form = {
        "grant_type": "refresh_token", "refresh_token": tokens["refresh_token"],
        "client_id": public["client_id"],
    }  # fmt: skip
    answer = await client.post(TOKEN, data=form | {"client_secret": "x"})
    assert oauth(answer) == (401, "invalid_client")
    answer = await client.post(TOKEN, data=form)
    assert (answer.status_code, answer.json()["token_type"]) == (200, "Bearer")
    answer = await client.post(TOKEN, data=form | {"grant_type": "client_credentials"})
    assert oauth(answer) == (400, "unauthorized_client")


async def asked(client: httpx.AsyncClient, app: dict[str, Any], token: object) -> dict[str, Any]:
    """Return what a client app is told about a token."""
    answer = await client.post(INTROSPECT, data={"token": str(token)}, auth=auth(app))
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json()


async def test_a_client_is_told_about_what_it_may_know_and_by_the_truth(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """Tokens issued to it, access tokens for its audiences; of all others nothing at all."""
    wiki = await registered(admin, "user", audiences=["wiki", "rolecall"])
    other = await registered(admin, "user", audiences=["other"], grants=["client_credentials"])
    tokens = await sign_in(client, **through(reports), transport="json")
    told = await asked(client, reports, tokens["access_token"])
    claims = said(tokens["access_token"])
    assert told == {
        "active": True, "token_type": "Bearer", "scope": "", "username": "testuser",
        **{n: claims[n] for n in ("client_id", "exp", "iat", "nbf", "sub", "aud", "iss", "jti")},
        **{n: claims[n] for n in ("sid", "type", "roles", "permissions")},
    }  # fmt: skip
    refresh = await asked(client, reports, tokens["refresh_token"])
    assert (refresh["active"], refresh["type"]) == (True, "refresh")
    assert "token_type" not in refresh
    # meant for one of its audiences; a refresh token is meant for nobody but this service
    assert (await asked(client, wiki, tokens["access_token"]))["active"] is True
    direct = await sign_in(client, transport="json")
    assert (await asked(client, wiki, direct["access_token"]))["username"] == "testuser"
    for app, token in (
        (wiki, tokens["refresh_token"]), (wiki, direct["refresh_token"]),
        (other, tokens["access_token"]), (other, direct["access_token"]),
        (reports, direct["access_token"]), (reports, direct["refresh_token"]),
        (reports, (await granted(client, other)).json()["access_token"]),
        (reports, "x"), (reports, tokens["access_token"][:-4] + "AAAA"),
        (reports, jwt.encode(claims, "x" * 32)),
    ):  # fmt: skip
        assert await asked(client, app, token) == INACTIVE
    # stale, spent, revoked
    me = claims["sub"]
    assert (await admin.put(f"/admin/users/{me}/roles", json={"roles": []})).is_success
    assert await asked(client, reports, tokens["access_token"]) == INACTIVE
    fresh = (await refreshed(client, reports, tokens["refresh_token"])).json()
    assert (await asked(client, reports, fresh["access_token"]))["active"] is True
    assert await asked(client, reports, tokens["refresh_token"]) == INACTIVE
    await client.post("/logout", headers=bearer(fresh["access_token"]))
    for token in (fresh["access_token"], fresh["refresh_token"]):
        assert await asked(client, reports, token) == INACTIVE
    # and of somebody who is disabled
    tokens = await sign_in(client, **through(reports), transport="json")
    assert (await admin.patch(f"/admin/users/{me}", json={"is_active": False})).is_success
    for token in (tokens["access_token"], tokens["refresh_token"]):
        assert await asked(client, reports, token) == INACTIVE


async def test_a_client_takes_back_what_was_issued_to_it(
    client: httpx.AsyncClient, admin: httpx.AsyncClient, reports: dict[str, Any]
) -> None:
    """An access token alone, a session with its refresh token; others' are answered and left."""
    other = await registered(admin, "user")
    tokens = await sign_in(client, **through(reports), transport="json")
    own = (await granted(client, reports)).json()["access_token"]
    access, refresh = tokens["access_token"], tokens["refresh_token"]

    async def revoke(app: dict[str, Any], token: object) -> None:
        answer = await client.post(REVOKE, data={"token": str(token)}, auth=auth(app))
        assert (answer.status_code, answer.content) == (200, b"")

    for token in (access, refresh, own, "x"):
        await revoke(other, token)
    for token in (access, own):
        assert (await client.get("/protected", headers=bearer(token))).status_code == 200
    await revoke(reports, own)
    await revoke(reports, access)
    for token in (access, own):
        answer = await client.get("/protected", headers=bearer(token))
        assert code(answer) == (401, "token_revoked")
    # the session lives on
    fresh = (await refreshed(client, reports, refresh)).json()
    await revoke(reports, fresh["refresh_token"])
    await revoke(reports, fresh["refresh_token"])
    answer = await client.get("/protected", headers=bearer(fresh["access_token"]))
    assert code(answer) == (401, "token_revoked")
    answer = await client.post("/refresh", headers=bearer(fresh["refresh_token"]))
    assert code(answer) == (401, "token_revoked")
    done = []
    for app in (reports, other):
        query = {"actor": app["client_id"]}
        log = (await admin.get("/admin/audit", params=query)).json()["items"]
        done.append([row["action"] for row in log])
    assert done == [["session.revoked", "token.revoked", "token.revoked", "token.issued"], []]


@ON_SQLITE
async def test_the_metadata_makes_no_url_of_what_names_no_host(client: httpx.AsyncClient) -> None:
    """A Host that is none is 400; an empty one means the server's own name."""
    path = "/.well-known/oauth-authorization-server"
    for host in ("a b", 'a"b', "127.0.0.1/..", "a@b"):
        answer = await client.get(path, headers={"Host": host})
        assert code(answer) == (400, "bad_request")
        assert "token_endpoint" not in answer.text
    found = (await client.get(path, headers={"Host": ""})).json()
    assert httpx.URL(found["token_endpoint"]).host


@ON_SQLITE
async def test_the_metadata_is_true(client: httpx.AsyncClient) -> None:
    """Every endpoint that it names is there, and takes what it says (RFC 8414)."""
    found = (await client.get("/.well-known/oauth-authorization-server")).json()
    assert found["issuer"] == "rolecall"
    assert found["response_types_supported"] == []
    assert (await client.get(found["jwks_uri"])).status_code == 200
    for name in ("token_endpoint", "introspection_endpoint", "revocation_endpoint"):
        assert oauth(await client.post(found[name], data={"x": "y"})) == (401, "invalid_client")
    document = (await client.get("/openapi.json")).json()
    schemes = document["components"]["securitySchemes"]
    flow = schemes["client_credentials"]["flows"]["clientCredentials"]
    assert flow["tokenUrl"] == "/oauth/token"
    assert "users:read" in flow["scopes"]
    described = document["paths"]["/oauth/token"]["post"]
    assert list(described["requestBody"]["content"]) == ["application/x-www-form-urlencoded"]
    assert "`invalid_grant`" in described["responses"]["400"]["description"]
