"""Secrets that a person or an example made up are refused, random ones never (property 58)."""

from __future__ import annotations

import base64
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from api.secret import weakness
from tests.conftest import FUZZING, SECRET

EACH = 1_000 if FUZZING else 20

MADE_UP = [
    "your-256-bit-secret-your-256-bit-secret", "super-secret-key-change-me-in-production",
    "a-string-secret-at-least-256-bits-long", "change-me-change-me-change-me-change-me",
    "django-insecure-8f3k2j4h5g6d7s8a9q0w1e2r3t4y5u6i7o8p9z0x1c2v3b4n",
    "django-insecure-&x1$k^2v@p9z!qm7w)c#4t8u*e5r(y6i-0o+n3b=h_l%j", "a" * 32,
    "0" * 64, "abab" * 16,
    "0123456789abcdef0123456789abcdef", "0123456789ABCDEF" * 4, "deadbeefdeadbeefdeadbeefdeadbeef",
    "thisisasecretkeythatis32byteslong!", "ThisIsMyVeryLongSecretKeyForJWT123",
    "the quick brown fox jumps over the lazy dog", "correct horse battery staple and more",
    "correcthorsebatterystaplecorrecthorse", "my_jwt_secret_key_for_development_only",
    "secret" * 6, "password123password123password123", "you-will-never-guess-this-secret-key",
    "1234567890" * 4, "qwertyuiopasdfghjklzxcvbnm123456", "abcdefghijklmnopqrstuvwxyz123456",
    "MySuperSecretKeyThatIsAtLeast32Chars", "insert-random-string-here-please-now",
    "iamaverylongpassphrasewithoutspaces", "AllYourBaseAreBelongToUsAllYourBase",
    "Tr0ub4dor&3Tr0ub4dor&3Tr0ub4dor&3!!", "s3cr3t-k3y-f0r-pr0duct10n-d0-n0t-us3",
    "SUPER_SECRET_JWT_KEY_REPLACE_IN_PROD!", "abcd1234" * 5, " " * 40, "\u00e9" * 32,
    base64.b64encode(b"super-secret-key-change-me-in-production").decode(),
    base64.urlsafe_b64encode(b"thisisasecretkeythatis32byteslong!").rstrip(b"=").decode(),
    "dein-geheimer-schluessel-hier-eintragen", "LOREM IPSUM DOLOR SIT AMET CONSECTETUR",
    "ma_cle_secrete_pour_les_jetons_de_mon_app", "a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6",
    "00112233445566778899aabbccddeeff", "fedcba9876543210fedcba9876543210",
    b"your-256-bit-secret-is-right-here".hex(), "a" * 72 + secrets.token_urlsafe(8),
]  # fmt: skip

RANDOM: dict[str, Callable[[], str]] = {
    "hex": lambda: secrets.token_hex(32), "HEX": lambda: secrets.token_hex(32).upper(),
    "hex of 16 bytes": lambda: secrets.token_hex(16),
    "urlsafe": lambda: secrets.token_urlsafe(32), "what we make": lambda: secrets.token_urlsafe(48),
    "base64": lambda: base64.b64encode(secrets.token_bytes(32)).decode(),
    "base32": lambda: base64.b32encode(secrets.token_bytes(32)).decode(),
    "printable": lambda: "".join(chr(33 + secrets.randbelow(94)) for _ in range(32)),
    "64 bytes": lambda: base64.b64encode(secrets.token_bytes(64)).decode(),
}  # fmt: skip


@pytest.mark.parametrize("secret", MADE_UP, ids=lambda text: text[:24])
def test_made_up_secrets_are_refused(secret: str) -> None:
    """Words in every spelling, repetition, rows of keys; in base64 and hexadecimal too."""
    reason = weakness(secret)
    assert reason is not None
    assert secret not in reason


# Random, and published: in a framework's tutorial, and in a public list of secrets that were found.
KNOWN = [
    "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
    "r9iMKoe5CRMgvJBBtp4HrqN7QiPpUToj", "045ef734-ab17-4429-9aed-9acbcf99ba67",
]  # fmt: skip


@pytest.mark.parametrize("secret", KNOWN)
def test_known_secrets_are_refused(secret: str) -> None:
    """By name of the reason; with space or quotes around it, in other letters, encoded."""
    encoded = base64.b64encode(secret.encode())
    for variant in (
        secret, f" {secret}\t", f"{secret}\n", f"{secret}\r\n", f'"{secret}"', f"'{secret}'\n",
        secret.encode().hex(), secret.encode().hex().upper(), encoded.decode(),
        encoded.decode().rstrip("="), base64.urlsafe_b64encode(secret.encode()).decode(),
        f"{encoded.decode()}\n",
    ):  # fmt: skip
        reason = weakness(variant)
        assert reason is not None, variant
        assert "publicly known" in reason
        assert secret not in reason
    if secret.islower():
        assert "publicly known" in str(weakness(secret.upper()))
    changed = secret[:-1] + ("x" if secret[-1] != "x" else "y")
    assert "publicly known" not in str(weakness(changed))


def test_the_list_of_known_secrets_is_part_of_the_package(tmp_path: Path) -> None:
    """A wheel that is built of this project has it, and importlib.resources finds it there."""
    root = Path(__file__).parents[2]
    copy = tmp_path / "project"
    for name in ("api", "schemas"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, copy)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    ask = (
        "import sys; sys.path.insert(0, sys.argv[1]); import api; from importlib import resources; "
        "print(api.__file__); "
        "print(resources.files('api').joinpath('known-secret-hashes.txt').read_text().count(chr(10)));"
        "from api.secret import weakness; print(weakness(sys.argv[2]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", ask, str(tmp_path / "installed"), KNOWN[0]],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    file, lines, reason = found.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert int(lines) > 1_000
    assert "publicly known" in reason


@pytest.mark.parametrize("size", [0, 1, 31])
def test_short_secrets_are_refused(size: int) -> None:
    """By bytes: 31 is too few, and it says so."""
    assert f"{size} bytes" in str(weakness(SECRET[:size]))
    assert weakness(SECRET[:32]) is None


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_random_secrets_are_taken(make: Callable[[], str]) -> None:
    """However they are written; a thousand of each under ``make fuzz``."""
    refused = [secret for secret in (make() for _ in range(EACH)) if weakness(secret)]
    assert refused == []
