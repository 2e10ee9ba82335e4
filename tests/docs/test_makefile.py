"""The verbs of the Makefile name files that exist."""

import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def test_every_test_that_make_quick_names_exists() -> None:
    named = re.findall(r"tests/\S+", (_ROOT / "Makefile").read_text())
    assert named
    assert [path for path in named if not (_ROOT / path).exists()] == []
