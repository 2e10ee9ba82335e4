"""Writing backups: what is in one is proven, whatever became of its files."""

import multiprocessing
import os
import shutil
import signal
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from retrieval.errors import DataError, GalleryDamaged, InputError, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.models.bundle import ModelBundle
from retrieval.storage.backup import back_up as back_up_vault
from retrieval.storage.backup_integrity import check_backup
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import add, contents
from tests.storage.backups import DAMAGES, back_up, empty, files, flip, folder

__all__ = ["faceprint"]  # pytest finds the fixture by its name


def test_every_file_of_a_backup_that_was_damaged_is_found_and_healed_by_the_next(root: Path) -> None:
    """In every way and one at a time: `verify` finds it, `backup` ends well, and then all is whole again."""
    names = [name for name in files(root / "backup") if name != "writer.lock"]
    assert len(names) == 1 + 1 + 2 + 4, names
    before = contents(root / "gallery")
    assert check_backup(root / "backup") == []
    for name in names:
        for number, damage in enumerate(DAMAGES):
            if name == "backup.json" and damage is folder:
                continue
            damage(root / "backup" / name)
            if name == "backup.json":
                with pytest.raises(DataError):
                    check_backup(root / "backup")
            else:
                assert name in check_backup(root / "backup"), (name, number)
            done = back_up(root)
            assert check_backup(root / "backup") == [], (name, number)
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
    assert check_backup(root / "backup") == []
    aside = model.rename(root / "aside")
    model.symlink_to(aside)
    assert len(check_backup(root / "backup")) == 4
    back_up(root)
    assert (check_backup(root / "backup"), model.is_symlink(), len(files(aside))) == ([], False, 4)


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
            assert check_backup(root / "backup") == []
        with (
            Gallery.open(root / "gallery", read_only=True) if "json" not in name else nullcontext() as gallery
        ):
            if gallery is not None:
                with pytest.raises(GalleryDamaged, match=Path(name).name):
                    back_up_vault(gallery.vault, root / "other")
        assert not (root / "other" / "backup.json").exists()
        shutil.rmtree(root / "other", ignore_errors=True)
        (root / "gallery" / name).write_bytes(data)


def test_the_description_of_a_model_is_backed_up_as_it_is_today(root: Path) -> None:
    """It may be edited, or be gone."""
    (described,) = (root / "backup" / "models").rglob("MODELCARD.md")
    (root / "gallery" / "model" / "MODELCARD.md").write_text("edited")
    back_up(root)
    assert (described.read_text(), check_backup(root / "backup")) == ("edited", [])
    (root / "gallery" / "model" / "MODELCARD.md").unlink()
    back_up(root)
    assert (described.exists(), check_backup(root / "backup")) == (False, [])


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
        assert check_backup(root / "backup") == []
        back_up(root, verify=False)
    assert len(check_backup(root / "backup")) == 1


def test_a_backup_through_a_link_deletes_nothing_elsewhere(root: Path) -> None:
    """Two backups that share a folder of vectors would each delete what the other needs."""
    shutil.move(root / "backup" / "vectors", root / "shared")
    (root / "backup" / "vectors").symlink_to(root / "shared")
    before = files(root / "shared")
    with pytest.raises(InputError, match="is a symbolic link"):
        back_up(root)
    assert files(root / "shared") == before
    assert len(check_backup(root / "backup")) == 2


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


def test_the_command_heals_a_backup_and_says_what_it_did(faceprint: Faceprint, root: Path) -> None:
    (segment, *_) = sorted((root / "backup" / "vectors").iterdir())
    flip(segment, 80)
    status, out, err = faceprint("backup", root / "gallery", root / "backup")
    assert (status, err) == (0, "")
    assert "1 vector file copied" in out
    assert "1 were there" in out
    assert faceprint("verify", root / "backup")[0] == 0
    assert faceprint("backup", root / "gallery", root / "backup", "--no-verify")[0] == 0
