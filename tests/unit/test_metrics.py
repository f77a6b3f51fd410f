"""The folder that workers share, and the address that the numbers may have."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from api import metrics
from api.errors import StartupError


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """And nothing that another one uses, nor what is not ours."""
    dead = tmp_path / "metrics.999999999"
    living = tmp_path / f"metrics.{os.getppid()}"
    theirs = tmp_path / "metrics.txt"
    for folder in (dead, living, theirs, tmp_path / f"metrics.{os.getpid()}"):
        folder.mkdir()
        (folder / "old.db").touch()
    with metrics.shared_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not dead.exists()
        assert (living / "old.db").exists()
        assert (theirs / "old.db").exists()
    assert not folder.exists()


def test_an_address_that_is_taken_is_said(tmp_path: Path) -> None:
    """By the name of the setting, before anything is served."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(StartupError, match="ROLECALL_METRICS_BIND"),
            metrics.served(bind, tmp_path),
        ):
            pytest.fail("it was served")
