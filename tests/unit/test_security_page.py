"""docs/security.md names tests that are there, for everything that must hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text()
# Up to this one without a gap; later ones are added as they are shown.
PROPERTIES = 58


def test_every_property_has_a_test_that_is_there() -> None:
    """Each line once and in order; each test that it names is defined in the file that it names."""
    rows = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", PAGE, re.MULTILINE)
    numbers = [int(number) for number, _ in rows]
    assert numbers[:PROPERTIES] == list(range(1, PROPERTIES + 1))
    assert numbers == sorted(set(numbers))
    for number, named in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", named)
        assert tests, number
        for file, name in tests:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
            assert name in {node.name for node in tree.body if isinstance(node, kinds)}, name
