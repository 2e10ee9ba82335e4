"""The card of a backup: one that somebody else wrote, or that is damaged, is refused in a sentence."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_app import Faceprint, faceprint
from tests.storage.backups import refused, sealed

__all__ = ["faceprint"]  # pytest finds the fixture by its name


def test_a_card_that_is_a_pipe_is_not_waited_for(root: Path) -> None:
    (root / "backup" / "backup.json").unlink()
    os.mkfifo(root / "backup" / "backup.json")
    assert "backup.json is a pipe, not a file" in refused(root)


@pytest.mark.parametrize(
    "name", ["../../other.db", "/etc/passwd", "gallery.db", "vectors/../../x", "models/x", "gallery-0.db\n"]
)
def test_a_name_that_is_no_plain_name_of_a_backup_is_refused(name: str, root: Path) -> None:
    """As the database, and among the files."""
    path = root / "backup" / "backup.json"
    card = json.loads(path.read_text())
    other = root / "other.db"
    shutil.copyfile(root / "backup" / card["database"], other)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    sealed(path, database=name, files={**card["files"], name: digest})
    assert "which is no file of a backup" in refused(root)
    sealed(path, database=card["database"], files={**card["files"], name: digest})
    assert "which is no file of a backup" in refused(root)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", []),
        ("files", {"a": 1}),
        ("files", None),
        ("database", 7),
        ("gallery", None),
        ("schema", 6),
        ("format", "1"),
        ("taken_at", {}),
        ("taken_at", "yester\x1b[31mday"),
        ("faces", "11"),
        ("revision", 1.5),
    ],
)
def test_a_field_of_another_type_is_named_in_a_sentence(field: str, value: Any, root: Path) -> None:
    sealed(root / "backup" / "backup.json", **{field: value})
    assert f"the field {field}" in refused(root)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '"\ud800"', "{}"])
def test_a_card_that_is_no_card_is_one_sentence(text: str, root: Path) -> None:
    (root / "backup" / "backup.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "backup.json is damaged" in refused(root)


def test_a_folder_of_models_is_no_unfinished_backup(tmp_path: Path, faceprint: Faceprint) -> None:
    (tmp_path / "project" / "models").mkdir(parents=True)
    status, _, err = faceprint("info", tmp_path / "project")
    assert (status, "unfinished" in err) == (2, False)
