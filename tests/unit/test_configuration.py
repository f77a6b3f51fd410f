"""Settings: typed, defaulted, refused all at once and by name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from api.errors import StartupError, catalogue
from api.http import client_address
from api.settings import SettingsError, load

CONTRACT = {
    "bad_request": 400, "malformed_json": 400, "missing_token": 401, "invalid_token": 401,
    "token_expired": 401, "token_revoked": 401, "token_stale": 401, "wrong_token_type": 401,
    "fresh_token_required": 401, "bad_credentials": 401, "refresh_reused": 401,
    "insufficient_role": 403, "insufficient_permission": 403, "csrf_failed": 403,
    "registration_closed": 403, "not_found": 404, "method_not_allowed": 405,
    "request_timeout": 408, "conflict": 409, "username_taken": 409, "role_exists": 409,
    "last_admin": 409, "body_too_large": 413, "unsupported_media_type": 415,
    "validation_failed": 422, "weak_password": 422, "too_many_requests": 429,
    "internal_error": 500, "unavailable": 503,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is set but the data folder; what a test sets or reads from .env is undone."""
    for name in list(os.environ):
        if name.startswith(("ROLECALL_", "JWT_")) or name in {"SECRET_KEY", "REDIS_URL"}:
            monkeypatch.delenv(name)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("ROLECALL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_contracts() -> None:
    """Without an environment everything has the value that the contract names."""
    found = load()
    assert (found.bind, found.workers) == ("127.0.0.1:8000", 1)
    assert (found.access_expires, found.refresh_expires) == (300, 604_800)
    assert (found.session_max_age, found.refresh_grace) == (2_592_000, 10)
    assert found.token_location == ("headers", "cookies")
    assert (found.cookie_secure, found.cookie_csrf_protect) == (True, True)
    assert (found.issuer, found.audience) == ("rolecall", "rolecall")
    assert (found.registration_open, found.cors_origins, found.trusted_proxies) == (False, (), 0)
    assert found.key_rotation_days == 0
    assert found.redis_url is None
    assert found.database_url.startswith("sqlite+aiosqlite:///")
    assert found.max_body_bytes == 65_536
    assert found.cookie_prefix == "__Host-"
    assert load(demo=True).cookie_secure is False


def test_all_faults_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal names every faulty variable, and no good one."""
    wrong = {
        "ROLECALL_WORKERS": "many", "DATABASE_URL": "mysql://x", "REDIS_URL": "http://x",
        "SECRET_KEY": "short", "JWT_TOKEN_LOCATION": "headers,pigeon", "ROLECALL_BIND": "nowhere",
        "JWT_ACCESS_TOKEN_EXPIRES": "0", "ROLECALL_REGISTRATION": "maybe",
        "ROLECALL_CORS_ORIGINS": "*", "JWT_ALGORITHM": "HS256", "JWT_COOKIE_SECURE": "perhaps",
    }  # fmt: skip
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    assert set(caught.value.faults) == set(wrong)
    assert "short" not in str(caught.value)


def test_a_dotenv_is_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """.env sets what the environment does not."""
    monkeypatch.setenv("ROLECALL_ISSUER", "from-environment")
    monkeypatch.setenv("ROLECALL_AUDIENCE", "placeholder")
    monkeypatch.delenv("ROLECALL_AUDIENCE")
    (tmp_path / ".env").write_text("ROLECALL_ISSUER=from-file\nROLECALL_AUDIENCE=from-file\n")
    found = load()
    monkeypatch.delenv("ROLECALL_AUDIENCE", raising=False)
    assert (found.issuer, found.audience) == ("from-environment", "from-file")


def test_a_dotenv_leaves_no_password_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What only the supervisor needs is read from .env and not passed on to child processes."""
    mine = {
        "ROLECALL_ADMIN_USERNAME": "root", "ROLECALL_ADMIN_PASSWORD": "harbour-Lantern-42",
        "SECRET_KEY_OLD": "Zp3kW8vQ2nR5tXw9zB3fH6mP0sD4gL7y",
    }  # fmt: skip
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in mine.items()))
    found = load()
    assert (found.admin_username, found.admin_password) == ("root", "harbour-Lantern-42")
    assert not mine.keys() & os.environ.keys()
    monkeypatch.setenv("ROLECALL_ADMIN_PASSWORD", "given-Lantern-42")
    assert load().admin_password == "given-Lantern-42"
    assert os.environ["ROLECALL_ADMIN_PASSWORD"] == "given-Lantern-42"


def test_the_generated_secret_is_kept_and_private(tmp_path: Path) -> None:
    """Made once, 0600 in a 0700 folder, the same after a restart, in no repr (property 58)."""
    first = load()
    path = tmp_path / "data" / "secret_key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load().secret_key == first.secret_key
    assert first.secret_key not in repr(first)
    for unusable, reason in (
        ("tiny", "has 4 bytes"),
        ("09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7\n", "publicly known"),
        ("super-secret-key-change-me-in-production", "made of words"),
    ):
        path.write_text(unusable)
        with pytest.raises(StartupError, match=reason) as caught:
            load()
        assert unusable.strip() not in str(caught.value)


def test_a_publicly_known_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the setting, with the reason; the secret itself is not repeated (58)."""
    known = "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7"
    for value in (known, f"{known}\n", f"  {known}"):
        monkeypatch.setenv("SECRET_KEY", value)
        with pytest.raises(SettingsError, match="publicly known") as caught:
            load()
        assert set(caught.value.faults) == {"SECRET_KEY"}
        assert known not in str(caught.value)


def test_demo_serves_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Well-known passwords are not offered to the network."""
    for bind in ("0.0.0.0:8000", "192.168.1.1:80", "[::]:80", "example.org:80"):
        monkeypatch.setenv("ROLECALL_BIND", bind)
        with pytest.raises(SettingsError, match="loopback"):
            load(demo=True)
    for bind in ("127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/x"):
        monkeypatch.setenv("ROLECALL_BIND", bind)
        assert load(demo=True).demo


# 412 came with If-Match on users.
LATER = {"precondition_failed": 412}


def test_the_codes_are_the_contracts() -> None:
    """Every code has the status that the contract gives it, and there are few others."""
    assert {code: error.status for code, error in catalogue().items()} == CONTRACT | LATER


@pytest.mark.parametrize(
    ("forwarded", "proxies", "expected"),
    [
        ([], 0, "9.9.9.9"), (["1.1.1.1"], 0, "9.9.9.9"), (["1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1"], 1, "1.1.1.1"), (["6.6.6.6", "1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 1.1.1.1, 2.2.2.2"], 2, "1.1.1.1"), ([], 1, "9.9.9.9"),
        (["1.1.1.1:5678"], 1, "1.1.1.1"), (["[2001:db8::1]:99"], 1, "2001:db8::1"),
        (["2001:db8::1"], 1, "2001:db8::1"), (["nonsense"], 1, "9.9.9.9"),
        (["fe80::1%" + "z" * 99], 1, "fe80::1"), (["::ffff:1.1.1.1"], 1, "1.1.1.1"),
    ],
)  # fmt: skip
def test_forwarded_addresses_are_counted_from_the_right(
    forwarded: list[str], proxies: int, expected: str
) -> None:
    """What a client writes into X-Forwarded-For itself is never believed."""
    assert client_address("9.9.9.9", forwarded, proxies) == expected
