"""Integrity of backups: files that have their SHA-256 but contradict each other are refused."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval.storage.backup_integrity import check_backup
from tests.storage.backups import refused, sealed


@pytest.fixture
def edit(root: Path) -> Callable[..., None]:
    """Runs SQL on the database of a backup, and makes its card state what it is then."""

    def edited(*statements: str) -> None:
        path = root / "backup" / "backup.json"
        card = json.loads(path.read_text())
        database = root / "backup" / card["database"]
        connection = sqlite3.connect(database)
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()
        digest = hashlib.sha256(database.read_bytes()).hexdigest()
        new = database.with_name(f"gallery-{digest[:16]}.db")
        database.rename(new)
        files = {name: sha256 for name, sha256 in card["files"].items() if name != card["database"]}
        sealed(path, database=new.name, files={**files, new.name: digest})

    return edited


def test_a_card_that_does_not_list_what_the_database_names_is_refused(root: Path) -> None:
    path = root / "backup" / "backup.json"
    listed = json.loads(path.read_text())["files"]
    database = json.loads(path.read_text())["database"]
    sealed(path, files={})
    assert "which is no file of a backup" in refused(root)
    for name in listed:
        sealed(path, files={one: digest for one, digest in listed.items() if one != name})
        if name.endswith("MODELCARD.md"):
            assert check_backup(root / "backup") == []
        else:
            assert refused(root)
    sealed(path, files={database: listed[database]})
    assert "do not name the same files" in refused(root)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE generation SET dimension = 9",
        "UPDATE generation SET dimension = 0",
        "UPDATE generation SET dimension = -8",
        "UPDATE generation SET dimension = 'eight'",
        "UPDATE generation SET dimension = 9223372036854775807",
        "UPDATE generation SET fingerprint = 'x'",
        "UPDATE generation SET card_sha256 = '../../../other'",
        "UPDATE segment SET rows = rows + 1",
        "UPDATE segment SET rows = -1",
        "UPDATE segment SET rows = 9223372036854775807",
        "UPDATE segment SET bytes = 0",
        "UPDATE segment SET sha256 = '../../x'",
        "UPDATE segment SET generation_id = 7",
        "UPDATE gallery SET uuid = 'another'",
        "UPDATE gallery SET revision = revision + 1",
        "UPDATE gallery SET generation_id = 9",
        "UPDATE gallery SET unfinished = '[1]'",
        "UPDATE gallery SET next_face_id = 'many'",
        "DELETE FROM gallery",
        "DELETE FROM segment",
        "DELETE FROM face WHERE id = 1",
        "UPDATE photo SET sha256 = x'00' WHERE id = 1",
        "UPDATE photo SET sha256_key = sha256_key + 1 WHERE id = 1",
        "UPDATE photo SET (sha256, sha256_key) = (SELECT sha256, sha256_key FROM photo WHERE id = 2)",
        "UPDATE identity SET name = x'00' WHERE id = 1",
        "UPDATE face SET metadata = '[1]' WHERE id = 1",
        "UPDATE face SET metadata = '{' WHERE id = 1",
        "CREATE TABLE extra (name TEXT)",
        "CREATE VIEW extra AS SELECT * FROM identity",
        "CREATE TRIGGER keep AFTER DELETE ON identity BEGIN INSERT INTO merger VALUES (old.id, 1); END",
        "CREATE INDEX extra ON identity (metadata)",
        "ALTER TABLE identity ADD COLUMN shadow TEXT",
    ],
)
def test_a_backup_whose_database_contradicts_the_rest_is_refused(
    statement: str, root: Path, edit: Callable[..., None]
) -> None:
    edit(statement)
    assert refused(root)
