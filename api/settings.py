"""Every setting: typed, read once from the environment, refused with all faults at once."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from environs import Env, EnvValidationError
from marshmallow import ValidationError, validate

from api.auth.claims import LONGEST_ISSUER
from api.errors import StartupError
from api.secret import weakness

LOCATIONS = ("headers", "cookies", "query_string", "json")
ALGORITHMS = ("EdDSA", "ES256", "RS256")
# What the process that prepares the database is given, and no worker and no Redis needs.
SUPERVISOR_ONLY = ("ROLECALL_ADMIN_USERNAME", "ROLECALL_ADMIN_PASSWORD", "SECRET_KEY_OLD")
ASYNC_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}


class SettingsError(StartupError):
    """One or more settings are wrong; the message has a line for each, by name."""

    def __init__(self, faults: dict[str, list[str]]) -> None:
        lines = [f"  {name}: {' '.join(messages)}" for name, messages in sorted(faults.items())]
        super().__init__("These settings need mending:\n" + "\n".join(lines))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator decides. Durations are seconds, sizes are bytes."""

    secret_key: str = field(repr=False)
    bind: str = "127.0.0.1:8000"
    workers: int = 1
    data_dir: Path = Path(".rolecall")
    database_url: str = field(default="", repr=False)
    redis_url: str | None = field(default=None, repr=False)
    access_expires: int = 300
    refresh_expires: int = 604_800
    session_max_age: int = 2_592_000
    refresh_grace: int = 10
    leeway: int = 0
    algorithm: str = "EdDSA"
    key_rotation_days: int = 0
    token_location: tuple[str, ...] = ("headers", "cookies")
    cookie_secure: bool = True
    cookie_csrf_protect: bool = True
    issuer: str = "rolecall"
    audience: str = "rolecall"
    registration_open: bool = False
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: int = 0
    metrics_bind: str | None = None
    admin_username: str | None = None
    admin_password: str | None = field(default=None, repr=False)
    demo: bool = False
    max_body_bytes: int = 65_536
    body_timeout: float = 10.0
    log_level: str = "INFO"
    # Only tests lower these: a real hash profile is the point of argon2.
    argon2_memory_kib: int = 19_456
    argon2_iterations: int = 2
    redis_prefix: str = "rolecall:"
    # Failed sign-ins within the window that are answered 401 before 429 begins.
    login_window: int = 300
    login_failures_pair: int = 10
    login_failures_account: int = 50
    login_failures_address: int = 100
    # Of an IPv6 /56 and /48: twice and four times those above, where they are not given.
    login_failures_pair_56: int | None = None
    login_failures_pair_48: int | None = None
    login_failures_address_56: int | None = None
    login_failures_address_48: int | None = None

    @property
    def cookie_prefix(self) -> str:
        """``__Host-`` binds a cookie to this host and to TLS, which browsers enforce."""
        return "__Host-" if self.cookie_secure else ""


def load(*, demo: bool = False, dotenv: Path | None = Path(".env")) -> Settings:
    """Read settings from the environment and from ``dotenv``, which never overrides it.

    Raises ``SettingsError`` that names every fault there is.
    """
    env = Env(eager=False, expand_vars=False)
    if dotenv is not None and dotenv.is_file():
        env.read_env(str(dotenv), recurse=False)
    positive = validate.Range(min=1)
    data_dir = Path(env.str("ROLECALL_DATA_DIR", ".rolecall") or ".rolecall")
    values: dict[str, Any] = {
        "bind": env.str("ROLECALL_BIND", "127.0.0.1:8000", validate=_address),
        "workers": env.int("ROLECALL_WORKERS", 1, validate=validate.Range(1, 256)),
        "data_dir": data_dir,
        "database_url": env.str("DATABASE_URL", "", validate=_database_url),
        "redis_url": env.str("REDIS_URL", "", validate=_redis_url) or None,
        "access_expires": env.int("JWT_ACCESS_TOKEN_EXPIRES", 300, validate=positive),
        "refresh_expires": env.int("JWT_REFRESH_TOKEN_EXPIRES", 604_800, validate=positive),
        "session_max_age": env.int("ROLECALL_SESSION_MAX_AGE", 2_592_000, validate=positive),
        "refresh_grace": env.int("ROLECALL_REFRESH_GRACE", 10, validate=validate.Range(0, 300)),
        "leeway": env.int("JWT_DECODE_LEEWAY", 0, validate=validate.Range(0, 300)),
        "algorithm": env.str("JWT_ALGORITHM", "EdDSA", validate=validate.OneOf(ALGORITHMS)),
        "key_rotation_days": env.int(
            "ROLECALL_KEY_ROTATION_DAYS", 0, validate=validate.Range(0, 3_650)
        ),
        "token_location": _words(env, "JWT_TOKEN_LOCATION", "headers,cookies", _location),
        "cookie_secure": env.bool("JWT_COOKIE_SECURE", not demo),
        "cookie_csrf_protect": env.bool("JWT_COOKIE_CSRF_PROTECT", True),
        "issuer": env.str("ROLECALL_ISSUER", "rolecall", validate=_issuer),
        "audience": env.str("ROLECALL_AUDIENCE", "rolecall", validate=validate.Length(1, 255)),
        "registration_open": env.str(
            "ROLECALL_REGISTRATION", "closed", validate=validate.OneOf(["closed", "open"])
        )
        == "open",
        "cors_origins": _words(env, "ROLECALL_CORS_ORIGINS", "", _origin),
        "trusted_proxies": env.int("ROLECALL_TRUSTED_PROXIES", 0, validate=validate.Range(0, 16)),
        "metrics_bind": env.str("ROLECALL_METRICS_BIND", "", validate=_optional_address) or None,
        "admin_username": env.str("ROLECALL_ADMIN_USERNAME", "") or None,
        "admin_password": env.str("ROLECALL_ADMIN_PASSWORD", "") or None,
        "max_body_bytes": env.int("ROLECALL_MAX_BODY_BYTES", 65_536, validate=positive),
        "body_timeout": env.float("ROLECALL_BODY_TIMEOUT", 10.0, validate=validate.Range(min=0.1)),
        "log_level": env.str(
            "ROLECALL_LOG_LEVEL", "INFO", validate=validate.OneOf(["DEBUG", "INFO", "WARNING"])
        ),
        "login_window": env.int("ROLECALL_LOGIN_WINDOW", 300, validate=positive),
        "login_failures_pair": env.int("ROLECALL_LOGIN_FAILURES", 10, validate=positive),
        "login_failures_account": env.int("ROLECALL_LOGIN_FAILURES_ACCOUNT", 50, validate=positive),
        "login_failures_address": env.int(
            "ROLECALL_LOGIN_FAILURES_ADDRESS", 100, validate=positive
        ),
        "login_failures_pair_56": env.int("ROLECALL_LOGIN_FAILURES_56", None, validate=positive),
        "login_failures_pair_48": env.int("ROLECALL_LOGIN_FAILURES_48", None, validate=positive),
        "login_failures_address_56": env.int(
            "ROLECALL_LOGIN_FAILURES_ADDRESS_56", None, validate=positive
        ),
        "login_failures_address_48": env.int(
            "ROLECALL_LOGIN_FAILURES_ADDRESS_48", None, validate=positive
        ),
    }
    given_secret = env.str("SECRET_KEY", "", validate=_optional_secret)
    try:
        env.seal()
    except EnvValidationError as error:
        raise SettingsError(_as_faults(error.error_messages)) from None
    faults = _between(values, demo=demo)
    if faults:
        raise SettingsError(faults)
    values["data_dir"] = prepare_data_dir(data_dir)
    values["database_url"] = async_database_url(values["database_url"], values["data_dir"])
    return Settings(secret_key=given_secret or kept_secret(values["data_dir"]), demo=demo, **values)


def _between(values: dict[str, Any], *, demo: bool) -> dict[str, list[str]]:
    """Return the faults that only show between settings."""
    faults: dict[str, list[str]] = {}
    if demo and not is_loopback(values["bind"]):
        faults["ROLECALL_BIND"] = [
            "--demo has well-known passwords, so it serves on loopback only, e.g. 127.0.0.1:8000."
        ]
    if bool(values["admin_username"]) != bool(values["admin_password"]):
        faults["ROLECALL_ADMIN_USERNAME"] = ["Give ROLECALL_ADMIN_PASSWORD with it, or neither."]
    if values["access_expires"] > values["session_max_age"]:
        faults["JWT_ACCESS_TOKEN_EXPIRES"] = ["Must not exceed ROLECALL_SESSION_MAX_AGE."]
    return faults


def prepare_data_dir(path: Path) -> Path:
    """Make the data folder (0700) and return its absolute path; ``StartupError`` if it cannot."""
    path = path.expanduser().resolve()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        probe = path / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StartupError(
            f"The data folder {path} cannot be written ({error.strerror}): "
            "give it to this user, or set ROLECALL_DATA_DIR to a folder that can be."
        ) from None
    return path


def kept_secret(data_dir: Path) -> str:
    """Return the secret kept in the data folder (0600), made on first use."""
    path = data_dir / "secret_key"
    try:
        try:
            descriptor = path.open("x")
        except FileExistsError:
            kept = path.read_text().strip()
        else:
            with descriptor:
                path.chmod(0o600)
                kept = secrets.token_urlsafe(48)
                descriptor.write(kept)
    except OSError as error:
        raise StartupError(f"The secret in {path} cannot be used ({error.strerror}).") from None
    reason = weakness(kept)
    if reason:
        raise StartupError(
            f"The secret in {path} {reason}. Remove the file to have one made, or set SECRET_KEY. "
            "Everybody will have to sign in again."
        )
    return kept


def async_database_url(url: str, data_dir: Path) -> str:
    """Return ``url`` with the async driver chosen; SQLite in the data folder where it is empty."""
    if not url:
        return f"sqlite+aiosqlite:///{data_dir / 'rolecall.sqlite3'}"
    scheme, rest = url.split(":", 1)
    return f"{ASYNC_DRIVERS[scheme]}:{rest}"


def is_loopback(bind: str) -> bool:
    """Return whether only this machine can reach ``bind``."""
    if bind.startswith("unix:"):
        return True
    host = bind.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _words(env: Env, name: str, default: str, check: Any) -> tuple[str, ...]:
    # parsed by hand: environs' list drops the name of the faulty item
    def each(value: str) -> None:
        for word in _split(value):
            check(word)

    return tuple(dict.fromkeys(_split(env.str(name, default, validate=each) or "")))


def _split(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def _location(value: str) -> None:
    if value not in LOCATIONS:
        raise ValidationError(f"{value!r} is none of {', '.join(LOCATIONS)}.")


def _origin(value: str) -> None:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.netloc or value != _origin_of(value):
        raise ValidationError(f"{value!r} is not an exact origin such as https://app.example.org.")


def _origin_of(value: str) -> str:
    parts = urlsplit(value)
    return f"{parts.scheme}://{parts.netloc}"


def _address(value: str) -> None:
    if value.startswith("unix:"):
        return
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValidationError(f"{value!r} is not HOST:PORT.")


def _issuer(value: str) -> None:
    # what a token's size is reckoned with
    if not 1 <= len(value.encode()) <= LONGEST_ISSUER:
        raise ValidationError(f"Must have 1 to {LONGEST_ISSUER} bytes.")


def _optional_address(value: str) -> None:
    if value:
        _address(value)


def _database_url(value: str) -> None:
    if value and value.split(":", 1)[0] not in ASYNC_DRIVERS:
        raise ValidationError("Must be postgresql://… or sqlite:///….")


def _redis_url(value: str) -> None:
    if value and not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValidationError("Must be redis://…, rediss://… or unix://….")


def _optional_secret(value: str) -> None:
    reason = weakness(value) if value else None
    if reason:
        raise ValidationError(
            f"It {reason}. Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(48))'"
        )


def _as_faults(messages: Any) -> dict[str, list[str]]:
    return {name: [str(text) for text in texts] for name, texts in dict(messages).items()}
