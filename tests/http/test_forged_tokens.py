"""Forged and altered tokens (properties 1 to 15): none gets in, and no refusal tells why."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwe
from joserfc.jwk import OctKey

from api.app import create_app
from api.asgi import AsyncFlask
from api.auth import keypairs
from api.auth.jws import LARGEST_TOKEN
from api.auth.tokens import RolecallJWTManager
from api.errors import InvalidToken, Refused, TokenExpired
from api.parts import EXTENSION, Parts
from api.settings import Settings
from tests.conftest import FUZZING, bearer, client_of, sign_in
from tests.http._forge import b64, encoded, fault, genuine, let_in, opened, signed

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Claims = dict[str, Any]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def changed(token: str, **header: Any) -> str:
    """Return a token with another header and the signature it had."""
    _, body, signature = token.split(".")
    return f"{encoded(opened(token)[0] | header)}.{body}.{signature}"


def resigned(token: str, key: Any, algorithm: str, **header: Any) -> str:
    """Return a token whose claims somebody else signed."""
    own, claims = opened(token)
    own = {name: value for name, value in own.items() if name != "alg"}
    return str(jwt.encode(claims, key, algorithm, headers=own | header))


def mac(token: str, key: bytes, algorithm: str = "HS256", **header: Any) -> str:
    """Return a token under an HMAC; PyJWT refuses to make one with a public key or none."""
    message = f"{encoded(opened(token)[0] | header | {'alg': algorithm})}.{token.split('.')[1]}"
    digest = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}[algorithm]
    return f"{message}.{b64(hmac.digest(key, message.encode(), digest))}"


def spellings(public: Any) -> dict[str, bytes]:
    """Return every form in which somebody may take a public key for an HMAC's secret."""
    der, pem = serialization.Encoding.DER, serialization.Encoding.PEM
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return {
        "pem": public.public_bytes(pem, info), "pem stripped": public.public_bytes(pem, info)[:-1],
        "der": public.public_bytes(der, info), "raw": raw, "raw in base64": b64(raw).encode(),
    }  # fmt: skip


# --- 1 to 3: the algorithm and the key ---


async def test_no_algorithm_but_the_keys_own(client: httpx.AsyncClient, parts: Parts) -> None:
    """``none`` in any casing, no signature, an HMAC under anything public, a foreign key (1-3)."""
    token, header, _ = await genuine(client)
    head, body, signature = token.split(".")
    forged = {"no signature": f"{head}.{body}.", "no dot": f"{head}.{body}"}
    for name in ("none", "None", "NONE", "nOnE", "none ", "", "null"):
        for end in ("", signature, "AA"):
            forged[f"alg {name!r} {end[:2]}"] = f"{encoded(header | {'alg': name})}.{body}.{end}"
    jwk = parts.keys.jwks()["keys"][0]
    public = spellings(parts.keys.current.public)
    public |= {
        "nothing": b"", "a NUL": b"\0", "the issuer": b"rolecall", "kid": header["kid"].encode(),
        "the JWK": json.dumps(jwk).encode(), "the JWKS": json.dumps(parts.keys.jwks()).encode(),
        "x": jwk["x"].encode(),
    }  # fmt: skip
    for name, key in public.items():
        for algorithm in ("HS256", "HS384", "HS512"):
            forged[f"{algorithm} with {name}"] = mac(token, key, algorithm)
    forged["HS256 without kid"] = mac(token, public["pem"], kid=None)
    foreign = {
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "RS256": rsa.generate_private_key(65_537, 2_048),
    }
    for algorithm, key in foreign.items():
        forged[f"foreign {algorithm}"] = resigned(token, key, algorithm)
        forged[f"foreign {algorithm} named EdDSA"] = changed(
            resigned(token, key, algorithm), alg="EdDSA"
        )
    forged["foreign PS256"] = resigned(token, foreign["RS256"], "PS256")
    for odd in (1, None, True, [], {}, ["EdDSA"], "eddsa", "EDDSA", "EdDSA ", "Ed25519", "HS256"):
        forged[f"alg {odd!r} signed"] = signed(parts, opened(token)[1], header | {"alg": odd})
    unnamed = {name: value for name, value in header.items() if name != "alg"}
    forged["no alg"] = signed(parts, opened(token)[1], unnamed)
    assert await let_in(client, forged) == {}
    assert (await client.get("/protected", headers=bearer(token))).status_code == 200


async def test_a_key_serves_its_own_algorithm_alone(
    client: httpx.AsyncClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old ES256 or RS256 key verifies what it signed by that name, and no other's (1)."""
    token, _, _ = await genuine(client)
    find = parts.keys.find
    others = {
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "RS256": rsa.generate_private_key(65_537, 2_048),
    }
    ring = {kid: keypairs.Key(kid, kid, key, key.public_key(), {}) for kid, key in others.items()}
    monkeypatch.setattr(parts.keys, "find", lambda kid: ring.get(kid) or find(kid))
    for name, key in others.items():
        own = resigned(token, key, name, kid=name)
        assert (await client.get("/protected", headers=bearer(own))).status_code == 200
        pem = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        forged = {
            f"{name} by HS256": mac(token, pem, kid=name),
            f"{name}'s kid, EdDSA": resigned(token, parts.keys.current.private, "EdDSA", kid=name),
            f"{name} by the other's kid": resigned(
                token, key, name, kid=next(kid for kid in ring if kid != name)
            ),
            f"{name} by the current kid": resigned(token, key, name),
        }
        if name == "RS256":
            forged |= {a: resigned(token, key, a, kid=name) for a in ("RS384", "PS256")}
        assert await let_in(client, forged) == {}


# --- 4 to 6: the header ---


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect every connection that is tried and every name that is asked for, but Redis's."""
    tried: list[Any] = []
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def connecting(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX:
                tried.append(address)
                raise OSError("no connection leaves this test")
            return original(self, address)

        return connecting

    def asked(*names: Any, **_: Any) -> Any:
        tried.append(names)
        raise socket.gaierror("no name is looked up in this test")

    monkeypatch.setattr(socket.socket, "connect", watched(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", watched(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    return tried


async def test_keys_that_a_token_brings_along_are_ignored(
    client: httpx.AsyncClient, parts: Parts, offline: list[Any]
) -> None:
    """jwk, jku, x5u, x5c: a forger's is refused, beside a good signature it is nothing (4)."""
    token, header, claims = await genuine(client)
    own = ed25519.Ed25519PrivateKey.generate()
    jwk = json.loads(jwt.get_algorithm_by_name("EdDSA").to_jwk(own.public_key()))
    brought: dict[str, dict[str, Any]] = {
        "jwk": {"jwk": jwk}, "jku": {"jku": "http://127.0.0.1:9/jwks.json"},
        "jku by name": {"jku": "https://attacker.example/jwks.json"},
        "jku file": {"jku": "file:///etc/passwd"}, "x5u": {"x5u": "http://127.0.0.1:9/cert.pem"},
        "x5c": {"x5c": [b64(own.public_key().public_bytes_raw())]}, "x5t": {"x5t": "AAAA"},
    }  # fmt: skip
    forged = {}
    for name, members in brought.items():
        forged[f"{name}, known kid"] = resigned(token, own, "EdDSA", **members)
        forged[f"{name}, own kid"] = resigned(token, own, "EdDSA", kid="mine", **members)
        nameless = {"alg": "EdDSA", "typ": "at+jwt"} | members
        message = f"{encoded(nameless)}.{encoded(claims)}"
        forged[f"{name}, no kid"] = f"{message}.{b64(own.sign(message.encode()))}"
    assert await let_in(client, forged) == {}
    for members in brought.values():
        ignored = signed(parts, claims, header | members)
        assert (await client.get("/protected", headers=bearer(ignored))).status_code == 200
    assert offline == []


async def test_a_kid_is_looked_up_and_nothing_else(
    client: httpx.AsyncClient, parts: Parts, offline: list[Any]
) -> None:
    """A path, SQL, a URL, no text, unknown, huge, none: 401, and no more than one look (5)."""
    _, header, claims = await genuine(client)
    looks = []
    read = parts.signing_keys.read

    async def counting() -> Any:
        looks.append(1)
        return await read()

    parts.signing_keys.read = counting  # type: ignore[method-assign]
    odd: tuple[Any, ...] = (
        "../../../../dev/null", "/etc/passwd", "' OR '1'='1", "x' UNION SELECT private --",
        "http://127.0.0.1:9/", "", " ", "\0", header["kid"].upper(), header["kid"] + " ",
        header["kid"][:-1], "\ud800", "x" * 4_000, "__class__", "${jndi:ldap://x}",
        0, 1, 1.5, True, None, [], {}, [header["kid"]], {"kid": header["kid"]},
    )  # fmt: skip
    forged = {repr(kid)[:40]: signed(parts, claims, header | {"kid": kid}) for kid in odd}
    forged["none"] = signed(parts, claims, {n: v for n, v in header.items() if n != "kid"})
    assert await let_in(client, forged) == {}
    assert sum(looks) <= 1
    assert offline == []


async def test_what_must_be_understood_is_not(client: httpx.AsyncClient, parts: Parts) -> None:
    """``crit`` of any kind, and a payload that is not base64 (RFC 7797): refused (6)."""
    _, header, claims = await genuine(client)
    odd: dict[str, dict[str, Any]] = {
        repr(crit): {"crit": crit}
        for crit in (["exp"], [], ["b64"], ["unknown"], None, "exp", 1, {}, [1], ["alg", "alg"])
    }
    odd["declared"] = {"crit": ["http://example.org/x"], "http://example.org/x": True}
    odd["b64"] = {"b64": False}
    odd["b64 declared"] = {"b64": False, "crit": ["b64"]}
    forged = {name: signed(parts, claims, header | members) for name, members in odd.items()}
    sign = parts.keys.current.private.sign
    message = f"{encoded(header | odd['b64 declared'])}.plain"
    forged["b64 done"] = f"{message}.{b64(sign(message.encode()))}"
    forged["detached"] = f"{encoded(header)}..{b64(sign(message.encode()))}"
    assert await let_in(client, forged) == {}


# --- 7: one kind is not another ---


async def test_kinds_of_token_exclude_each_other(client: httpx.AsyncClient, parts: Parts) -> None:
    """By ``type`` and by ``typ``, which must agree; either alone does not do (7)."""
    tokens = await sign_in(client, transport="json")
    access, refresh = opened(tokens["access_token"]), opened(tokens["refresh_token"])
    wrong = {"refresh": str(tokens["refresh_token"])}
    assert await let_in(client, wrong, "wrong_token_type") == {}
    access_token = {"access": str(tokens["access_token"])}
    assert (
        await let_in(client, access_token, "wrong_token_type", method="POST", path="/refresh") == {}
    )
    forged = {
        "access called refresh": signed(parts, access[1] | {"type": "refresh"}, access[0]),
        "refresh called access": signed(parts, refresh[1] | {"type": "access"}, refresh[0]),
        "access under rt+jwt": signed(parts, access[1], access[0] | {"typ": "rt+jwt"}),
        "refresh under at+jwt": signed(parts, refresh[1], refresh[0] | {"typ": "at+jwt"}),
        "refresh as access": signed(parts, refresh[1] | {"type": "access"}, access[0]),
    }
    for typ in ("JWT", "jwt", "dpop+jwt", "logout+jwt", "id+jwt", "secevent+jwt", "JOSE", "", None,
                "AT+JWT", "application/at+jwt", 1, ["at+jwt"], {}):  # fmt: skip
        forged[f"typ {typ!r}"] = signed(parts, access[1], access[0] | {"typ": typ})
    forged["no typ"] = signed(parts, access[1], {n: v for n, v in access[0].items() if n != "typ"})
    for kind in ("id", "client", "logout", "ACCESS", "", None, 1, ["access"], {"access": 1}):
        forged[f"type {kind!r}"] = signed(parts, access[1] | {"type": kind}, access[0])
    assert await let_in(client, forged) == {}
    assert await let_in(client, forged, method="POST", path="/refresh") == {}
    assert await let_in(client, forged, method="POST", path="/logout") == {}


# --- 8 to 12: the claims ---

ODD_NUMBERS: tuple[Any, ...] = (
    "9999999999", "", None, True, False, [], {}, [9_999_999_999], -1, -(2**63), 2**53 + 1, 2**63,
    10**30, 9_999_999_999.0, 9_999_999_999.5, 1e300, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
ODD_TEXTS: tuple[Any, ...] = (None, "", 0, 1, True, 1.5, [], {}, ["x"], {"x": 1})


async def test_every_claim_is_there_and_of_its_type(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Each missing, each of every wrong type; issuer and audience to the letter (8, 9, 11)."""
    _, header, claims = await genuine(client)
    required = ("type", "exp", "iat", "nbf", "jti", "sub", "sid", "iss", "aud", "ver", "fresh",
                "username", "roles", "permissions")  # fmt: skip
    odd: dict[str, Claims] = {
        f"no {name}": {n: v for n, v in claims.items() if n != name} for name in required
    }
    for name in ("exp", "iat", "nbf", "ver"):
        odd |= {f"{name} {value!r}": claims | {name: value} for value in ODD_NUMBERS}
    for name in ("sub", "sid", "jti", "iss", "aud", "username", "csrf"):
        odd |= {f"{name} {value!r}": claims | {name: value} for value in ODD_TEXTS}
    for name in ("sub", "sid", "jti"):
        own = claims[name]
        for value in ("x", own.upper(), own.replace("-", ""), "\ud800", f"{{{own}}}",
                      f"urn:uuid:{own}", own + "\n"):  # fmt: skip
            odd[f"{name} {value!r}"] = claims | {name: value}
    for name in ("roles", "permissions"):
        for value in (None, "admin", "*", {"admin": True}, 1, [1], [None], [["admin"]], True):
            odd[f"{name} {value!r}"] = claims | {name: value}
    for name in ("iss", "aud"):
        for value in ("Rolecall", "rolecall ", " rolecall", "rolecall/", "other", "*", "rolecal",
                      ["rolecall"], ["rolecall", "other"], "rolecall\0"):  # fmt: skip
            odd[f"{name} {value!r}"] = claims | {name: value}
    for value in ("true", None, [], {}, -1, 1.5, "1"):
        odd[f"fresh {value!r}"] = claims | {"fresh": value}
    forged = {name: signed(parts, said, header) for name, said in odd.items()}
    # a type that there is not goes with a typ that is not there
    for kind in ("foo", "Access", "", None, [], 1):
        for typ in (None, "", "foo+jwt"):
            said = {n: v for n, v in header.items() if n != "typ"} | ({"typ": typ} if typ else {})
            forged[f"type {kind!r}, typ {typ!r}"] = signed(parts, claims | {"type": kind}, said)
    for name, text in {
        "exp 1e999": json.dumps(claims).replace(str(claims["exp"]), "1e999"),
        "exp of 5,000 digits": json.dumps(claims).replace(str(claims["exp"]), "9" * 5_000),
        "not an object": "[]", "text": '"rolecall"', "null": "null", "nothing": " ",
        "two objects": json.dumps(claims) * 2, "unfinished": json.dumps(claims)[:-1],
        "500 deep": json.dumps(claims)[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}",
        "3,000 deep": "[" * 3_000 + "]" * 3_000, "a comment": "/**/" + json.dumps(claims),
    }.items():  # fmt: skip
        forged[name] = signed(parts, text, header)
    assert await let_in(client, forged) == {}


async def test_each_member_once_and_in_one_encoding(
    client: httpx.AsyncClient, parts: Parts
) -> None:
    """Twice in header, claims or within them; UTF-16, a BOM, bad UTF-8: not one reading (10)."""
    _, header, claims = await genuine(client)
    head, body = json.dumps(header), json.dumps(claims)
    forged = {}
    for name, value in claims.items():
        forged[f"claim {name} again"] = signed(
            parts, f"{body[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}", header
        )
    forged["claim roles first"] = signed(parts, '{"roles": ["admin"], ' + body[1:], header)
    forged["claim by escape"] = signed(parts, body[:-1] + ', "\\u0073ub": "x"}', header)
    forged["within a claim"] = signed(parts, body[:-1] + ', "x": {"a": 1, "a": 2}}', header)
    for name, value in header.items():
        forged[f"header {name} again"] = signed(
            parts, claims, f"{head[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}"
        )
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"):
        forged[f"claims in {encoding}"] = signed(parts, body.encode(encoding), header)
        forged[f"header in {encoding}"] = signed(parts, claims, head.encode(encoding))
    forged["bad UTF-8"] = signed(parts, body[:-1].encode() + b', "x": "\xff"}', header)
    forged["a surrogate in UTF-8"] = signed(
        parts, body[:-1].encode() + b', "x": "\xed\xa0\x80"}', header
    )
    assert await let_in(client, forged) == {}


@pytest.fixture
async def lenient(settings: Settings) -> AsyncIterator[AsyncFlask]:
    """A service that accepts tokens for 30 s after their end, and as long before their time."""
    app = create_app(replace(settings, leeway=30))
    async with app.running():
        yield app


class Clock:
    """``time.time`` and ``datetime.now`` of whoever reads tokens, at a moment that we name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        here = self

        class Fixed(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.fromtimestamp(here.now, tz or UTC)

        monkeypatch.setattr("jwt.api_jwt.datetime", Fixed)
        monkeypatch.setattr("api.auth.tokens.time", SimpleNamespace(time=lambda: here.now))


@pytest.mark.parametrize("leeway", [0, 30])
async def test_the_edges_of_time_are_to_the_second(
    app: AsyncFlask, lenient: AsyncFlask, leeway: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp, nbf and iat with leeway and without: in at the edge, out one step beyond (12)."""
    app = lenient if leeway else app
    parts: Parts = app.extensions[EXTENSION]
    manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]
    async with client_of(app) as client:
        _, header, claims = await genuine(client)
    clock = Clock(monkeypatch)
    now = int(clock.now)
    clock.now = float(now)

    def outcome(token: str) -> str:
        with app.app_context():
            try:
                manager.read(token)
            except Refused as refusal:
                return refusal.code
        return "read"

    def at(**times: int) -> str:
        return signed(parts, claims | {"iat": now, "nbf": now, "exp": now + 300} | times, header)

    assert outcome(at(exp=now - leeway + 1)) == "read"
    assert outcome(at(exp=now - leeway)) == "token_expired"
    assert outcome(at(exp=now - leeway - 1)) == "token_expired"
    assert outcome(at(exp=0)) == "token_expired"
    assert outcome(at(exp=2**53)) == "read"
    for name in ("nbf", "iat"):
        assert outcome(at(**{name: now + leeway})) == "read"
        assert outcome(at(**{name: now + leeway + 1})) == "invalid_token"
    # what was read a second before its end is remembered, and not a second longer (15)
    token = at(exp=now + 10)
    for step, expected in (
        (9, "read"),
        (9.999, "read"),
        (10, "token_expired"),
        (11, "token_expired"),
    ):
        clock.now = now + leeway + step
        assert outcome(token) == expected, step


# --- 13 and 14: the form ---


async def test_forms_that_are_no_compact_jws(client: httpx.AsyncClient, parts: Parts) -> None:
    """JWE, JWS in JSON, detached, nested, over 8 KiB; the largest that is allowed works (13)."""
    token, header, claims = await genuine(client)
    head, body, signature = token.split(".")
    key = OctKey.import_key(b"k" * 32)
    forged = {
        "JWE": jwe.encrypt_compact({"alg": "dir", "enc": "A128CBC-HS256"}, token, key),
        "JWE called ours": jwe.encrypt_compact(
            {"alg": "dir", "enc": "A256GCM", **{n: header[n] for n in ("kid", "typ")}}, token, key
        ),
        "nested": signed(parts, token, header | {"cty": "JWT"}),
        "four parts": f"{token}.{signature}", "one part": head, "two parts": f"{head}.{body}",
        "empty parts": "..", "no claims": f"{head}..{signature}", "no head": f".{body}.{signature}",
        "swapped": f"{body}.{head}.{signature}", "quoted": f'"{token}"', "twice": token + token,
    }  # fmt: skip
    flat = {"payload": body, "protected": head, "signature": signature}
    general = {"payload": body, "signatures": [{"protected": head, "signature": signature}]}
    for name, form in {"flat": flat, "general": general}.items():
        forged[f"{name} JSON"] = json.dumps(form)
        forged[f"{name} JSON, compact"] = json.dumps(form, separators=(",", ":"))
    short = len(signed(parts, claims | {"x": ""}, header))
    fill = (LARGEST_TOKEN - short) * 3 // 4
    sizes = [signed(parts, claims | {"x": "x" * (fill + n)}, header) for n in range(-4, 5)]
    largest = max((made for made in sizes if len(made) <= LARGEST_TOKEN), key=len)
    forged["too long"] = min((made for made in sizes if len(made) > LARGEST_TOKEN), key=len)
    forged["far too long"] = signed(parts, claims | {"x": "x" * 20_000}, header)
    assert await let_in(client, forged) == {}
    assert LARGEST_TOKEN - len(largest) < 4
    assert (await client.get("/protected", headers=bearer(largest))).status_code == 200


async def test_base64_has_one_spelling(client: httpx.AsyncClient) -> None:
    """Padding, the other alphabet, spare bits, space and a lone character: none of it (14)."""
    token, _, _ = await genuine(client)
    parts = token.split(".")
    forged = {}
    for index, part in enumerate(parts):
        spare = {
            "=": f"{part}=", "==": f"{part}==", "+": f"{part[:-1]}+", "/": f"{part[:-1]}/",
            "%3D": f"{part}%3D", "a lone character": f"{part}A", "~": f"{part[:-1]}~",
            "in front": f"={part}", "amid": f"{part[:4]}={part[4:]}", "empty": "",
        }  # fmt: skip
        for space in ("\t", "\v", "\f"):
            # at the very end it is the header's, and no part of the token
            spare[f"{space!r} amid"] = f"{part[:4]}{space}{part[4:]}"
            spare[f"{space!r} in front"] = f"{space}{part}"
        if len(part) % 4:
            last = ALPHABET.index(part[-1])
            for bit in range(1, {2: 16, 3: 4}[len(part) % 4]):
                spare[f"spare bits {bit}"] = part[:-1] + ALPHABET[last ^ bit]
        for name, odd in spare.items():
            forged[f"{name} in {index}"] = ".".join([*parts[:index], odd, *parts[index + 1 :]])
    assert any("spare" in name for name in forged)
    assert await let_in(client, forged) == {}


@pytest.fixture
async def reading(app: AsyncFlask, client: httpx.AsyncClient) -> Reading:
    """A genuine token that is remembered, and who reads tokens."""
    token, _, _ = await genuine(client)
    other = (await sign_in(client, "admin", "adminpass", transport="json"))["access_token"]
    for known in (token, other):
        assert (await client.get("/protected", headers=bearer(known))).status_code == 200
    return Reading(app, token, str(other))


class Reading:
    """Reads tokens without HTTP."""

    def __init__(self, app: AsyncFlask, token: str, other: str) -> None:
        self.app, self.token, self.other = app, token, other
        self.manager: RolecallJWTManager = app.extensions["flask-jwt-extended"]

    def accepted(self, token: str) -> bool:
        """Return whether a token is read. Whatever is raised but a refusal is an error."""
        try:
            self.manager.read(token)
        except (InvalidToken, TokenExpired):
            return False
        return True


async def test_no_single_byte_can_be_another(reading: Reading) -> None:
    """Every position of a genuine token, every other bit: none is accepted (15).

    Every other byte too, in its header and its signature, and everywhere under ``make fuzz``.
    """
    token = reading.token
    claims = range(token.index(".") + 1, token.rindex("."))
    found = []
    with reading.app.app_context():
        assert reading.accepted(token)
        for index, here in enumerate(token):
            bits = [ord(here) ^ 1 << bit for bit in range(8)]
            for other in map(chr, bits if index in claims and not FUZZING else range(256)):
                odd = token[:index] + other + token[index + 1 :]
                if other != here and reading.accepted(odd):
                    found.append((index, other))
        for index in range(len(token)):
            for odd in (token[:index], token[index + 1 :], token[:index] + token[index + 1 :]):
                assert not reading.accepted(odd), index
        for index in range(len(token) + 1):
            for more in ("A", ".", "=", "\n", " ", "\0"):
                assert not reading.accepted(token[:index] + more + token[index:]), (index, more)
        assert reading.accepted(token)
    assert found == []


async def test_no_mixture_of_genuine_tokens_is_one(reading: Reading) -> None:
    """Header, claims and signature of two genuine tokens, in every mixture and order (15)."""
    pieces = reading.token.split(".") + reading.other.split(".")
    accepted = set()
    with reading.app.app_context():
        for one in pieces:
            for two in pieces:
                for three in pieces:
                    if reading.accepted(token := f"{one}.{two}.{three}"):
                        accepted.add(token)
    assert accepted == {reading.token, reading.other}


MEMBER = st.sampled_from(["alg", "typ", "kid", "crit", "jwk", "jku", "x5u", "b64", "cty", "zip"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip
HEADERS = st.dictionaries(MEMBER | st.text(max_size=8), JSON_VALUES, min_size=1, max_size=4)


async def test_no_mutation_is_accepted(reading: Reading) -> None:
    """Cut, spliced, repeated, rewritten: whatever differs from the genuine token is refused."""
    token = reading.token
    header, claims = opened(token)
    parts = token.split(".")
    places = st.integers(0, len(token))

    @given(places, places, st.text(max_size=12) | st.text(ALPHABET + ".=", max_size=12))
    def spliced(start: int, end: int, put: str) -> None:
        odd = token[:start] + put + token[end:]
        assert odd == token or not reading.accepted(odd)

    @given(HEADERS)
    def with_another_header(members: dict[str, Any]) -> None:
        # json.dumps puts spaces where the original has none: never the same text
        assert not reading.accepted(".".join([encoded(header | members), *parts[1:]]))

    @given(st.dictionaries(st.sampled_from(list(claims)), JSON_VALUES, min_size=1))
    def with_other_claims(said: dict[str, Any]) -> None:
        assert not reading.accepted(".".join([parts[0], encoded(claims | said), parts[2]]))

    @given(st.text() | st.binary().map(b64) | st.lists(st.binary().map(b64)).map(".".join))
    def anything(odd: str) -> None:
        assert not reading.accepted(odd)

    with reading.app.app_context():
        for attempt in (spliced, with_another_header, with_other_claims, anything):
            attempt()


async def test_a_refusal_over_http_tells_nothing(client: httpx.AsyncClient) -> None:
    """What is refused for different reasons is told the same (22)."""
    token, _, _ = await genuine(client)
    head, body, signature = token.split(".")
    odd = ("x", "a.b.c", f"{head}.{body}.", f"{head}.{body}.{signature[:-4]}AAAA", "." * 100,
           mac(token, b""), f"{encoded({'alg': 'none'})}.{body}.")  # fmt: skip
    answers = [await client.get("/protected", headers=bearer(token)) for token in odd]
    assert [fault(answer) for answer in answers] == [None] * len(odd)
    said = [answer.json() | {"request_id": ""} for answer in answers]
    assert all(document == said[0] for document in said)
