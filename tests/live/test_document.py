"""The OpenAPI document against the running service: whatever it allows, and what it does not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live import _serve
from tests.live._serve import BIN, Serving

# `make fuzz` asks for more.
EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "3")
# These end what the requests after them need; tests of their own cover them.
ENDING = r"^/(logout|refresh|login|me/password|docs)|/logout$"
# Not every rule can be said in JSON Schema: that a role is there, that a password is strong.
UNSAYABLE = "positive_data_acceptance"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service whose tokens outlive the test."""
    data = tmp_path_factory.mktemp("fuzz")
    found = _serve.start(data, "--demo", JWT_ACCESS_TOKEN_EXPIRES="3600")
    yield found
    assert found.stop() == 0


@pytest.mark.parametrize("username", ["nobody", "admin"])
def test_the_service_is_as_its_document_says(
    username: str, serving: Serving, tmp_path: Path
) -> None:
    """No 5xx, no status, header, media type or member that the document does not have.

    Bodies and queries by the schemas and against them, on every route, as nobody and as admin.
    """
    command = [
        BIN / "schemathesis", "run", f"{serving.url}/openapi.json", "--no-color",
        "--seed", "1", "--max-examples", EXAMPLES, "--phases", "coverage,fuzzing",
        "--exclude-checks", UNSAYABLE, "--exclude-path-regex", ENDING, "--request-timeout", "10",
    ]  # fmt: skip
    if username != "nobody":
        body = {"username": username, "password": "adminpass", "transport": "json"}
        token = httpx.post(f"{serving.url}/login", json=body).json()["access_token"]
        command += ["--header", f"Authorization: Bearer {token}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert "Tested: 4" in done.stdout, done.stdout[-3_000:]
    assert '"level": "error"' not in serving.log.read_text()
