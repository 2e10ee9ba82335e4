"""Verification: whatever is not as it was written is named; what can be mended is, and the rest is listed."""

import itertools
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.bulk.ingest import ingest
from retrieval.cli import app
from retrieval.database.records import Face, NewFace
from retrieval.errors import FaceprintError, GalleryError, StorageError
from retrieval.gallery import suspects
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, Verification, verify
from retrieval.gallery.repair import mend, repair
from retrieval.gallery.suspects import Compared
from retrieval.models.bundle import ModelBundle
from retrieval.storage import deferred
from retrieval.storage.ownership import ID_NAME
from retrieval.storage.vault import Vault
from tests.operations import (
    GONE,
    OTHER_THAN_FILES,
    add,
    contents,
    face,
    photo,
    tiny_model,
    vector_of,
    write_photos,
)

# Tens of thousands of verifications; here a written byte costs nothing, where there is such a place.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# Of the files that have most of the bytes, only some are flipped: of gallery.db few, since test_pages.py
# has every byte of such a file. No page of SQLite's is a multiple of it long, so each page has its turn
# elsewhere. FACEPRINT_FLIP_ALL=1 flips all.
THOROUGH = "FACEPRINT_FLIP_ALL" in os.environ
STRIDES = {} if THOROUGH else {"gallery.db": 337, "model/model.onnx": 47, "model/model.safetensors": 47}

Flip: TypeAlias = tuple[str, int, int]  # file, offset, mask


def lay(folder: Path, model: ModelBundle) -> None:
    """Something of everything: three segments, paths, aliases, a merger, receipts, a face without a name."""
    with Gallery.create(folder, model) as gallery:
        add(gallery, range(8))
        add(gallery, range(8, 11))
        gallery.forget(face_id=3)
        nameless = NewFace(None, None, face(20).sha256)
        elsewhere = face(4, path="/photos/李 雷/4.png")
        vectors = [vector_of(one.sha256) for one in (nameless, elsewhere)]
        gallery.enroll_vectors([nameless, elsewhere], vectors)  # type: ignore[arg-type]
        gallery.rename_identity("Kim", "Zoë")
        gallery.merge_identities("Adi", "Zoë")
        gallery.forget(path="/photos/8.png")


@pytest.fixture(scope="session")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that no test changes: two models, a gallery, its backup, a gallery of photos and theirs."""
    root = tmp_path_factory.mktemp("laid")
    model = tiny_model(root / "model")
    tiny_model(root / "other-model", seed=1)
    lay(root / "people.gallery", model)
    with Gallery.open(root / "people.gallery") as gallery:
        gallery.backup(root / "backup")
    return root


@pytest.fixture
def folder(laid: Path, tmp_path: Path) -> Path:
    """A copy of the gallery, which has a row for everything, three segments and no log."""
    return Path(shutil.copytree(laid / "people.gallery", tmp_path / "people.gallery"))


@pytest.fixture
def photographed(laid: Path, tmp_path: Path) -> Path:
    """A gallery of six photos in two segments; the photos lie beside it, in `photos`."""
    write_photos(tmp_path / "photos", range(6))
    with Gallery.create(tmp_path / "photos.gallery", ModelBundle.load(laid / "model")) as gallery:
        ingest(gallery, [tmp_path / "photos"], batch_size=4, workers=1)
    assert len(segments(tmp_path / "photos.gallery")) == 2
    return tmp_path / "photos.gallery"


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "vectors").glob("*.faiss"))


def flip(path: Path, offset: int, mask: int = 0x01) -> None:
    # Not through Python's buffers: the byte itself, and nothing around it.
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([byte ^ mask]), offset)
    finally:
        os.close(descriptor)


def files(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for those that SQLite and the lock keep while somebody is there."""
    passing = ("-wal", "-shm", "writer.lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(passing)
    }


def faces(folder: Path) -> list[Face]:
    """The rows, whatever has become of the vectors."""
    with closing(Vault.open(folder)) as opened, opened.store.read() as reader:
        return [one for part in reader.all_faces() for one in part]


def found(folder: Path) -> list[tuple[Trouble, str | None]]:
    return [(finding.trouble, finding.file) for finding in verify(folder).findings]


@contextmanager
def edited(folder: Path) -> Iterator[sqlite3.Connection]:
    """The database, edited behind our back, and its sums gone, which would name the pages."""
    with closing(sqlite3.connect(folder / "gallery.db")) as driver, driver:
        yield driver
    (folder / "gallery.sums").unlink()


# Finding


def test_a_gallery_as_it_was_written_is_whole(folder: Path) -> None:
    """Every byte but the lock's is read, nothing is worth a note, and nothing changes."""
    before = files(folder)
    verification = verify(folder)
    assert (verification.findings, verification.notes, verification.whole) == ((), (), True)
    assert (verification.faces, verification.segments) == (10, 3)
    unread = len(before["gallery.sums"]) + len(before["model/bundle.json"])
    assert verification.bytes == sum(map(len, before.values())) - unread
    assert files(folder) == before


def rounds_of(folder: Path) -> list[list[Flip]]:
    """Which bytes to flip, and how: the lowest bit, and of every eleventh the highest.

    In a round are bytes of files that say nothing of each other, so that all of them have to be found.
    """
    alone: list[list[Flip]] = []
    together: dict[str, list[Flip]] = {}
    for name, content in files(folder).items():
        flips = [
            (name, offset, 0x80 if number % 11 == 10 else 0x01)
            for number, offset in enumerate(range(0, len(content), STRIDES.get(name, 1)))
        ]
        if name in ("gallery.db", f"vectors/{ID_NAME}"):
            alone += [[one] for one in flips]
        else:
            part = name.partition("/")[0]
            together.setdefault("model" if part == "model" else name, []).extend(flips)
    return alone + [[one for one in at_once if one] for at_once in itertools.zip_longest(*together.values())]


def misses(laid: Path, share: int) -> list[str]:
    """Flips half of the bytes in a copy of a gallery, round by round; returns what was not found."""
    wrong = []
    with TemporaryDirectory(dir=IN_MEMORY) as temporary:
        folder = Path(shutil.copytree(laid, Path(temporary) / "people.gallery"))
        before = files(folder)
        for at_once in rounds_of(folder)[share::2]:
            for one in at_once:
                flip(folder / one[0], *one[1:])
            flipped = {one[0] for one in at_once}
            try:
                named = {finding.file for finding in verify(folder).findings}
                # A row may be about another file; any other damage is about itself alone.
                if not flipped <= named or (flipped != {"gallery.db"} and named != flipped):
                    wrong.append(f"{at_once}: found {named}")
            except Exception as error:
                wrong.append(f"{at_once}: {error!r}")
            for one in at_once:
                flip(folder / one[0], *one[1:])
        if files(folder) != before:
            wrong.append("verify has changed a file")
        if not verify(folder).whole:
            wrong.append("it is not whole when every byte is back")
    return wrong


@pytest.mark.timeout(3600)
def test_a_flip_in_any_byte_of_any_file_is_found_and_the_file_is_named(laid: Path) -> None:
    gallery = laid / "people.gallery"
    if THOROUGH:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            wrong = [line for part in pool.map(misses, [gallery, gallery], [0, 1]) for line in part]
    else:
        # Two processes take longer to begin than they save.
        wrong = [line for share in (0, 1) for line in misses(gallery, share)]
    print(f"{sum(map(len, rounds_of(gallery))):,} bytes flipped, {len(wrong):,} misses")
    assert wrong == []


def test_a_flip_in_a_model_that_does_not_serve_is_found(laid: Path, photographed: Path) -> None:
    """A gallery that was embedded anew keeps the former model and its vectors; they are verified too."""
    with Gallery.open(photographed) as gallery:
        assert gallery.reembed(ModelBundle.load(laid / "other-model")).switched
    assert verify(photographed).whole
    names = files(photographed)
    assert len([name for name in names if name.startswith(("model/", "model-2/"))]) == 6
    for name, content in names.items():
        flip(photographed / name, len(content) // 2)
        assert name in {file for _, file in found(photographed)}
        flip(photographed / name, len(content) // 2)
    assert verify(photographed).whole


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def remove(path: Path) -> None:
    path.unlink()


SPOILT = {
    "vectors/00000004.faiss": Trouble.SEGMENT_DAMAGED,
    "model/model.onnx": Trouble.MODEL_DAMAGED,
    "model/model.safetensors": Trouble.MODEL_DAMAGED,
    "model/bundle.json": Trouble.MODEL_DAMAGED,
    "gallery.sums": Trouble.SUMS_DAMAGED,
    "gallery.db": Trouble.DATABASE_DAMAGED,
}


@pytest.mark.parametrize("spoil", [shorten, empty, lengthen])
@pytest.mark.parametrize(("name", "trouble"), SPOILT.items())
def test_a_file_of_another_length_is_named(
    name: str, trouble: Trouble, spoil: Callable[[Path], None], folder: Path
) -> None:
    spoil(folder / name)
    assert found(folder) == [(trouble, name)]


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        ("vectors/00000004.faiss", Trouble.SEGMENT_MISSING),
        ("model/model.onnx", Trouble.MODEL_DAMAGED),
        ("model/model.safetensors", Trouble.MODEL_DAMAGED),
        ("model/bundle.json", Trouble.MODEL_DAMAGED),
    ],
)
def test_a_missing_file_is_named(name: str, trouble: Trouble, folder: Path) -> None:
    (folder / name).unlink()
    assert found(folder) == [(trouble, name)]


def test_a_missing_model_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    assert found(folder) == [(Trouble.MODEL_MISSING, "model")]


def test_of_a_missing_folder_of_vectors_each_file_is_named(folder: Path) -> None:
    names = [f"vectors/{path.name}" for path in segments(folder)]
    shutil.rmtree(folder / "vectors")
    assert found(folder) == [
        (Trouble.OTHER_FOLDER, "vectors/gallery.id"),
        *((Trouble.SEGMENT_MISSING, name) for name in names),
    ]


def test_a_folder_in_the_place_of_a_vector_file_is_not_called_a_damaged_database(folder: Path) -> None:
    (segment, *_) = segments(folder)
    segment.unlink()
    segment.mkdir()
    assert found(folder) == [(Trouble.SEGMENT_DAMAGED, f"vectors/{segment.name}")]


@pytest.mark.parametrize("other", OTHER_THAN_FILES)
@pytest.mark.parametrize("name", [*SPOILT, "model/MODELCARD.md"])
def test_what_stands_in_the_place_of_a_file_is_named_and_repair_replaces_it(
    other: str, name: str, laid: Path, folder: Path
) -> None:
    """Nothing waits for a pipe; the database alone comes from a backup."""
    before = contents(folder)
    (folder / name).unlink(missing_ok=True)
    OTHER_THAN_FILES[other](folder / name)
    if name == "model/MODELCARD.md":  # for people, and in no way needed
        assert verify(folder).whole
        return
    if name == "gallery.db":
        with pytest.raises(GalleryError, match=f"gallery.db is {other}, not a database; restore"):
            verify(folder)
        return
    (finding,) = verify(folder).findings
    assert finding.file == name
    assert f"{other}, not a file" in finding.detail
    with suppress(FaceprintError), Gallery.open(folder) as gallery:
        gallery.search_by_vector(np.zeros(8, np.float32), 3)
    with suppress(FaceprintError), Gallery.open(folder) as gallery:
        gallery.backup(folder.with_name("another backup"))
    repair(folder, backup=laid / "backup")
    # What the model was before is unknown, and there are no photos to compare with.
    suspects = [Trouble.SUSPECT_VECTOR] if name.startswith("model/") else []
    assert [trouble for trouble, _ in found(folder)] == suspects
    assert contents(folder) == before


def test_a_folder_with_files_in_the_place_of_a_file_is_left_to_its_owner(laid: Path, folder: Path) -> None:
    graph = folder / "model/model.onnx"
    graph.unlink()
    graph.mkdir()
    (graph / "notes").write_text("mine")
    with pytest.raises(StorageError, match=r"model.onnx cannot be written: it is a folder with files in it"):
        repair(folder, backup=laid / "backup")
    assert (graph / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "vectors"])
def test_a_pipe_in_the_place_of_a_folder_is_replaced_with_all_that_was_in_it(
    name: str, laid: Path, folder: Path
) -> None:
    before = contents(folder)
    shutil.rmtree(folder / name)
    os.mkfifo(folder / name)
    assert not verify(folder).whole
    repair(folder, backup=laid / "backup")
    # What the model was before is unknown, and there are no photos to compare with.
    assert [trouble for trouble, _ in found(folder)] == [Trouble.SUSPECT_VECTOR] * (name == "model")
    assert contents(folder) == before


def test_missing_sums_are_a_note_and_no_damage(folder: Path) -> None:
    """A crash may take them, and the next write makes them anew."""
    (folder / "gallery.sums").unlink()
    verification = verify(folder)
    assert verification.findings == ()
    assert len(verification.notes) == 1
    with Gallery.open(folder) as gallery:
        gallery.compact()
    assert verify(folder).notes == ()


def test_a_missing_lock_is_nothing(folder: Path) -> None:
    (folder / "writer.lock").unlink()
    assert verify(folder).whole


def test_where_there_is_no_database_there_is_no_gallery(folder: Path) -> None:
    (folder / "gallery.db").unlink()
    with pytest.raises(GalleryError):
        verify(folder)
    with pytest.raises(GalleryError):
        repair(folder)


def test_a_row_without_a_vector_is_found(folder: Path) -> None:
    with edited(folder) as driver:
        driver.execute(f"INSERT INTO photo VALUES (77, '{'0' * 64}', 0, 0)")
        driver.execute(
            "INSERT INTO face (id, enrolled_at, photo_id, box) "
            "VALUES (77, '2026-01-01T00:00:00+00:00', 77, '')"
        )
        driver.execute("UPDATE gallery SET next_face_id = 78")
    (finding,) = verify(folder).findings
    assert (finding.trouble, finding.file) == (Trouble.FACE_WITHOUT_VECTOR, None)
    assert finding.face_ids == (77,)


def test_a_photo_that_is_there_twice_is_found(folder: Path) -> None:
    """And each photo that a search by its SHA-256 would miss, for its key is another one's."""
    with edited(folder) as driver:
        driver.execute(
            "UPDATE photo SET (sha256, sha256_key) = (SELECT sha256, sha256_key FROM photo WHERE id = 1) "
            "WHERE id = 5"
        )
        driver.execute("UPDATE photo SET sha256_key = sha256_key + 1 WHERE id = 2")
    assert [(one.trouble, one.detail) for one in verify(folder).findings] == [
        (
            Trouble.DATABASE_DAMAGED,
            "the photo with number 2 has the key of another SHA-256, or of another number",
        ),
        (Trouble.DATABASE_DAMAGED, "the photos with numbers 1, 5 have the same SHA-256"),
    ]


def test_a_vector_without_a_row_is_found(folder: Path) -> None:
    with edited(folder) as driver:
        driver.execute("DELETE FROM file WHERE photo_id = 2")
        driver.execute("DELETE FROM face WHERE id = 2")
        driver.execute("DELETE FROM photo WHERE id = 2")
    (finding,) = verify(folder).findings
    assert (finding.trouble, finding.file) == (Trouble.VECTOR_WITHOUT_FACE, None)
    assert finding.face_ids == (2,)


def test_a_vector_that_is_there_twice_is_found(folder: Path) -> None:
    """A segment's file under a second name, and a row that names it."""
    (segment, *_) = segments(folder)
    shutil.copyfile(segment, folder / "vectors" / "00000099.faiss")
    with edited(folder) as driver:
        values = "99, rows, bytes, sha256, generation_id"
        driver.execute(f"INSERT INTO segment SELECT {values} FROM segment WHERE id = {int(segment.stem)}")
        driver.execute("UPDATE gallery SET next_segment_id = 100")
        ((rows,),) = driver.execute("SELECT rows FROM segment WHERE id = 99").fetchall()
    (finding,) = verify(folder).findings
    assert finding.trouble is Trouble.VECTOR_WITHOUT_FACE
    assert len(finding.face_ids) == rows


def test_an_edit_behind_our_back_is_a_damaged_database(folder: Path) -> None:
    """With its sums the page is named, however well the rows hang together."""
    sums = (folder / "gallery.sums").read_bytes()
    with edited(folder) as driver:
        driver.execute("UPDATE identity SET name = name || ' Junior'")
    assert verify(folder).whole
    (folder / "gallery.sums").write_bytes(sums)
    (finding,) = verify(folder).findings
    assert (finding.trouble, finding.file) == (Trouble.DATABASE_DAMAGED, "gallery.db")
    assert finding.detail.startswith("page")


def test_another_model_in_the_place_of_the_gallerys_is_named(laid: Path, folder: Path) -> None:
    shutil.rmtree(folder / "model")
    shutil.copytree(laid / "other-model", folder / "model")
    assert found(folder) == [(Trouble.OTHER_MODEL, "model/bundle.json")]


def test_files_of_another_model_beside_the_gallerys_card_are_named(laid: Path, folder: Path) -> None:
    for name in ("model.onnx", "model.safetensors"):
        shutil.copyfile(laid / "other-model" / name, folder / "model" / name)
    assert set(found(folder)) == {
        (Trouble.MODEL_DAMAGED, "model/model.onnx"),
        (Trouble.MODEL_DAMAGED, "model/model.safetensors"),
    }


LEFTOVERS = [
    "vectors/00000099.faiss",
    "vectors/00000099.part",
    "vectors/.00000004.faiss.part",
    ".gallery.sums.part",
    "gallery-0001.part",
    "model/.bundle.json.part",
    "model-9/bundle.json",
    ".model-9-x1y2z3/bundle/bundle.json",
]


def leave(folder: Path, name: str) -> str:
    """What an interrupted write left; returns the name under which it is found."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"left")
    return name.split("/")[0] if "model-9" in name else name


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_leftover_is_named_and_the_next_write_removes_it(name: str, folder: Path) -> None:
    before = contents(folder)
    named = leave(folder, name)
    assert found(folder) == [(Trouble.LEFTOVER, named)]
    assert (folder / name).exists()
    with Gallery.open(folder) as gallery:
        gallery.rename_identity("Zoë", "Zoë Kravitz")
    assert not (folder / named).exists()
    assert verify(folder).whole
    assert len(contents(folder)) == len(before)


STRANGERS = ["notes.txt", "vectors/notes.txt", "model/notes.txt", "vectors/00000004.faiss.bak"]


@pytest.mark.parametrize("name", STRANGERS)
def test_an_unknown_file_is_named_and_never_removed(name: str, folder: Path) -> None:
    (folder / name).write_text("mine")
    assert found(folder) == [(Trouble.UNKNOWN_FILE, name)]
    done = repair(folder, give_up=True)
    assert [finding.file for finding in done.after.findings] == [name]
    with Gallery.open(folder) as gallery:
        gallery.compact()
    assert (folder / name).read_text() == "mine"


def test_several_damages_are_all_named(folder: Path) -> None:
    first, _, last = segments(folder)
    flip(first, 80)
    last.unlink()
    flip(folder / "model" / "model.onnx", 80)
    flip(folder / "gallery.sums", 80)
    leave(folder, LEFTOVERS[0])
    assert set(found(folder)) == {
        (Trouble.SEGMENT_DAMAGED, f"vectors/{first.name}"),
        (Trouble.SEGMENT_MISSING, f"vectors/{last.name}"),
        (Trouble.MODEL_DAMAGED, "model/model.onnx"),
        (Trouble.SUMS_DAMAGED, "gallery.sums"),
        (Trouble.LEFTOVER, LEFTOVERS[0]),
    }


# The commands


@pytest.fixture
def faceprint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`faceprint ARGS` in this process: its exit status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["faceprint", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        status: Any = 0
        try:
            app.main()
        except SystemExit as ended:
            status = ended.code or 0
        printed = capsys.readouterr()
        return int(status), printed.out, printed.err

    return run


Faceprint: TypeAlias = Callable[..., tuple[int, str, str]]


def test_the_command_ends_with_0_where_everything_is_whole(faceprint: Faceprint, folder: Path) -> None:
    status, out, err = faceprint("verify", folder)
    assert (status, err) == (0, "")
    assert "whole" in out
    assert "10 faces, 3 vector files, 0 findings" in out
    status, out, _ = faceprint("verify", folder, "--json")
    assert status == 0
    assert json.loads(out)["findings"] == []


def test_the_command_names_the_file_and_ends_with_1(faceprint: Faceprint, folder: Path) -> None:
    (segment, *_) = segments(folder)
    flip(segment, 80)
    status, out, err = faceprint("verify", folder)
    assert status == 1
    assert f"segment-damaged: vectors/{segment.name}: it is not what was written" in out
    assert f"faceprint repair {folder}" in err
    status, out, _ = faceprint("verify", folder, "--json")
    assert status == 1
    (finding,) = json.loads(out)["findings"]
    assert (finding["trouble"], finding["file"]) == ("segment-damaged", f"vectors/{segment.name}")


def test_the_command_that_repairs_lists_what_it_cannot_mend(faceprint: Faceprint, folder: Path) -> None:
    """The photos of this gallery were never on any disk."""
    (segment, *_) = segments(folder)
    flip(segment, 80)
    status, out, err = faceprint("repair", folder)
    assert status == 1
    assert "/photos/0.png" in out
    assert "--give-up" in err
    status, out, _ = faceprint("repair", folder, "--give-up", "--json")
    assert status == 0
    assert json.loads(out)["after"]["findings"] == []
    assert faceprint("verify", folder)[0] == 0


def test_the_command_verifies_a_backup_too(faceprint: Faceprint, laid: Path, tmp_path: Path) -> None:
    backup = Path(shutil.copytree(laid / "backup", tmp_path / "backup"))
    assert faceprint("verify", backup)[0] == 0
    (segment, *_) = sorted((backup / "vectors").iterdir())
    flip(segment, 80)
    status, out, err = faceprint("verify", backup, "--json")
    assert status == 1
    assert json.loads(out)["findings"] == [f"vectors/{segment.name}"]
    assert str(segment) in err


# Mending


def test_a_whole_gallery_is_not_touched(folder: Path) -> None:
    before = files(folder)
    done = repair(folder)
    assert done.before.whole
    assert files(folder) == before


def test_leftovers_go(folder: Path) -> None:
    before = contents(folder)
    for name in LEFTOVERS:
        leave(folder, name)
    done = repair(folder)
    assert {finding.trouble for finding in done.before.findings} == {Trouble.LEFTOVER}
    assert done.after.whole
    assert contents(folder) == before


def test_an_erasure_that_a_reader_held_up_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of the forgotten is left in any file then."""
    traces = (b"/photos/5.png", GONE.encode(), vector_of(face(5).sha256).tobytes())
    assert [trace in b"".join(files(folder).values()) for trace in traces] == [True] * 3
    monkeypatch.setattr(deferred, "ERASE_TIMEOUT", 0.05)
    with Gallery.open(folder) as gallery:
        with gallery.vault.store.read() as reader:
            reader.count()
            with pytest.raises(StorageError), Gallery.open(folder) as other:
                other.forget(GONE)
        assert found(folder) == [(Trouble.UNFINISHED, None)]
    done = repair(folder)
    assert done.after.findings == ()
    assert [trace in b"".join(files(folder).values()) for trace in traces] == [False] * 3


def test_damaged_sums_are_made_anew(folder: Path) -> None:
    before = contents(folder)
    flip(folder / "gallery.sums", 80)
    done = repair(folder)
    assert (done.after.findings, done.after.notes) == ((), ())
    assert contents(folder) == before


@pytest.mark.parametrize("spoil", [shorten, empty, lengthen, remove, lambda path: flip(path, 80)])
def test_lost_vectors_are_embedded_again_from_their_photos(
    spoil: Callable[[Path], None], photographed: Path
) -> None:
    """They are bit for bit what they were, and the ids and the rows are the same."""
    before, rows = contents(photographed), faces(photographed)
    (segment, *_) = segments(photographed)
    spoil(segment)
    done = repair(photographed)
    assert done.after.findings == ()
    assert (done.embedded, done.copied, done.given_up, done.lost) == (4, 0, 0, ())
    assert contents(photographed) == before
    assert faces(photographed) == rows


def test_every_vector_can_be_embedded_again(photographed: Path) -> None:
    before = contents(photographed)
    shutil.rmtree(photographed / "vectors")
    (photographed / "vectors").mkdir()
    done = repair(photographed)
    assert done.after.findings == ()
    assert done.embedded == 6
    assert contents(photographed) == before


def test_a_row_that_never_had_a_vector_gets_one_from_its_photo(photographed: Path, tmp_path: Path) -> None:
    """As long as the photo has the SHA-256 that the row states."""
    before = contents(photographed)
    (segment, *_) = segments(photographed)
    with edited(photographed) as driver:
        driver.execute("DELETE FROM segment WHERE id = ?", (int(segment.stem),))
    assert {trouble for trouble, _ in found(photographed)} == {Trouble.FACE_WITHOUT_VECTOR, Trouble.LEFTOVER}
    done = repair(photographed)
    assert done.after.findings == ()
    assert done.embedded == 4
    assert contents(photographed) == before


def test_a_damaged_vector_file_comes_back_from_a_backup(laid: Path, folder: Path) -> None:
    before, bytes_before = contents(folder), {path: path.read_bytes() for path in segments(folder)}
    first, _, last = segments(folder)
    flip(first, 80)
    last.unlink()
    done = repair(folder, backup=laid / "backup")
    assert done.after.findings == ()
    assert (done.copied, done.embedded) == (2, 0)
    assert {path: path.read_bytes() for path in segments(folder)} == bytes_before
    assert contents(folder) == before


def test_a_vector_file_that_a_backup_has_damaged_too_is_not_taken(laid: Path, folder: Path) -> None:
    backup = Path(shutil.copytree(laid / "backup", folder.parent / "backup"))
    for path in (backup / "vectors").iterdir():
        flip(path, 81)
    (first, *_) = segments(folder)
    flip(first, 80)
    done = repair(folder, backup=backup)
    assert done.copied == 0
    assert [finding.file for finding in done.after.findings] == [f"vectors/{first.name}"]


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "model.safetensors"])
@pytest.mark.parametrize("spoil", [remove, empty, lambda path: flip(path, 80)])
@pytest.mark.parametrize("source", ["backup", "model"])
def test_a_damaged_model_file_comes_back_from_a_backup_or_another_copy(
    source: str, spoil: Callable[[Path], None], name: str, laid: Path, photographed: Path, tmp_path: Path
) -> None:
    before = files(photographed)
    with Gallery.open(photographed) as gallery:
        gallery.backup(tmp_path / "backup")
    spoil(photographed / "model" / name)
    options: dict[str, Any] = {"backup": tmp_path / "backup"}
    if source == "model":
        options = {"model": ModelBundle.load(laid / "model")}
    done = repair(photographed, **options)
    assert done.after.findings == ()
    assert done.copied == 1
    assert files(photographed)[f"model/{name}"] == before[f"model/{name}"]


def test_a_missing_model_comes_back_and_lost_vectors_with_it(
    laid: Path, photographed: Path, tmp_path: Path
) -> None:
    before = contents(photographed)
    shutil.rmtree(photographed / "model")
    segments(photographed)[0].unlink()
    assert not repair(photographed).after.whole
    done = repair(photographed, model=ModelBundle.load(laid / "model"))
    assert done.after.findings == ()
    assert (done.copied, done.embedded) == (3, 4)
    assert contents(photographed) == before


def test_the_files_of_another_model_are_not_taken(laid: Path, folder: Path) -> None:
    (folder / "model" / "model.onnx").unlink()
    done = repair(folder, model=ModelBundle.load(laid / "other-model"))
    assert done.copied == 0
    assert not done.after.whole


@pytest.fixture
def tampered(laid: Path, photographed: Path, tmp_path: Path) -> Path:
    """The gallery of six photos, of which 5 and 6 have vectors of another model, whose graph is in place."""
    with Gallery.create(tmp_path / "other.gallery", ModelBundle.load(laid / "other-model")) as other:
        ingest(other, [tmp_path / "photos"], workers=1)
        wrong = {face.sha256: vector_in(other, face.id) for face in every(other)}
    with closing(Vault.open(photographed)) as vault:
        with vault.store.read() as reader:
            serving, faces = vault.serving(reader), reader.faces([5, 6])
        vectors = np.stack([wrong[faces[number].sha256] for number in (5, 6)])
        suspects.replace_vectors(vault, serving, Compared(0, 0, np.array([5, 6]), vectors, ()))
    flip(photographed / "model" / "model.onnx", 80)
    return photographed


def every(gallery: Gallery) -> list[Face]:
    with gallery.vault.store.read() as reader:
        return list(reader.faces(list(reader.face_ids())).values())


def vector_in(gallery: Gallery, number: int) -> NDArray[np.float32]:
    with gallery.vault.store.read() as reader:
        found = gallery.vault.vector(reader, gallery.vault.serving(reader), number)
    assert found is not None
    return found


def checked_before(folder: Path) -> list[tuple[int | None]]:
    with closing(sqlite3.connect(folder / "gallery.db")) as driver:
        return driver.execute("SELECT checked_before FROM generation").fetchall()


def test_vectors_of_a_damaged_model_are_replaced_once_it_is_mended(laid: Path, tampered: Path) -> None:
    done = repair(tampered, model=ModelBundle.load(laid / "model"))
    assert done.after.findings == ()
    assert (done.suspects, done.compared, done.replaced) == (6, 6, 2)
    assert checked_before(tampered) == [(7,)]
    with Gallery.open(tampered) as gallery:
        for face in every(gallery):
            first = gallery.search(Path(face.paths[0]), 1).matches[0]
            assert (first.face.id, round(first.distance, 3)) == (face.id, 0)


def test_faces_from_before_the_last_proof_are_not_suspect(laid: Path, tampered: Path) -> None:
    with edited(tampered) as driver:
        driver.execute("UPDATE generation SET checked_before = 6")
    done = repair(tampered, model=ModelBundle.load(laid / "model"))
    assert (done.suspects, done.compared, done.replaced) == (1, 1, 1)


def test_suspects_whose_photos_are_gone_are_listed_and_the_gallery_is_not_called_whole(
    laid: Path, tampered: Path, tmp_path: Path
) -> None:
    gone = Path(faces(tampered)[5].paths[0])
    gone.unlink()
    done = repair(tampered, model=ModelBundle.load(laid / "model"))
    assert found_suspects(done.after) == [6]
    assert (done.compared, done.replaced) == (5, 1)
    # Only the suspect itself has to be compared again.
    assert (checked_before(tampered), noted(tampered)) == ([(7,)], [(1, 6, 7)])


def found_suspects(found: Verification) -> list[int]:
    """The suspects of a gallery, about which nothing else was found."""
    assert {one.trouble for one in found.findings} <= {Trouble.SUSPECT_VECTOR}
    return [number for one in found.findings for number in one.face_ids]


def noted(folder: Path) -> list[tuple[int, int, int]]:
    with closing(sqlite3.connect(folder / "gallery.db")) as driver:
        return driver.execute("SELECT generation_id, first_id, end_id FROM suspect ORDER BY 1, 2").fetchall()


def test_a_suspect_outlives_repairs_until_its_photo_is_back(laid: Path, tampered: Path) -> None:
    """Each repair and each verification says so, and the photo alone ends it."""
    gone = Path(faces(tampered)[5].paths[0])
    kept = gone.read_bytes()
    gone.unlink()
    repair(tampered, model=ModelBundle.load(laid / "model"))
    for _ in range(2):
        assert found_suspects(verify(tampered)) == [6]
        done = repair(tampered)
        assert found_suspects(done.after) == [6]
        assert (done.suspects, done.compared, done.replaced) == (1, 0, 0)
    assert verify(tampered).findings[0].detail == (
        "1 faces may have been embedded while model/ was damaged, and were not compared with their photos: "
        "put the photos back where they were and run `faceprint repair`, or `faceprint repair --fetch` if "
        "some are at addresses; or erase these faces with `faceprint forget --face` and enroll their photos "
        "again"
    )
    gone.write_bytes(kept)
    done = repair(tampered)
    assert (done.after.findings, done.suspects, done.compared, done.replaced) == ((), 1, 1, 1)
    assert verify(tampered).whole
    assert (checked_before(tampered), noted(tampered)) == ([(7,)], [])
    nearest_to_themselves(tampered)


def nearest_to_themselves(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        for face in every(gallery):
            first = gallery.search(Path(face.paths[0]), 1).matches[0]
            assert (first.face.id, round(first.distance, 3)) == (face.id, 0)


def test_a_suspect_that_is_forgotten_and_enrolled_again_is_none(
    laid: Path, tampered: Path, tmp_path: Path
) -> None:
    """Also where its photo comes from elsewhere: the new face has a new number."""
    gone = Path(faces(tampered)[5].paths[0])
    gone.unlink()
    repair(tampered, model=ModelBundle.load(laid / "model"))
    with Gallery.open(tampered) as gallery:
        gallery.forget(face_id=6)
        photo(77).save(gone)
        ingest(gallery, [tmp_path / "photos"], workers=1)
    assert verify(tampered).whole
    assert noted(tampered) == []
    nearest_to_themselves(tampered)


def test_another_model_ends_a_suspicion_when_the_former_one_is_dropped(laid: Path, tampered: Path) -> None:
    """Until then the gallery could go back to it."""
    repair(tampered)
    shutil.copyfile(laid / "model" / "model.onnx", tampered / "model" / "model.onnx")
    with Gallery.open(tampered) as gallery:
        gallery.reembed(ModelBundle.load(laid / "other-model"))
        (finding,) = verify(tampered).findings
        assert (finding.trouble, finding.face_ids) == (Trouble.SUSPECT_VECTOR, (1, 2, 3, 4, 5, 6))
        assert "drop it with `faceprint reembed --drop-other`" in finding.detail
        gallery.drop_other_model()
    assert verify(tampered).whole
    assert noted(tampered) == []


def test_a_repair_that_ends_once_the_model_is_mended_leaves_suspects(laid: Path, tampered: Path) -> None:
    def killed(_: ModelBundle) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mend(tampered, killed, model=ModelBundle.load(laid / "model"))
    assert found_suspects(verify(tampered)) == [1, 2, 3, 4, 5, 6]
    done = repair(tampered)
    assert (done.after.findings, done.suspects, done.compared, done.replaced) == ((), 6, 6, 2)
    nearest_to_themselves(tampered)


def test_a_good_graph_that_is_copied_in_by_hand_does_not_end_a_suspicion(laid: Path, tampered: Path) -> None:
    """A repair has seen the damage; it had nothing to mend it with."""
    assert {one.trouble for one in repair(tampered).after.findings} == {
        Trouble.MODEL_DAMAGED,
        Trouble.SUSPECT_VECTOR,
    }
    shutil.copyfile(laid / "model" / "model.onnx", tampered / "model" / "model.onnx")
    assert found_suspects(verify(tampered)) == [1, 2, 3, 4, 5, 6]
    assert repair(tampered).replaced == 2
    assert verify(tampered).whole
    nearest_to_themselves(tampered)


def test_faces_of_a_mended_model_are_no_suspects(laid: Path, tampered: Path, tmp_path: Path) -> None:
    Path(faces(tampered)[5].paths[0]).unlink()
    repair(tampered, model=ModelBundle.load(laid / "model"))
    with Gallery.open(tampered) as gallery:
        photo(88).save(tmp_path / "photos" / "new.jpg")
        ingest(gallery, [tmp_path / "photos" / "new.jpg"], workers=1)
    assert found_suspects(verify(tampered)) == [6]
    # After the next finding they are.
    flip(tampered / "model" / "model.onnx", 80)
    done = repair(tampered, model=ModelBundle.load(laid / "model"))
    assert (found_suspects(done.after), done.suspects, done.compared) == ([6], 2, 1)
    assert checked_before(tampered) == [(8,)]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_backup_brings_its_suspects_and_those_that_were_compared_since(
    fresh: bool, laid: Path, tampered: Path, tmp_path: Path
) -> None:
    """A restore in place brings vectors back that a repair has replaced; a new gallery knows of none."""
    shutil.copyfile(laid / "model" / "model.onnx", tampered / "model" / "model.onnx")
    with Gallery.open(tampered) as gallery:
        gallery.backup(tmp_path / "before")
    flip(tampered / "model" / "model.onnx", 80)
    gone = Path(faces(tampered)[5].paths[0])
    gone.unlink()
    repair(tampered, model=ModelBundle.load(laid / "model"))
    with Gallery.open(tampered) as gallery:
        gallery.backup(tmp_path / "after")
    target = tmp_path / "fresh.gallery" if fresh else tampered
    Gallery.restore(tmp_path / "after", target)
    assert (found_suspects(verify(target)), checked_before(target)) == ([6], [(7,)])
    Gallery.restore(tmp_path / "before", target)
    assert (found_suspects(verify(target)), checked_before(target)) == ([1, 2, 3, 4, 5, 6], [(None,)])
    Gallery.restore(tmp_path / "after", target)
    assert (found_suspects(verify(target)), checked_before(target)) == ([6], [(7,)])


def test_photos_that_are_gone_do_not_stand_for_others_in_a_sample(
    laid: Path, tampered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are to be are compared; that 5 and 6 differ is found behind those that are gone."""
    monkeypatch.setattr(suspects, "SAMPLE", 2)
    for number in (0, 5):
        Path(faces(tampered)[number].paths[0]).unlink()
    with edited(tampered) as driver:
        driver.execute("UPDATE generation SET checked_before = 1")
    done = repair(tampered, model=ModelBundle.load(laid / "model"))
    assert done.compared == 2
    assert found_suspects(done.after) == [1, 6]
    assert done.suspects == 6
    # The others were not looked at, and nothing is proven by that.
    assert (checked_before(tampered), noted(tampered)) == ([(1,)], [(1, 1, 2), (1, 6, 7)])


def test_a_sample_without_a_difference_is_not_said_to_be_all(
    laid: Path, photographed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "SAMPLE", 2)
    flip(photographed / "model" / "model.onnx", 80)
    done = repair(photographed, model=ModelBundle.load(laid / "model"))
    assert (done.after.findings, done.suspects, done.compared) == ((), 6, 2)
    assert done.after.notes == (
        "2 of 6 faces that the damaged model may have embedded were compared with their photos, and agree; "
        "the other 4 were not looked at.",
    )
    assert checked_before(photographed) == [(None,)]


def test_everything_at_once_is_mended(photographed: Path, tmp_path: Path) -> None:
    with Gallery.open(photographed) as gallery:
        gallery.backup(tmp_path / "backup")
    before = contents(photographed)
    first, last = segments(photographed)
    flip(first, 80)
    last.unlink()
    (backed_up, *_) = sorted(
        (tmp_path / "backup" / "vectors").iterdir(), key=lambda path: path.stat().st_size
    )
    backed_up.unlink()  # of one of the two there is a copy; the other one's photos are there
    flip(photographed / "model" / "model.onnx", 80)
    flip(photographed / "gallery.sums", 80)
    for name in LEFTOVERS:
        leave(photographed, name)
    done = repair(photographed, backup=tmp_path / "backup")
    assert (done.after.findings, done.after.notes) == ((), ())
    assert (done.copied, done.embedded) == (2, 2)
    assert contents(photographed) == before


@pytest.mark.parametrize("change", [remove, empty, lambda path: photo(100).save(path)])
def test_vectors_whose_photos_are_gone_or_have_changed_are_listed_and_nothing_else_happens(
    change: Callable[[Path], None], photographed: Path
) -> None:
    """Rows and files stay as they are; once the photo is back it is mended, and never by another photo."""
    before, rows = contents(photographed), faces(photographed)
    (segment, *_) = segments(photographed)
    flip(segment, 80)
    vectors = {name: data for name, data in files(photographed).items() if name.startswith("vectors/")}
    lost = Path(rows[1].paths[0])
    kept = lost.read_bytes()
    change(lost)
    done = repair(photographed)
    assert done.lost == (rows[1],)
    assert (done.embedded, done.given_up) == (0, 0)
    assert {finding.file for finding in done.after.findings} == {f"vectors/{segment.name}"}
    assert faces(photographed) == rows
    assert {n: data for n, data in files(photographed).items() if n.startswith("vectors/")} == vectors
    lost.write_bytes(kept)
    assert repair(photographed).after.findings == ()
    assert contents(photographed) == before


def test_giving_up_removes_exactly_what_cannot_be_brought_back(photographed: Path) -> None:
    before, rows = contents(photographed), faces(photographed)
    (segment, *_) = segments(photographed)
    flip(segment, 80)
    for number in (0, 2):
        Path(rows[number].paths[0]).unlink()
    done = repair(photographed, give_up=True)
    assert done.after.findings == ()
    assert (done.embedded, done.given_up, done.lost) == (2, 2, ())
    kept = [row for number, row in enumerate(rows) if number not in (0, 2)]
    assert faces(photographed) == kept
    assert contents(photographed) == {
        key: before[key] for key in before if key[0] in {f.sha256 for f in kept}
    }


def test_a_vector_without_a_row_goes_only_when_it_is_given_up(folder: Path) -> None:
    with edited(folder) as driver:
        driver.execute("DELETE FROM file WHERE photo_id = 2")
        driver.execute("DELETE FROM face WHERE id = 2")
        driver.execute("DELETE FROM photo WHERE id = 2")
    rows = faces(folder)
    assert [finding.trouble for finding in repair(folder).after.findings] == [Trouble.VECTOR_WITHOUT_FACE]
    assert repair(folder, give_up=True).after.findings == ()
    assert faces(folder) == rows
    assert len(contents(folder)) == 9


def test_a_face_whose_vector_is_there_twice_is_never_removed(folder: Path) -> None:
    """Both vectors are the same, so the second may go; the face may not."""
    before = contents(folder)
    (segment, *_) = segments(folder)
    shutil.copyfile(segment, folder / "vectors" / "00000099.faiss")
    with edited(folder) as driver:
        values = "99, rows, bytes, sha256, generation_id"
        driver.execute(f"INSERT INTO segment SELECT {values} FROM segment WHERE id = {int(segment.stem)}")
        driver.execute("UPDATE gallery SET next_segment_id = 100")
    repair(folder, give_up=True)
    assert {row.sha256 for row in faces(folder)} == {sha256 for sha256, *_ in before}


@pytest.mark.parametrize("offset", [50, 5000, 60000])
def test_a_damaged_database_is_never_touched(offset: int, laid: Path, folder: Path) -> None:
    """Neither is anything else then, since what the rows say cannot be trusted."""
    flip(folder / "gallery.db", offset)
    flip(segments(folder)[0], 80)
    leave(folder, LEFTOVERS[0])
    before = files(folder)
    done = repair(folder, backup=laid / "backup", give_up=True)
    assert done.after == done.before
    assert Trouble.DATABASE_DAMAGED in {finding.trouble for finding in done.after.findings}
    assert files(folder) == before


READ_ONLY = """
import json, os, sys
from pathlib import Path
from retrieval.errors import FaceprintError
from retrieval.gallery.repair import repair
from retrieval.gallery.integrity import verify
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
found = []
for work in (verify, verify, repair):
    try:
        done = work(Path(sys.argv[1]))
        found.append([f.trouble for f in getattr(done, "after", done).findings])
    except FaceprintError as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""


def test_media_that_cannot_be_written_to_are_verified_and_never_changed(laid: Path) -> None:
    """As another user in another process where this one is root's, since root may write anywhere."""
    with TemporaryDirectory(dir=IN_MEMORY) as temporary:
        Path(temporary).chmod(0o755)
        folder = Path(shutil.copytree(laid / "people.gallery", Path(temporary) / "people.gallery"))
        for name, expected in (("", []), (LEFTOVERS[0], ["leftover"])):
            if name:
                leave(folder, name)
            with read_only(folder):
                before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
                first, second, repaired = tried(folder)
                assert (first, second) == (expected, expected)
                assert repaired in (expected, "StorageError", "GalleryBusy", "InputError")
                assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        assert verify(folder).findings != ()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def tried(folder: Path) -> list[Any]:
    """What verify, verify and repair find, or the name of their error."""
    command = [sys.executable, "-W", "error", "-c", READ_ONLY, str(folder)]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    return list(json.loads(ended.stdout))
