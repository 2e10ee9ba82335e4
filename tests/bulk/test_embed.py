"""Embedding without a gallery: a file is whole or not there, and says of every row which photo it is."""

import csv
import os
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from retrieval.bulk.embed import embed
from retrieval.bulk.ingest import ingest, ingest_embeddings
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import DataError, InputError, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.transfer.vector_files import read_embeddings
from tests.broken import make_broken

KINDS = pytest.mark.parametrize("name", ["out.parquet", "out.npy"])


def photos_of(faces: Path) -> list[Path]:
    return sorted(faces.glob("*/*.jpg"), key=str)


def rows_of(path: Path, bundle: ModelBundle) -> list[tuple[str | None, str | None, str, bytes]]:
    """Path, identity, SHA-256 and the vector's bytes of every row, by whichever kind of file."""
    if path.suffix == ".parquet":
        batches = read_embeddings(
            path, fingerprint=bundle.fingerprint, dimension=bundle.dimension, trusted=False
        )
        return [
            (face.path, face.identity, face.sha256, vector.tobytes())
            for faces, vectors in batches
            for face, vector in zip(faces, vectors, strict=True)
        ]
    vectors = np.load(path)
    assert vectors.dtype == np.float32
    with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        (line["path"] or None, line["identity"] or None, line["sha256"], vector.tobytes())
        for line, vector in zip(lines, vectors, strict=True)
    ]


@KINDS
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_photo_is_a_row_in_order_with_the_vector_that_the_model_gives(
    name: str, workers: int, batch_size: int, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    report = embed(bundle, [faces], tmp_path / name, workers=workers, batch_size=batch_size)
    assert (report.found, report.embedded, report.rejected) == (36, 36, 0)
    embedder = Embedder.open(bundle)
    rows = rows_of(tmp_path / name, bundle)
    assert len(rows) == 36
    for (path, identity, sha256, vector), photo in zip(rows, photos_of(faces), strict=True):
        assert (path, identity) == (str(photo), photo.parent.name)
        assert sha256 == pixels.content_sha256(photo.read_bytes())
        expected = embedder.embed(pixels.read(photo, size=32)[None]).vectors[0]
        np.testing.assert_allclose(np.frombuffer(vector, np.float32), expected, rtol=1e-4, atol=1e-5)


def test_a_gallery_of_a_file_of_embeddings_is_the_gallery_of_the_photos(
    gallery: Gallery, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    embed(bundle, [faces], tmp_path / "out.parquet", batch_size=10)
    report = ingest_embeddings(gallery, tmp_path / "out.parquet")
    assert report.enrolled == 36
    again = ingest(gallery, [faces], rehash=True)
    assert (again.known, again.enrolled) == (36, 0)


@KINDS
def test_broken_files_are_outcomes_and_no_rows(
    name: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "mixed")
    expected = make_broken(tmp_path / "mixed" / "Broken")
    outcomes: list[Outcome] = []
    report = embed(bundle, [tmp_path / "mixed"], tmp_path / name, on_outcome=outcomes.append, batch_size=5)
    assert (report.embedded, report.rejected) == (36, 20)
    assert {Path(o.path or "").name: o.reason for o in outcomes if o.status is Status.REJECTED} == expected
    kept = [o.path for o in outcomes if o.status is Status.EMBEDDED]
    assert [row[0] for row in rows_of(tmp_path / name, bundle)] == kept


@KINDS
def test_a_run_that_is_stopped_leaves_no_new_file_and_an_older_one_as_it_was(
    name: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    asked = iter([False, True])
    report = embed(bundle, [faces], tmp_path / name, batch_size=5, should_stop=lambda: next(asked))
    assert (report.interrupted, report.embedded) == (True, 10)
    assert list(tmp_path.glob("*out*")) == []
    embed(bundle, list(islice(photos_of(faces), 3)), tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*out*")}
    embed(bundle, [faces], tmp_path / name, batch_size=5, should_stop=lambda: True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*out*")} == before
    assert embed(bundle, [faces], tmp_path / name).embedded == 36
    assert len(rows_of(tmp_path / name, bundle)) == 36


@KINDS
def test_an_error_leaves_no_new_file_and_no_thread(
    name: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    def fail(outcome: Outcome) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        embed(bundle, [faces], tmp_path / name, batch_size=5, on_outcome=fail)
    assert list(tmp_path.glob("*out*")) == []
    assert not [
        t for t in threading.enumerate() if t.name.startswith(("faceprint-prepare-", "faceprint-embed-"))
    ]


@KINDS
def test_not_one_readable_photo_leaves_no_file(name: str, bundle: ModelBundle, tmp_path: Path) -> None:
    make_broken(tmp_path / "bad")
    report = embed(bundle, [tmp_path / "bad"], tmp_path / name)
    assert (report.embedded, report.rejected) == (0, 20)
    assert list(tmp_path.glob("*out*")) == []


def test_the_same_bytes_under_two_paths_are_two_rows(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    photo = photos_of(faces)[0]
    shutil.copy(photo, tmp_path / "copy.jpg")
    embed(bundle, [photo, tmp_path / "copy.jpg"], tmp_path / "out.npy")
    first, second = rows_of(tmp_path / "out.npy", bundle)
    assert (first[2:], [first[0], second[0]]) == (second[2:], [str(photo), str(tmp_path / "copy.jpg")])


def test_a_table_that_is_not_of_the_array_is_not_overwritten(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(InputError, match=r"out\.csv would be overwritten"):
        embed(bundle, [faces], tmp_path / "out.npy")
    assert (tmp_path / "out.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["out.txt", "out", "nowhere/out.npy"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_embedded(
    name: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    outcomes: list[Outcome] = []
    with pytest.raises(InputError):
        embed(bundle, [faces], tmp_path / name, on_outcome=outcomes.append)
    assert outcomes == []


@KINDS
def test_a_disk_that_refuses_is_one_sentence(
    name: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """A folder stands where the temporary file would go."""
    (tmp_path / f".{name}.part").mkdir()
    with pytest.raises((StorageError, IsADirectoryError), match=f"{name}"):
        embed(bundle, [faces], tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_missing_source_is_said_first(bundle: ModelBundle, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        embed(bundle, [faces / "nowhere"], tmp_path / "out.npy")


def test_the_report_has_the_stages_and_no_look_into_tables(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    report = embed(bundle, [faces], tmp_path / "out.npy")
    assert [stage.name for stage in report.stages] == ["scan", "read", "decode", "embed", "write"]
    assert report.bytes_read == sum(os.path.getsize(path) for path in photos_of(faces))
    assert {name: report.summary()[name] for name in ("found", "embedded", "rejected")} == {
        "found": 36,
        "embedded": 36,
        "rejected": 0,
    }


@KINDS
def test_decoders_change_nothing_of_the_file(
    name: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "mixed")
    make_broken(tmp_path / "mixed" / "Broken")
    runs = []
    for decoders in (0, 2):
        outcomes: list[Outcome] = []
        report = embed(
            bundle, [tmp_path / "mixed"], tmp_path / name, decoders=decoders, on_outcome=outcomes.append
        )
        assert (report.embedded, report.rejected) == (36, 20)
        runs.append((outcomes, rows_of(tmp_path / name, bundle)))
    assert runs[0] == runs[1]
