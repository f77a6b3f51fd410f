"""Logs: one JSON object a line, and no local variable of what failed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from api import logs


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Restore how logging was set up."""
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield lambda: logs.configure("INFO")
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    structlog.reset_defaults()


def fail() -> None:
    """Log an exception with a secret among the local variables."""
    password = "hunter2-" + "secret"
    try:
        raise ValueError(len(password))
    except ValueError as error:
        structlog.get_logger("rolecall.test").error("unexpected_error", exc_info=error)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_traceback_shows_no_variables(
    configured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:  # fmt: skip
    """On a terminal and in JSON: the cause is there, what was typed is not (58)."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configured()
    fail()
    said = capsys.readouterr().err
    assert "unexpected_error" in said
    assert "ValueError" in said
    assert "hunter2" not in said
    if not terminal:
        line = json.loads(said.splitlines()[0])
        assert line["level"] == "error"
        assert line["logger"] == "rolecall.test"
