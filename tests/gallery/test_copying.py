"""A copy of a gallery has all rows and all vectors of it, or there is none; an interrupted one is resumed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.database.metadata import to_json
from retrieval.database.records import NewFace
from retrieval.database.tables import metadata
from retrieval.errors import GalleryDamaged, GalleryError, Interrupted
from retrieval.gallery import copying
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import FORGOTTEN
from retrieval.quality import doubts
from retrieval.quality.audit import audit
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import add, add_group, contents, face, group, tiny_model, vector_of

__all__ = ["faceprint"]  # pytest finds the fixture by its name


def fill(gallery: Gallery) -> None:
    """Makes rows in every table: names, former names, merges, places in photos, doubts, receipts."""
    add(gallery, range(20))
    add_group(gallery, group(30, 3))
    add_group(gallery, group(31, 3))
    gallery.rename_identity("Adi", "Adi Berg")
    gallery.rename_identity("Kim", "Kim Rosenthal")
    gallery.merge_identities("Kim Rosenthal", "Adi Berg")
    gallery.annotate(faces={2: {"camera": "ü", "x": 1.5}}, identities={"Adi Berg": {"team": [1, None]}})
    gallery.forget("Zephyr Kant")
    add(gallery, range(40, 46))
    gallery.forget(face_id=1)
    add(gallery, range(50, 52))
    gallery.calibrate(0.5)
    doubts.keep(gallery, audit(gallery, limit=0.1))


def rows(gallery: Gallery) -> dict[str, list[Any]]:
    """The rows of a gallery, except those of its files and of what a copy adds."""
    with gallery.vault.store.read() as reader:
        found = {
            table.name: [to_json(row) for part in reader.rows(table) for row in part]
            for table in metadata.sorted_tables
            if table.name not in ("segment", "basis", "codes", "generation", "gallery")
        }
        row = reader.gallery()
    found["audit"] = [entry for entry in found["audit"] if '"copy"' not in entry]
    found["counters"] = [row.uuid, row.created_at, row.next_face_id, row.next_identity_id]
    return found


@pytest.fixture
def source(tmp_path: Path) -> Gallery:
    gallery = Gallery.create(tmp_path / "source", tiny_model(tmp_path / "model"))
    fill(gallery)
    return gallery


def test_a_copy_is_the_same_gallery(source: Gallery, tmp_path: Path) -> None:
    expected = rows(source)
    assert {name for name, found in expected.items() if not found} <= {"suspect", "host"}
    done = source.copy(tmp_path / "copy")
    assert done.vectors == done.faces == source.info().faces
    with Gallery.open(tmp_path / "copy") as made:
        assert rows(made) == expected
        assert made.verify().whole
        assert made.bundle.labels == source.bundle.labels
        assert FORGOTTEN in made.bundle.labels
        assert contents(tmp_path / "copy") == contents(tmp_path / "source")
        assert made.audit_log()[-1].action == source.audit_log()[-1].action == "copy"
        [outcome] = made.enroll_vectors(*one_more(99))
        assert outcome.face_id == expected["counters"][2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model", "source"]
    assert source.copy(tmp_path / "again").sha256 != done.sha256  # its audit log has the first copy


def one_more(number: int) -> tuple[list[NewFace], NDArray[np.float32]]:
    one = face(number)
    return [one], vector_of(one.sha256)[None]


def stopping_after(calls: int) -> Callable[[], bool]:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > calls

    return should_stop


@pytest.mark.parametrize("calls", [1, 3, 7])
def test_an_interrupted_copy_is_resumed_with_the_state_of_then(
    calls: int, source: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faces that were forgotten since leave it, new ones come; parts that stayed are not copied again."""
    monkeypatch.setattr(copying, "rows_at_a_time", lambda dimension: 4)
    with source.vault.store.read() as reader:
        source.vault.vectors(source.vault.serving(reader)).ceiling = 4  # type: ignore[attr-defined]
    source.compact()
    with pytest.raises(Interrupted):
        source.copy(tmp_path / "copy", should_stop=stopping_after(calls))
    assert not (tmp_path / "copy").exists()
    gone = next(iter(source.search_by_vector(np.zeros(8), 1))).face.id
    source.forget(face_id=gone)
    source.enroll_vectors(*one_more(98))
    done = source.copy(tmp_path / "copy")
    assert done.faces == source.info().faces
    assert (done.vectors < done.faces) == (calls > 1)
    with Gallery.open(tmp_path / "copy") as made:
        assert rows(made) == rows(source)
        assert made.verify().whole
    assert contents(tmp_path / "copy") == contents(tmp_path / "source")


def test_a_copy_that_differs_is_no_gallery(
    source: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector is changed on its way; and, in another copy, a row."""

    true_put = copying.FolderTarget.put
    with monkeypatch.context() as patch:
        patch.setattr(copying.FolderTarget, "put", lambda self, ids, some: true_put(self, ids, some + 1))
        with pytest.raises(GalleryDamaged, match=r"The vectors of .* are not those of"):
            source.copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    shutil.rmtree(tmp_path / "copy.copying")
    true_fill = copying._fill

    def fill_less(reader: Any, writer: Any, *others: Any) -> None:
        true_fill(reader, writer, *others)
        writer.rename_identity(writer.identity_id("Adi Berg"), "Adi")

    monkeypatch.setattr(copying, "_fill", fill_less)
    with pytest.raises(GalleryDamaged, match=r"The rows of .* are not those of"):
        source.copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_command_says_what_it_has_copied(source: Gallery, tmp_path: Path, faceprint: Faceprint) -> None:
    source.close()
    status, out, err = faceprint("copy", tmp_path / "source", tmp_path / "copy", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["target"], told["vectors"]) == (str(tmp_path / "copy"), told["faces"])
    status, _, err = faceprint("copy", tmp_path / "source", tmp_path / "copy")
    assert status == 2
    assert err == f"faceprint: {tmp_path / 'copy'} exists already and is not empty; choose another folder.\n"
    status, _, err = faceprint("copy", tmp_path / "source", tmp_path / "new", "--vectors-at", "milvus://h/c")
    assert status == 2
    assert err.endswith("leave --vectors-at out.\n")


def test_nothing_that_is_there_is_overwritten(source: Gallery, tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="exists already and is not empty"):
        source.copy(tmp_path / "source")
    (tmp_path / "copy.copying").mkdir()
    (tmp_path / "copy.copying" / "mine.txt").write_text("mine")
    with pytest.raises(GalleryError, match="is not an unfinished copy of this gallery"):
        source.copy(tmp_path / "copy")
    with Gallery.create(tmp_path / "other", tiny_model(tmp_path / "model-2", seed=1)) as other:
        add(other, range(3))
        with pytest.raises(Interrupted):
            other.copy(tmp_path / "third", should_stop=stopping_after(0))
    with pytest.raises(GalleryError, match="is not an unfinished copy of this gallery"):
        source.copy(tmp_path / "third")
