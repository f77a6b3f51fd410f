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
# As admin these would end what the requests after them need.
ENDING = r"^/(logout|refresh|login|me/password)|/logout$"
# Not every rule can be said in JSON Schema: that a role is there, that a password is strong. But
# what the schemas allow is never malformed.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "302", "401", "403", "404", "409", "412", "422", "429"]

[[operations]]
include-path-regex = "^/oauth/"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "429"]
"""


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

    Bodies and queries by the schemas and against them: as nobody on every route, as admin on those
    that end no session, with every check that schemathesis has.
    """
    command = [
        BIN / "schemathesis", "run", f"{serving.url}/openapi.json", "--no-color",
        "--seed", "1", "--max-examples", EXAMPLES, "--phases", "coverage,fuzzing",
        "--request-timeout", "10",
    ]  # fmt: skip
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    if username != "nobody":
        body = {"username": username, "password": "adminpass", "transport": "json"}
        token = httpx.post(f"{serving.url}/login", json=body).json()["access_token"]
        command += ["--exclude-path-regex", ENDING, "--header", f"Authorization: Bearer {token}"]
    else:
        # it makes up credentials, malformed ones too
        command += ["--exclude-checks", "positive_data_acceptance"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert "Tested: 4" in done.stdout, done.stdout[-3_000:]
    assert '"level": "error"' not in serving.log.read_text()
