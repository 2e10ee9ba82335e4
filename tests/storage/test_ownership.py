"""A gallery writes only into its own folders: whatever was linked, copied, swapped or moved."""

import fcntl
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from retrieval.errors import GalleryBusy, GalleryDamaged, GalleryError, GalleryReplaced, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from retrieval.gallery.repair import repair
from retrieval.storage import ownership
from retrieval.storage.vault import Vault
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import add, contents, tiny_model

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A gallery of eleven faces in two segments."""
    with Gallery.create(tmp_path / "g", tiny_model(tmp_path / "model")) as gallery:
        add(gallery, range(8))
        add(gallery, range(8, 11))
    return tmp_path / "g"


def test_a_copy_by_hard_links_is_read_and_not_written_to(folder: Path, tmp_path: Path) -> None:
    """Snapshots are made so; SQLite would write into the database of all of them at once."""
    snapshot = tmp_path / "snapshot"
    shutil.copytree(folder, snapshot, copy_function=os.link)
    before = contents(folder)
    for one in (folder, snapshot):
        assert "gallery.db has another name (a hard link)" in refused(one)
        assert contents(one) == before
        assert verify(one).whole
    shutil.copytree(folder, tmp_path / "own")
    with Gallery.open(tmp_path / "own") as gallery:
        add(gallery, range(50, 52))
    assert verify(tmp_path / "own").whole
    assert contents(snapshot) == before


def folder_id(folder: Path) -> str | None:
    with closing(Vault.open(folder, read_only=True)) as vault, vault.store.read() as reader:
        return reader.gallery().folder_id


def troubles(folder: Path) -> set[Trouble]:
    return {finding.trouble for finding in verify(folder).findings}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path) -> str:
    """The sentence with which a writer refuses a gallery; nothing in its folder of vectors changes."""
    before = bytes_of(folder / "vectors")
    said = set()
    for work in (
        lambda gallery: add(gallery, range(50, 52)),
        lambda gallery: gallery.compact(),
        lambda gallery: gallery.forget(face_id=1),
    ):
        with pytest.raises(GalleryError) as caught, Gallery.open(folder) as gallery:
            work(gallery)
        said.add(str(caught.value))
    assert bytes_of(folder / "vectors") == before
    (sentence,) = said
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("name", ["vectors", "model"])
def test_a_gallery_with_a_linked_folder_is_read_and_not_written(name: str, folder: Path) -> None:
    """A copy by `cp -a` shares what the link leads to: each copy would delete what the other needs."""
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    other = folder.with_name("copy")
    shutil.copytree(folder, other, symlinks=True)
    before = contents(folder)
    for one in (folder, other):
        sentence = refused(one)
        assert sentence.startswith(f"{one / name} is a symbolic link")
        assert "move that folder into the link's place" in sentence
        assert troubles(one) == {Trouble.SYMBOLIC_LINK}
        with pytest.raises(GalleryError, match="is a symbolic link"):
            repair(one)
    assert contents(folder) == contents(other) == before
    # As the sentence says: moved in, and copied for the other.
    (folder / name).unlink()
    (other / name).unlink()
    shutil.copytree(folder.parent / "elsewhere", other / name)
    shutil.move(folder.parent / "elsewhere", folder / name)
    for one in (folder, other):
        with Gallery.open(one) as gallery:
            add(gallery, range(50, 52))
            gallery.compact()
        assert verify(one).whole


def test_a_gallery_that_is_moved_copied_or_linked_whole_goes_on_working(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copied"))
    folder.rename(folder.with_name("moved"))
    folder.with_name("linked").symlink_to(folder.with_name("moved"))
    for name in ("copied", "moved", "linked"):
        with Gallery.open(folder.with_name(name)) as gallery:
            add(gallery, range(50, 52))
            gallery.compact()
        assert verify(folder.with_name(name)).whole


def test_two_galleries_whose_vectors_were_swapped_are_neither_written_nor_searched(folder: Path) -> None:
    """Their files have the same names and sizes, so nothing else tells."""
    other = folder.with_name("other")
    with Gallery.create(other, tiny_model(folder.parent / "model-2")) as gallery:
        add(gallery, range(20, 28))
        add(gallery, range(28, 31))
    before = contents(folder), contents(other)

    def swap() -> None:
        (folder / "vectors").rename(folder.with_name("aside"))
        (other / "vectors").rename(folder / "vectors")
        folder.with_name("aside").rename(other / "vectors")

    swap()
    for one in (folder, other):
        assert "is not the folder of vectors that belongs to" in refused(one)
        assert "faceprint backup" in refused(one)
        assert Trouble.OTHER_FOLDER in troubles(one)
        with pytest.raises(GalleryError, match="is not the folder of vectors"):
            contents(one)
        with pytest.raises(GalleryError):
            repair(one)
    swap()
    assert (contents(folder), contents(other)) == before
    assert verify(folder).whole


def test_each_new_gallery_and_each_restored_one_has_an_id_of_its_own(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        gallery.backup(folder.parent / "backup")
        before = folder_id(folder)
    assert not list((folder.parent / "backup").rglob("gallery.id"))
    Gallery.restore(folder.parent / "backup", folder.with_name("new"))
    assert len({before, folder_id(folder.with_name("new")), None}) == 3
    Gallery.restore(folder.parent / "backup", folder)
    assert folder_id(folder) == before
    assert verify(folder).whole
    assert verify(folder.with_name("new")).whole


@pytest.mark.parametrize("leave", [True, False])
def test_an_older_gallery_gets_an_id_from_its_first_writer_and_not_from_a_reader(
    leave: bool, folder: Path
) -> None:
    """Also where a first writer died between the file and the transaction that names it."""
    path = folder / "vectors" / "gallery.id"
    with closing(sqlite3.connect(folder / "gallery.db")) as connection:
        connection.execute("UPDATE gallery SET folder_id = NULL")
        connection.commit()
    if not leave:
        path.unlink()
    with Gallery.open(folder) as gallery:
        assert gallery.info().faces == 11
        assert (folder_id(folder), path.exists()) == (None, leave)
        add(gallery, range(50, 51))
    assert folder_id(folder) == path.read_text().splitlines()[0]


def test_a_lost_id_is_written_again_where_every_vector_file_is_there(folder: Path) -> None:
    path = folder / "vectors" / "gallery.id"
    before = path.read_bytes()
    path.unlink()
    assert [finding.file for finding in verify(folder).findings] == ["vectors/gallery.id"]
    with Gallery.open(folder) as gallery:
        add(gallery, range(50, 51))
    assert path.read_bytes() == before
    assert verify(folder).whole


def test_an_empty_folder_in_the_place_of_the_vectors_is_not_written_to(folder: Path) -> None:
    """As of a disk that is not mounted."""
    (folder / "vectors").rename(folder.with_name("aside"))
    (folder / "vectors").mkdir()
    assert "a disk that is not mounted" in refused(folder)
    (folder / "vectors").rmdir()
    folder.with_name("aside").rename(folder / "vectors")
    assert verify(folder).whole


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_id_is_named_and_mended_where_each_vector_file_is_proven(damage: str, folder: Path) -> None:
    path = folder / "vectors" / "gallery.id"
    data = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "empty": b""}[damage])
    assert [finding.file for finding in verify(folder).findings] == ["vectors/gallery.id"]
    assert repair(folder).after.whole
    assert path.read_bytes() == data


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_something_else_in_the_place_of_the_id_is_refused(kind: str, folder: Path) -> None:
    path = folder / "vectors" / "gallery.id"
    data = path.read_bytes()
    path.unlink()
    if kind == "link":
        path.symlink_to(folder.with_name("victim"))
        folder.with_name("victim").write_bytes(data)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(GalleryError, match="folder of vectors"), Gallery.open(folder) as gallery:
        add(gallery, range(50, 51))
    assert Trouble.OTHER_FOLDER in troubles(folder)


def test_a_copy_by_cp_that_lacks_a_file_names_backup(faceprint: Faceprint, folder: Path) -> None:
    """As of a gallery that somebody wrote to meanwhile."""
    other = Path(shutil.copytree(folder, folder.with_name("copy")))
    next((other / "vectors").glob("*.faiss")).unlink()
    with (
        Gallery.open(other) as gallery,
        pytest.raises(GalleryDamaged, match="copied with `faceprint backup`"),
    ):
        gallery.search_by_vector([0.0] * 8, 1)
    assert faceprint("verify", other)[0] == 1


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """A folder that is at another place too, as by an administrator; skips where that is not permitted."""
    done = subprocess.run(["mount", "--bind", source, target], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"bind mounts are not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def writes(folder: Path, number: int) -> None:
    with Gallery.open(folder) as gallery:
        add(gallery, range(number, number + 1))


@pytest.mark.parametrize("first", ["the original", "the copy"])
def test_a_copy_whose_folder_of_vectors_is_mounted_from_the_original_is_refused(
    first: str, folder: Path
) -> None:
    """Both databases have the same id. The one that wrote to the folder last has it, the other has none."""
    with closing(sqlite3.connect(folder / "gallery.db")) as connection:
        assert connection.execute("SELECT folder_id FROM gallery").fetchone() != (None,)
    other = Path(shutil.copytree(folder, folder.with_name("copy")))
    (folder / "vectors" / "gallery.id").write_text(f"{folder_id(folder)}\n")  # as of a version before
    with bound(folder / "vectors", other / "vectors"):
        owner, refused_one = (folder, other) if first == "the original" else (other, folder)
        writes(owner, 50)
        before = contents(owner)
        sentence = refused(refused_one)
        assert sentence.startswith(
            f"{refused_one / 'vectors'} is also the folder of vectors of the gallery {owner}, and each would"
        )
        assert (Trouble.OTHER_FOLDER, "vectors") in {
            (f.trouble, f.file) for f in verify(refused_one).findings
        }
        with pytest.raises(GalleryError, match="is also the folder of vectors"):
            repair(refused_one)
        writes(owner, 51)
        assert verify(owner).whole
        assert contents(owner).keys() > before.keys()


def test_a_copy_has_its_own_folder_again_once_nothing_is_mounted(folder: Path) -> None:
    writes(folder, 50)
    other = Path(shutil.copytree(folder, folder.with_name("copy")))
    with bound(folder / "vectors", other / "vectors"):
        refused(other)
    writes(other, 51)
    writes(folder, 52)
    # The other way round as well: the copy's folder is the copy's since it was written to.
    with bound(other / "vectors", folder / "vectors"):
        refused(folder)
    for one in (folder, other):
        writes(one, 53)
        assert verify(one).whole


def test_a_gallery_that_is_mounted_whole_at_another_place_is_one_gallery(folder: Path) -> None:
    writes(folder, 50)
    other = folder.with_name("elsewhere")
    other.mkdir()
    said = (folder / "vectors" / "gallery.id").read_bytes()
    with bound(folder, other):
        writes(other, 51)
        assert verify(other).whole
        writes(folder, 52)
    assert (folder / "vectors" / "gallery.id").read_bytes() == said
    assert verify(folder).whole


def a_backup(folder: Path) -> Path:
    with Gallery.open(folder) as gallery:
        gallery.backup(folder.with_name("backup"))
    return folder.with_name("backup")


@pytest.mark.parametrize("made", ["created", "restored"])
def test_a_gallery_that_was_never_written_to_is_the_owner_of_its_vectors(made: str, folder: Path) -> None:
    """It was made in a temporary folder, which is no place that a copy could be compared with."""
    owner = folder.with_name("owner")
    if made == "created":
        Gallery.create(owner, tiny_model(folder.parent / "model-2")).close()
    else:
        Gallery.restore(a_backup(folder), owner)
    assert ownership.last_writer(owner / "vectors") == owner
    other = Path(shutil.copytree(owner, owner.with_name("copy")))
    before = bytes_of(owner / "vectors")
    with bound(owner / "vectors", other / "vectors"):
        with (
            pytest.raises(GalleryError, match=f"is also the folder of vectors of the gallery {owner}, "),
            Gallery.open(other) as gallery,
        ):
            gallery.forget(face_id=1) if made == "restored" else add(gallery, range(2))
        assert bytes_of(owner / "vectors") == before
        writes(owner, 50)
        assert verify(owner).whole


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_restore_that_is_killed_at_its_rename_leaves_an_owner_or_nothing(moment: str, folder: Path) -> None:
    target, backup = folder.with_name("new"), a_backup(folder)
    rename = "" if moment == "before" else "rename(source, target); "
    script = (
        "import os, signal, sys\n"
        "from retrieval.gallery.gallery import Gallery\n"
        "rename = os.rename\n"
        "def killed(source, target, **rest):\n"
        "    if os.path.basename(source) != 'whole' or os.path.abspath(target) != sys.argv[2]:\n"
        "        return rename(source, target, **rest)\n"
        f"    {rename}os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = killed\n"
        "Gallery.restore(*sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, backup, target], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if moment == "before":
        assert not target.exists()
        Gallery.restore(backup, target)
    assert ownership.last_writer(target / "vectors") == target
    # The empty folder that it was made in.
    assert troubles(target) == ({Trouble.LEFTOVER} if moment == "after" else set())
    assert contents(target) == contents(folder)
    writes(target, 50)
    assert verify(target).whole


@pytest.mark.parametrize("instead", [False, True])
@pytest.mark.parametrize("first", ["the moved one", "the copy"])
def test_of_a_moved_gallery_and_its_copy_the_first_writer_has_the_vectors(
    first: str, instead: bool, folder: Path
) -> None:
    """The place that wrote last holds nothing by now, or another gallery: that settles nothing."""
    moved = folder.rename(folder.with_name("moved"))
    other = Path(shutil.copytree(moved, folder.with_name("copy")))
    if instead:
        with Gallery.create(folder, tiny_model(folder.parent / "model-2")) as gallery:
            add(gallery, range(3))
    with bound(moved / "vectors", other / "vectors"):
        owner, refused_one = (moved, other) if first == "the moved one" else (other, moved)
        writes(owner, 50)
        assert ownership.last_writer(owner / "vectors") == owner
        assert f"is also the folder of vectors of the gallery {owner}, and each" in refused(refused_one)
        writes(owner, 51)
        assert verify(owner).whole


def claimed(folder: Path, quoted: str) -> None:
    """Lets the file of a gallery's vectors name any path, under a checksum that is right."""
    said = f"{folder_id(folder)}\n{quoted}\n"
    checksum = hashlib.sha256(said.encode()).hexdigest()
    (folder / "vectors" / "gallery.id").write_text(f"{said}{checksum}\n")


@pytest.mark.parametrize("quoted", ["/a%00b", "%00", "", "relative", "../g"])
def test_an_id_with_a_path_that_no_writer_names_is_a_damaged_one(quoted: str, folder: Path) -> None:
    before = contents(folder)
    path = folder / "vectors" / "gallery.id"
    claimed(folder, quoted)
    assert (ownership.read_id(folder / "vectors"), ownership.last_writer(folder / "vectors")) == ("", None)
    assert "is not the folder of vectors that belongs to" in refused(folder)
    assert [finding.file for finding in verify(folder).findings] == ["vectors/gallery.id"]
    assert repair(folder).after.whole
    assert ownership.last_writer(path.parent) == folder
    assert contents(folder) == before


def test_a_path_that_is_too_long_for_the_disk_is_nobody_s_home(folder: Path) -> None:
    claimed(folder, f"/{'a' * 5000}")
    writes(folder, 50)
    assert ownership.last_writer(folder / "vectors") == folder
    assert verify(folder).whole


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_writer_does_not_wait_for_ever_for_a_folder_of_vectors_that_is_locked(
    kind: int, folder: Path, faceprint: Faceprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.storage.vault.LOCK_TIMEOUT", 0.05)
    vectors, before = folder / "vectors", contents(folder)
    sentence = (
        f"Another process has locked {vectors} and did not let go within 0.05 s; wait for it, or stop it, "
        "and run the command again."
    )
    descriptor = os.open(vectors, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, kind)
        with pytest.raises(GalleryBusy) as caught, Gallery.open(folder) as gallery:
            gallery.forget(face_id=1)
        assert str(caught.value) == sentence
        assert faceprint("forget", folder, "--face", "1")[::2] == (1, f"faceprint: {sentence}\n")
        assert contents(folder) == before
    finally:
        os.close(descriptor)
    with Gallery.open(folder) as gallery:
        gallery.forget(face_id=1)
    assert len(contents(folder)) == len(before) - 1


def test_the_refusal_shows_the_other_gallery_s_path_on_one_line(folder: Path, faceprint: Faceprint) -> None:
    """A path is bytes that anybody chose: no line of its own, no colours, and text that can be printed."""
    other = folder.rename(os.fsdecode(os.fsencode(folder.parent) + b"/a\xff\nfaceprint: done\x1b[2J\xc3\xbc"))
    writes(other, 50)
    copy = Path(shutil.copytree(other, folder))
    shown = f"{folder.parent}/a\\xff\\nfaceprint: done\\x1b[2J\xfc"
    with bound(other / "vectors", copy / "vectors"):
        sentence = refused(copy)
        assert f"of the gallery {shown}, and each would" in sentence
        assert sentence.endswith(f"or use {shown}.")
        assert sentence.isprintable()
        status, _, said = faceprint("compact", copy)
        assert (status, said) == (2, f"faceprint: {sentence}\n")
        assert [one.detail for one in verify(copy).findings] == [
            f"it is also the folder of vectors of {shown}; give each a copy of its own"
        ]


def test_an_error_shows_no_bytes_that_control_the_terminal(tmp_path: Path, faceprint: Faceprint) -> None:
    odd = tmp_path / os.fsdecode(b"a\xff\x1b[2Jb")
    odd.mkdir()
    said = f"faceprint: {tmp_path}/a\\xff\\x1b[2Jb is not a gallery: it has no gallery.db.\n"
    assert faceprint("info", odd)[::2] == (2, said)


def renumbered(folder: Path) -> tuple[Path, bytes]:
    """A gallery of which one row has the number of another vector file; that file, and what is in it."""
    (first, *_) = sorted((folder / "vectors").glob("*.faiss"))
    with closing(sqlite3.connect(folder / "gallery.db")) as connection:
        connection.execute("UPDATE segment SET id = 90 WHERE id = ?", (int(first.stem),))
        connection.execute("UPDATE gallery SET next_segment_id = 91")
        connection.commit()
    (folder / "gallery.sums").unlink()  # the next write makes it anew
    return first, first.read_bytes()


def test_a_vector_file_whose_row_has_another_number_is_kept_and_mended(folder: Path) -> None:
    before = contents(folder)
    path, data = renumbered(folder)
    leftover = folder / "vectors" / ".00000099.faiss.part"
    leftover.write_bytes(b"left")
    with Gallery.open(folder) as gallery:
        gallery.rename_identity("Kim", "Zoë")
    assert path.read_bytes() == data
    assert not leftover.exists()
    (said,) = [one for one in verify(folder).findings if one.trouble is Trouble.LEFTOVER]
    assert said.detail == "nothing names it; it stays while vectors are missing"
    with Gallery.open(folder) as gallery:
        gallery.rename_identity("Zoë", "Kim")
    done = repair(folder, give_up=True)
    assert (done.after.findings, done.copied, done.given_up) == ((), 1, 0)
    assert not path.exists()
    assert contents(folder) == before


def test_a_vector_file_whose_row_is_gone_is_kept_by_writers(folder: Path) -> None:
    (first, *_) = sorted((folder / "vectors").glob("*.faiss"))
    with closing(sqlite3.connect(folder / "gallery.db")) as connection:
        connection.execute("DELETE FROM segment WHERE id = ?", (int(first.stem),))
        connection.commit()
    with Gallery.open(folder) as gallery:
        gallery.rename_identity("Kim", "Zoë")
    assert first.exists()


def test_what_is_forgotten_is_gone_while_another_vector_file_is_missing(folder: Path) -> None:
    """The file that its vector was in has been replaced by this very transaction; older ones stay."""
    first, last = sorted((folder / "vectors").glob("*.faiss"))
    with Gallery.open(folder) as gallery:
        gallery.backup(folder.parent / "backup")
    stray = folder / "vectors" / "00000077.faiss"
    shutil.copyfile(first, stray)
    kept = first.rename(folder.with_name("aside"))
    with closing(Vault.open(folder)) as vault:
        with vault.writing() as writer:
            generation = vault.serving(writer)
            (segment,) = [one for one in writer.segments() if one.id == int(last.stem)]
            rows = vault.vectors(generation).stored(segment.id, segment.rows, segment.sha256)
            vault.put(writer, generation, [segment.id], [rows])
        assert not last.exists()
        assert stray.exists()
        # Erasing says that it is not done, and is done once nothing is missing.
        with (
            pytest.raises(StorageError, match="a vector file is missing; see `faceprint repair"),
            vault.writing() as writer,
        ):
            vault.defer(writer, erase=True, labels={})
        kept.rename(first)
        writes(folder, 50)
    assert not stray.exists()
    assert verify(folder).whole


def test_a_restore_in_place_ends_what_kept_files(folder: Path) -> None:
    before = contents(folder)
    with Gallery.open(folder) as gallery:
        gallery.backup(folder.parent / "backup")
    path, _ = renumbered(folder)
    Gallery.restore(folder.parent / "backup", folder)
    assert verify(folder).whole
    assert contents(folder) == before
    assert not path.exists()


@pytest.mark.parametrize("by", ["link", "working directory"])
def test_an_open_gallery_stays_the_same_when_its_name_leads_elsewhere(
    by: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erasure, segments and checksums would otherwise be those of the gallery that is there now."""
    other = folder.parent / "elsewhere" / "g"
    other.parent.mkdir()
    with Gallery.create(other, tiny_model(folder.parent / "model-2")) as gallery:
        add(gallery, range(20, 28))
    files = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    name = Path("g")
    monkeypatch.chdir(folder.parent)
    if by == "link":
        name = folder.parent / "current"
        name.symlink_to(folder)
    with Gallery.open(name, read_only=True) as reader, Gallery.open(name) as gallery:
        reader.search_by_face(1, 1)
        if by == "link":
            name.unlink()
            name.symlink_to(other)
        else:
            monkeypatch.chdir(other.parent)
        add(gallery, range(50, 52))
        gallery.forget(face_id=2)
        gallery.compact()
        assert gallery.name == str(name)
        assert len(reader.search_by_face(1, 20)) == 11
        with gallery.vault.store.read() as snapshot:
            assert not snapshot.gallery().unfinished
    assert verify(folder).whole
    assert len(contents(folder)) == 12
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("what", ["", "gallery.db"])
def test_an_open_gallery_is_not_used_with_the_files_of_a_copy_in_its_place(what: str, folder: Path) -> None:
    """Its rows would be lost with the former database, and their vectors would be in the copy."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    with Gallery.open(folder) as gallery:
        add(gallery, range(50, 52))
        gallery.forget(face_id=1)
        if what:
            os.replace(copy / what, folder / what)
        else:
            folder.rename(folder.with_name("aside"))
            copy.rename(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for use in (
            lambda: add(gallery, range(60, 62)),
            lambda: gallery.forget(face_id=2),
            lambda: gallery.search_by_face(3, 1),
            gallery.compact,
        ):
            with pytest.raises(StorageError, match="open the gallery again"):
                use()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if not what:
        assert verify(folder).whole
        with Gallery.open(folder) as gallery:
            assert len(gallery.search_by_face(2, 20)) == 10


def test_a_gallery_that_was_moved_away_while_it_is_open_says_so(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        folder.rename(folder.with_name("aside"))
        for use in (lambda: add(gallery, range(60, 62)), lambda: gallery.search_by_face(3, 1)):
            with pytest.raises(GalleryReplaced, match="is no longer there; open the gallery again"):
                use()
        folder.with_name("aside").rename(folder)
        add(gallery, range(60, 62))
    assert verify(folder).whole


def test_a_transaction_during_which_a_copy_takes_the_place_is_not_committed(folder: Path) -> None:
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    before = contents(folder)
    with Gallery.open(folder) as gallery:
        transaction = gallery.vault.writing()
        transaction.__enter__().set_gallery(unfinished=None)
        folder.rename(folder.with_name("aside"))
        copy.rename(folder)
        with pytest.raises(GalleryReplaced):
            transaction.__exit__(None, None, None)
    for one in (folder, folder.with_name("aside")):
        assert contents(one) == before
        assert verify(one).whole


def test_damage_is_not_hidden_by_an_erasure_or_a_compaction(folder: Path) -> None:
    """The checksums of a file that is written anew would hide it."""
    with Gallery.open(folder) as gallery:
        add(gallery, range(100, 400))
        gallery.compact()
    with closing(sqlite3.connect(folder / "gallery.db")) as driver:
        roots = driver.execute("SELECT rootpage FROM sqlite_master WHERE rootpage > 1 AND type = 'table'")
        pages = sorted(number for (number,) in roots)
        ((size,),) = driver.execute("PRAGMA page_size").fetchall()
    data = bytearray((folder / "gallery.db").read_bytes())
    number = next(one for one in pages if data[(one - 1) * size] == 13 and data[(one - 1) * size + 4])
    data[number * size - 1] ^= 1  # of a cell
    (folder / "gallery.db").write_bytes(data)
    with Gallery.open(folder) as gallery:
        with suppress(StorageError):
            gallery.forget(face_id=2)
        with pytest.raises(StorageError, match="is damaged"):
            gallery.vault.store.file.vacuum()
    assert [str(one) for one in verify(folder).findings if str(number) in str(one)]
