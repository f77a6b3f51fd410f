"""`rolecall serve` that ends TLS itself: HTTP/2 and HTTP/1.1 by what the handshake agrees on."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import h2.connection
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from h2.settings import SettingCodes

from api.http import HEADERS
from tests.live import _serve
from tests.live._serve import ROOT, Serving, wait_until

LOGIN = {"username": "testuser", "password": "testpass"}
PROTOCOLS = pytest.mark.parametrize("http2", [True, False], ids=["HTTP/2", "HTTP/1.1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for the loopback, and a hypercorn.toml that names it."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rolecall")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, form, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(private)
    (folder / "tls.crt").write_bytes(certificate.public_bytes(pem))
    lines = [f"certfile = '{folder / 'tls.crt'}'", f"keyfile = '{folder / 'tls.key'}'"]
    config = (ROOT / "hypercorn.toml").read_text()
    shorter = config.replace("graceful_timeout = 15", "graceful_timeout = 2")
    assert shorter != config
    (folder / "hypercorn.toml").write_text("\n".join([shorter, *lines]))
    return folder


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Serving]:
    """One worker that everybody shares."""
    found = _serve.start(folder, "--demo", cwd=folder, JWT_COOKIE_SECURE="true")
    yield found
    assert found.stop() == 0
    assert "Traceback" not in found.log.read_text()


@asynccontextmanager
async def client_of(folder: Path, url: str, *, http2: bool) -> AsyncIterator[httpx.AsyncClient]:
    """A client with one connection, that trusts the certificate."""
    trusting = ssl.create_default_context(cafile=str(folder / "tls.crt"))
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(
        base_url=url.replace("http://", "https://"), verify=trusting, http2=http2, http1=not http2,
        timeout=20, limits=limits,
    ) as client:  # fmt: skip
        yield client


async def bare(folder: Path) -> tuple[asyncio.subprocess.Process, str]:
    """Start the application that can be slow; return its process and URL."""
    log = folder / "bare.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.live._server_app", "127.0.0.1:0", "1",
            str(folder / "hypercorn.toml"), stdout=out, stderr=out, cwd=ROOT,
        )  # fmt: skip
    await asyncio.to_thread(wait_until, lambda: "ready " in log.read_text())
    return process, log.read_text().partition("ready ")[2].split()[0]


@PROTOCOLS
async def test_a_browsers_session_over_tls(folder: Path, serving: Serving, http2: bool) -> None:
    """Sign in, be let in, refresh, sign out: with cookies that only TLS carries."""
    async with client_of(folder, serving.url, http2=http2) as client:
        answer = await client.post("/login", json=LOGIN | {"transport": "cookies"})
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2" if http2 else "HTTP/1.1")
        cookies = answer.headers.get_list("Set-Cookie")
        assert cookies
        assert all("; Secure;" in cookie and cookie.startswith("__Host-") for cookie in cookies)
        assert (await client.get("/protected")).status_code == 200
        assert (await client.post("/refresh")).status_code == 403
        for path, token in (("/refresh", "refresh"), ("/logout", "access")):
            csrf = {"X-CSRF-TOKEN": client.cookies[f"__Host-csrf_{token}_token"]}
            answer = await client.post(path, headers=csrf)
            assert answer.status_code == 200, answer.text
        answer = await client.get("/protected")
        assert answer.status_code == 401
        assert answer.json()["code"] == "missing_token"
        assert answer.headers.items() >= {k.lower(): v for k, v in HEADERS.items()}.items()
        assert "server" not in answer.headers


@PROTOCOLS
async def test_many_requests_at_once_over_one_connection(
    folder: Path, serving: Serving, http2: bool
) -> None:
    """Each gets its own answer, whatever else is refused there."""
    async with client_of(folder, serving.url, http2=http2) as client:
        body = LOGIN | {"transport": "json"}
        token = (await client.post("/login", json=body)).json()["access_token"]

        async def ask(number: int) -> None:
            ours, headers = f"id-{number}", {"X-Request-ID": f"id-{number}"}
            if number % 2:
                headers["Authorization"] = f"Bearer {token}"
            answer = await client.get("/protected", headers=headers)
            assert answer.status_code == (200 if number % 2 else 401)
            assert answer.headers["X-Request-ID"] == ours

        await asyncio.gather(*(ask(number) for number in range(200)))


@PROTOCOLS
async def test_a_body_that_is_too_long_ends_no_other_request(
    folder: Path, serving: Serving, http2: bool
) -> None:
    """It is refused before it has come to its end, and what is asked next is answered."""
    async with client_of(folder, serving.url, http2=http2) as client:
        for _ in range(3):
            beside = asyncio.create_task(client.get("/health/live"))
            answer = await client.post("/login", content=b"x" * 3_000_000)
            assert answer.status_code == 413
            assert answer.json()["code"] == "body_too_large"
            assert (await beside).status_code == 200


@PROTOCOLS
async def test_a_stop_answers_what_is_asked_or_says_that_it_does_not(
    folder: Path, http2: bool
) -> None:
    """Over TLS as without it: within graceful_timeout the answer, then 503, and exit code 0."""
    process, url = await bare(folder)
    assert url.startswith("https://")
    async with (
        client_of(folder, url, http2=http2) as one,
        client_of(folder, url, http2=http2) as other,
    ):
        soon = asyncio.create_task(one.get("/slow?1"))
        late = asyncio.create_task(other.get("/slow?30"))
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert (await soon).status_code == 200
        told = await late
    assert (told.status_code, told.json()["code"]) == (503, "unavailable")
    assert "it may have been done" in told.json()["detail"]
    assert await asyncio.wait_for(process.wait(), 10) == 0
    assert "Traceback" not in (folder / "bare.log").read_text()


@PROTOCOLS
async def test_a_client_that_hears_nothing_does_not_hold_up_the_end(
    folder: Path, http2: bool
) -> None:
    """It neither reads its answer nor says that it has heard of the end: exit code 0, in time."""
    process, url = await bare(folder)
    trusting = ssl.create_default_context(cafile=str(folder / "tls.crt"))
    trusting.set_alpn_protocols(["h2" if http2 else "http/1.1"])
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as plain:
        wire = trusting.wrap_socket(plain, server_hostname="127.0.0.1")
        if http2:
            client = h2.connection.H2Connection()
            client.initiate_connection()
            # room for all there is, of which nothing is read: what is cut off cannot be told
            client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
            client.increment_flow_control_window(2**30)
            for stream, path in ((1, "/big?5000000"), (3, "/slow?30")):
                names = {":method": "GET", ":path": path, ":scheme": "https", ":authority": "it"}
                client.send_headers(stream, list(names.items()), end_stream=True)
            wire.sendall(client.data_to_send())
        else:
            wire.sendall(b"GET /slow?30 HTTP/1.1\r\nHost: it\r\n\r\n")
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        # graceful_timeout, and some seconds for a farewell
        assert await asyncio.wait_for(process.wait(), 15) == 0
        wire.close()
