"""Who may read a SQLite file: password hashes and sealed keys are in it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from api.db import Database, migrate, trips


@pytest.fixture(params=[0o022, 0o000, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask as a shell or a service manager may set it."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Return the permissions of every file in ``folder``."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.mark.parametrize(
    "pattern", ["sqlite+aiosqlite:///{}", "sqlite+aiosqlite:///file:{}?uri=true"]
)
async def test_a_file_of_ours_is_private(tmp_path: Path, umask: int, pattern: str) -> None:
    """0600, its log and shared memory too, whatever the umask."""
    path = tmp_path / "elsewhere.db"
    database = Database(pattern.format(path))
    async with database.write() as session:
        await session.execute(text("CREATE TABLE t (n INTEGER)"))
    found = modes(tmp_path)
    assert set(found) == {"elsewhere.db", "elsewhere.db-wal", "elsewhere.db-shm"}
    assert set(found.values()) == {0o600}
    await database.close()
    assert set(modes(tmp_path).values()) == {0o600}


async def test_the_mode_of_an_existing_file_is_left(tmp_path: Path) -> None:
    """An operator who lets a group read the file decides that."""
    path = tmp_path / "shared.db"
    path.touch()
    path.chmod(0o640)
    database = Database(f"sqlite+aiosqlite:///{path}")
    await migrate.upgrade(database)
    assert modes(tmp_path)["shared.db"] == 0o640
    await database.close()


async def test_a_link_to_a_file_that_is_not_there(tmp_path: Path) -> None:
    """What SQLite creates at the end of a symbolic link is private too."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "target.db")
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'link.db'}")
    await migrate.upgrade(database)
    assert set(modes(tmp_path / "real").values()) == {0o600}
    await database.close()


@pytest.mark.parametrize(
    ("database", "is_uri"),
    [
        ("", False), (":memory:", False), ("file::memory:", True), ("file:x?mode=memory", True),
        ("file:none.db?mode=ro", True), ("file:none.db?cache=shared&mode=rw", True),
    ],
)  # fmt: skip
def test_what_sqlite_creates_no_file_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str, is_uri: bool
) -> None:
    """A database in memory, and a mode of a URI that creates nothing."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(sqlite3.OperationalError):
        trips._open(database, uri=is_uri).close()
    assert modes(tmp_path) == {}


def test_a_folder_that_is_not_there_is_sqlites_error(tmp_path: Path) -> None:
    """SQLite says that it cannot open the file."""
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        trips._open(str(tmp_path / "no" / "such.db"))
