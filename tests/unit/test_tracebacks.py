"""Tracebacks are logged as text; test_tracebacks.py in tests/http shows it for every place."""

from __future__ import annotations

import re
from pathlib import Path

import api
from api.tracebacks import plain_traceback

GIVEN_TO_A_LOGGER = re.compile(r"exc_info=|log(ger)?\.exception\(|format_exc\(")


def test_a_traceback_is_text() -> None:
    """Causes and source lines are there, values of variables are not."""
    password = "hunter2-secret"
    try:
        try:
            raise KeyError(len(password))
        except KeyError as error:
            raise ValueError("\ud800") from error
    except ValueError as error:
        found = plain_traceback(error)
    assert found.startswith("Traceback (most recent call last):")
    assert "KeyError: 14" in found
    assert found.endswith("ValueError: \\ud800")
    assert "raise KeyError(len(password))" in found
    assert "hunter2" not in found.replace('password = "hunter2-secret"', "")
    found.encode()


def test_no_logger_is_given_an_exception() -> None:
    """A logger that has the exception itself may print the variables of its frames."""
    package = Path(api.__file__).parent
    modules = [path for path in package.rglob("*.py") if path.name != "tracebacks.py"]
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in modules
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if GIVEN_TO_A_LOGGER.search(line)
    ]
    assert len(modules) > 50
    assert found == []
