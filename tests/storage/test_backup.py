"""Backups: what is in one is proven, whatever became of its files, and whoever made it."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import nullcontext, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from retrieval.errors import DataError, FaceprintError, GalleryDamaged, InputError, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.models.bundle import ModelBundle
from retrieval.storage import backup
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import add, contents, tiny_model

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@pytest.fixture(scope="session")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of two models and three segments, and its backup; no test changes them."""
    root = tmp_path_factory.mktemp("laid")
    model = tiny_model(root / "model")
    (model.folder / "MODELCARD.md").write_text("# A card for people\n")
    with Gallery.create(root / "gallery", model) as gallery:
        add(gallery, range(8))
        add(gallery, range(8, 11))
    # Read only, so that the gallery stays what was backed up: otherwise its log says that there is a backup.
    with Gallery.open(root / "gallery", read_only=True) as gallery:
        gallery.backup(root / "backup")
    return root


@pytest.fixture
def root(laid: Path, tmp_path: Path) -> Path:
    """A copy of these."""
    return Path(shutil.copytree(laid, tmp_path / "root"))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    """The right bytes, which lie elsewhere: another backup may change them."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [
    lambda path: flip(path, 0),
    lambda path: flip(path, len(path.read_bytes()) // 2),
    lambda path: flip(path, -2),
    cut,
    remove,
    empty,
    link,
    folder,
]


def back_up(root: Path, **options: Any) -> Any:
    with Gallery.open(root / "gallery", read_only=True) as gallery:
        return backup.back_up(gallery.vault, root / "backup", **options)


def test_every_file_of_a_backup_that_was_damaged_is_found_and_healed_by_the_next(root: Path) -> None:
    """In every way and one at a time: `verify` finds it, `backup` ends well, and then all is whole again."""
    names = [name for name in files(root / "backup") if name != "writer.lock"]
    assert len(names) == 1 + 1 + 2 + 4, names
    before = contents(root / "gallery")
    assert backup.check_backup(root / "backup") == []
    for name in names:
        for number, damage in enumerate(DAMAGES):
            if name == "backup.json" and damage is folder:
                continue
            damage(root / "backup" / name)
            if name == "backup.json":
                with pytest.raises(DataError):
                    backup.check_backup(root / "backup")
            else:
                assert name in backup.check_backup(root / "backup"), (name, number)
            done = back_up(root)
            assert backup.check_backup(root / "backup") == [], (name, number)
            assert done.segments_copied == name.startswith("vectors/"), (name, number)
            assert [one for one in files(root / "backup") if not one.endswith("elsewhere")] == sorted(
                [*names, "writer.lock"]
            )
            for extra in (root / "backup").rglob("elsewhere"):
                extra.unlink()
        Gallery.restore(root / "backup", root / "restored")
        assert contents(root / "restored") == before
        assert verify(root / "restored").whole
        shutil.rmtree(root / "restored")


def test_a_model_folder_of_a_backup_that_is_empty_or_a_link_is_filled(root: Path) -> None:
    """As an interrupted copy, or a stranger, leaves it."""
    (model,) = (root / "backup" / "models").iterdir()
    for path in model.iterdir():
        path.unlink()
    back_up(root)
    assert backup.check_backup(root / "backup") == []
    aside = model.rename(root / "aside")
    model.symlink_to(aside)
    assert len(backup.check_backup(root / "backup")) == 4
    back_up(root)
    assert (backup.check_backup(root / "backup"), model.is_symlink(), len(files(aside))) == ([], False, 4)


def test_a_damaged_file_of_the_gallery_fails_a_backup_by_name_and_the_older_backup_stays(
    root: Path,
) -> None:
    """As long as the backup does not have it; one that has it is what the gallery is restored from."""
    names = ["model/bundle.json", "model/model.onnx", "model/model.safetensors"]
    names += [f"vectors/{path.name}" for path in (root / "gallery" / "vectors").glob("*.faiss")]
    for name in names:
        data = (root / "gallery" / name).read_bytes()
        flip(root / "gallery" / name, 70)
        if name.startswith("vectors/"):
            back_up(root)
            assert backup.check_backup(root / "backup") == []
        with (
            Gallery.open(root / "gallery", read_only=True) if "json" not in name else nullcontext() as gallery
        ):
            if gallery is not None:
                with pytest.raises(GalleryDamaged, match=Path(name).name):
                    backup.back_up(gallery.vault, root / "other")
        assert not (root / "other" / "backup.json").exists()
        shutil.rmtree(root / "other", ignore_errors=True)
        (root / "gallery" / name).write_bytes(data)


def test_the_description_of_a_model_is_backed_up_as_it_is_today(root: Path) -> None:
    """It may be edited, or be gone."""
    (described,) = (root / "backup" / "models").rglob("MODELCARD.md")
    (root / "gallery" / "model" / "MODELCARD.md").write_text("edited")
    back_up(root)
    assert (described.read_text(), backup.check_backup(root / "backup")) == ("edited", [])
    (root / "gallery" / "model" / "MODELCARD.md").unlink()
    back_up(root)
    assert (described.exists(), backup.check_backup(root / "backup")) == (False, [])


def test_what_a_disk_does_not_give_back_as_it_was_written_is_no_backup(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte changes after the copy is durable: the older backup stays, and nothing says that all is well."""
    with Gallery.open(root / "gallery") as gallery:
        add(gallery, range(11, 40))
    card = (root / "backup" / "backup.json").read_bytes()
    replace = os.replace

    def damaging(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(".faiss"):
            flip(Path(target), 100)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", damaging)
        with pytest.raises(StorageError, match=r"\.faiss reads back as something else than was written"):
            back_up(root)
        assert (root / "backup" / "backup.json").read_bytes() == card
        assert backup.check_backup(root / "backup") == []
        back_up(root, verify=False)
    assert len(backup.check_backup(root / "backup")) == 1


def test_a_backup_through_a_link_deletes_nothing_elsewhere(root: Path) -> None:
    """Two backups that share a folder of vectors would each delete what the other needs."""
    shutil.move(root / "backup" / "vectors", root / "shared")
    (root / "backup" / "vectors").symlink_to(root / "shared")
    before = files(root / "shared")
    with pytest.raises(InputError, match="is a symbolic link"):
        back_up(root)
    assert files(root / "shared") == before
    assert len(backup.check_backup(root / "backup")) == 2


def test_a_file_of_somebody_else_in_a_backup_stays(root: Path) -> None:
    for name in ("vectors/notes.txt", "models/README", "notes.txt"):
        (root / "backup" / name).write_text("precious")
    back_up(root)
    for name in ("vectors/notes.txt", "models/README", "notes.txt"):
        assert (root / "backup" / name).read_text() == "precious"


def test_a_backup_of_another_gallery_is_not_written_over(root: Path) -> None:
    """Neither where its card is damaged: the database says whose it is."""
    Gallery.create(root / "another", ModelBundle.load(root / "model")).close()
    before = files(root / "backup")
    for damage in (lambda path: None, lambda path: flip(path, 40), empty):
        damage(root / "backup" / "backup.json")
        with (
            Gallery.open(root / "another") as gallery,
            pytest.raises(InputError, match="choose another folder"),
        ):
            gallery.backup(root / "backup")
        assert files(root / "backup") == before


def test_a_refused_backup_leaves_nothing_among_the_files_of_others(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text("precious")
    with Gallery.open(root / "gallery") as gallery:
        with pytest.raises(InputError, match="is not empty and is no backup"):
            gallery.backup(root / "mine")
        with pytest.raises(InputError, match="is in the gallery itself; choose a folder elsewhere"):
            gallery.backup(root / "gallery" / "backup")
    assert [path.name for path in (root / "mine").iterdir()] == ["notes.txt"]
    assert not (root / "gallery" / "backup").exists()


def die_at(folder: Path, target: Path, name: str) -> None:
    """Makes a first backup whose process is killed when it replaces a file of this name. Runs in a child."""
    replace = os.replace

    def killed(source: Any, path: Any) -> None:
        if fnmatch(os.fspath(path), f"*/{name}"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, path)

    os.replace = killed
    with Gallery.open(folder, read_only=True) as gallery:
        gallery.backup(target)


@pytest.mark.parametrize("name", ["gallery-*.db", "*.faiss", "model.onnx", "backup.json"])
def test_a_first_backup_that_was_killed_is_called_unfinished_and_the_next_run_finishes_it(
    name: str, root: Path, faceprint: Faceprint
) -> None:
    target = root / "new"
    child = multiprocessing.get_context("fork").Process(target=die_at, args=(root / "gallery", target, name))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    for command in (("verify", target), ("restore", target, root / "restored"), ("info", target)):
        status, _, err = faceprint(*command)
        assert status == 2
        assert err == (
            f"faceprint: {target} is an unfinished backup: the run that made it was stopped; run `faceprint "
            f"backup GALLERY {target}` again, which goes on from here.\n"
        )
    assert faceprint("backup", root / "gallery", target)[0] == 0
    assert faceprint("verify", target)[0] == 0


def test_a_folder_of_models_is_no_unfinished_backup(tmp_path: Path, faceprint: Faceprint) -> None:
    (tmp_path / "project" / "models").mkdir(parents=True)
    status, _, err = faceprint("info", tmp_path / "project")
    assert (status, "unfinished" in err) == (2, False)


def test_a_card_that_is_a_pipe_is_not_waited_for(root: Path) -> None:
    (root / "backup" / "backup.json").unlink()
    os.mkfifo(root / "backup" / "backup.json")
    assert "backup.json is a pipe, not a file" in refused(root)


def test_restoring_in_place_does_not_go_on_with_a_damaged_model(root: Path) -> None:
    """Its fingerprint and its card are those of the backup; its weights are not."""
    for name in ("model.onnx", "model.safetensors"):
        (model,) = (path for path in (root / "gallery").iterdir() if path.name.startswith("model"))
        flip(model / name, 100)
        Gallery.restore(root / "backup", root / "gallery")
        assert verify(root / "gallery").whole
    before = sorted(path.name for path in (root / "gallery").iterdir())
    Gallery.restore(root / "backup", root / "gallery")
    assert sorted(path.name for path in (root / "gallery").iterdir()) == before


# Backups that somebody else made


def sealed(path: Path, **changes: Any) -> None:
    """Changes a card, and its own checksum with it, as whoever wants to deceive does."""
    card = json.loads(path.read_text())
    card |= changes
    card.pop("sha256", None)
    card["sha256"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(card))


def refused(root: Path) -> str:
    """The sentence with which each command refuses a backup; nothing is made."""
    said = set()
    for work in (
        lambda: Gallery.restore(root / "backup", root / "new"),
        lambda: Gallery.restore(root / "backup", root / "gallery"),
    ):
        with pytest.raises(FaceprintError) as caught:
            work()
        assert caught.value.exit_status in (1, 2)
        said.add(str(caught.value))
    assert not (root / "new").exists()
    assert verify(root / "gallery").whole
    with suppress(FaceprintError):
        assert backup.check_backup(root / "backup") != []
    (sentence,) = said
    assert sentence.endswith(".")
    return sentence


def test_a_card_that_does_not_list_what_the_database_names_is_refused(root: Path) -> None:
    path = root / "backup" / "backup.json"
    listed = json.loads(path.read_text())["files"]
    database = json.loads(path.read_text())["database"]
    sealed(path, files={})
    assert "which is no file of a backup" in refused(root)
    for name in listed:
        sealed(path, files={one: digest for one, digest in listed.items() if one != name})
        if name.endswith("MODELCARD.md"):
            assert backup.check_backup(root / "backup") == []
        else:
            assert refused(root)
    sealed(path, files={database: listed[database]})
    assert "do not name the same files" in refused(root)


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


def test_the_command_heals_a_backup_and_says_what_it_did(faceprint: Faceprint, root: Path) -> None:
    (segment, *_) = sorted((root / "backup" / "vectors").iterdir())
    flip(segment, 80)
    status, out, err = faceprint("backup", root / "gallery", root / "backup")
    assert (status, err) == (0, "")
    assert "1 vector file copied" in out
    assert "1 were there" in out
    assert faceprint("verify", root / "backup")[0] == 0
    assert faceprint("backup", root / "gallery", root / "backup", "--no-verify")[0] == 0
