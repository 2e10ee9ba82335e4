"""Folders of embedding parts: on disk and at addresses, each part is whole or absent, and none is missed."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from retrieval.bulk.ingest import count_vectors, ingest_embeddings
from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Outcome
from retrieval.errors import DataError, InputError, ModelMismatch, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.transfer.embedding_parts import (
    RUN,
    PartsFolder,
    RunRecord,
    found_parts,
    parts_folder,
    read_record,
    write_record,
)
from retrieval.transfer.vector_files import write_embeddings

NAMES = [f"part-{number:08}-{number:016x}.parquet" for number in range(3)]


class RenamingFileSystem(LocalFileSystem):
    """fsspec's own local file system under another scheme: one where a file is renamed into place."""

    protocol = "tests-disk"


@pytest.fixture(params=["disk", "object store", "other address"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PartsFolder]:
    """An empty folder of parts of each kind."""
    if request.param == "disk":
        yield parts_folder(tmp_path / "run")
    elif request.param == "object store":
        place = f"memory://faceprint-{tmp_path.name}/run/"
        yield parts_folder(place)
        fsspec.filesystem("memory").rm(f"/faceprint-{tmp_path.name}", recursive=True)
    else:
        fsspec.register_implementation("tests-disk", RenamingFileSystem, clobber=True)
        yield parts_folder(f"tests-disk://{tmp_path}/run")


def made_part(path: Path, bundle: ModelBundle, number: int, *, fingerprint: str | None = None) -> Path:
    """A file of 5 rows, which differ by `number`."""
    faces = [NewFace("Ada", f"/photos/{number}-{row}.jpg", f"{number:032x}{row:032x}") for row in range(5)]
    vectors = np.random.default_rng(number).normal(size=(5, bundle.dimension)).astype(np.float32)
    write_embeddings(
        path, [(faces, vectors)], fingerprint=fingerprint or bundle.fingerprint, dimension=bundle.dimension
    )
    return path


def filled(folder: PartsFolder, bundle: ModelBundle, tmp_path: Path, *, complete: bool = True) -> None:
    folder.make()
    for number, name in enumerate(NAMES):
        folder.put(made_part(tmp_path / "made.parquet", bundle, number), name)
    write_record(folder, RunRecord("1", "m", ["/photos"], complete, 15, 15, 0, 15, dict.fromkeys(NAMES, 5)))


def test_a_folder_gives_back_what_was_put_into_it(folder: PartsFolder, tmp_path: Path) -> None:
    assert (folder.names(), folder.read(RUN), read_record(folder)) == ([], None, None)
    folder.make()
    (tmp_path / "made").write_bytes(b"old")
    folder.put(tmp_path / "made", NAMES[0])
    (tmp_path / "made").write_bytes(b"new")
    folder.put(tmp_path / "made", NAMES[0])
    record = RunRecord("1", "m", ["/fotos/Zoë"], True, 2, 1, 1, 3, {NAMES[0]: 3})
    write_record(folder, record)
    assert folder.names() == [NAMES[0], RUN]
    assert (folder.read(NAMES[0]), read_record(folder)) == (b"new", record)
    with folder.part(NAMES[0]).opened() as path:
        assert path.read_bytes() == b"new"
    folder.remove(NAMES[0])
    folder.remove(NAMES[0])
    assert folder.names() == [RUN]


def test_what_a_killed_process_left_of_a_part_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = parts_folder(tmp_path)
    for name in (f".{NAMES[0]}.0123456789abcdef", NAMES[1], ".hidden", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    folder.remove_unfinished()
    assert folder.names() == [".hidden", "notes.txt", NAMES[1]]


def test_a_folder_of_parts_is_enrolled_and_a_second_time_is_a_no_op(
    folder: PartsFolder, bundle: ModelBundle, gallery: Gallery, tmp_path: Path
) -> None:
    filled(folder, bundle, tmp_path)
    outcomes: list[Outcome] = []
    report = ingest_embeddings(gallery, folder.location, on_outcome=outcomes.append)
    assert (report.found, report.enrolled) == (15, 15)
    assert [one.path for one in outcomes] == [f"/photos/{n}-{row}.jpg" for n in range(3) for row in range(5)]
    pattern = f"{folder.location}/*.parquet"
    for again in (pattern, [pattern, f"{folder.location}/{NAMES[1]}"]):
        report = ingest_embeddings(gallery, again)
        assert (report.enrolled, report.known) == (0, report.found)
    assert report.found == 20
    is_here = "://" not in folder.location
    assert count_vectors([pattern]) == (15 if is_here else None)


def test_a_folder_without_a_complete_run_is_refused(
    folder: PartsFolder, bundle: ModelBundle, gallery: Gallery, tmp_path: Path
) -> None:
    folder.make()
    folder.put(made_part(tmp_path / "made.parquet", bundle, 0), NAMES[0])
    with pytest.raises(InputError, match=r"has no run\.json"):
        ingest_embeddings(gallery, folder.location)
    filled(folder, bundle, tmp_path, complete=False)
    with pytest.raises(InputError, match="is not complete; repeat it"):
        ingest_embeddings(gallery, folder.location)
    filled(folder, bundle, tmp_path)
    folder.remove(NAMES[1])
    with pytest.raises(InputError, match=f"lacks 1 of 3 parts, first {NAMES[1]}"):
        ingest_embeddings(gallery, folder.location)
    folder.write(RUN, b'{"id": 1}')
    with pytest.raises(InputError, match=r"run\.json .*embed the photos again"):
        ingest_embeddings(gallery, folder.location)
    with pytest.raises(InputError, match="No file matches"):
        ingest_embeddings(gallery, f"{folder.location}/*.npy")
    assert gallery.info().faces == 0


def test_a_part_of_another_model_stops_the_run_after_the_parts_before_it(
    folder: PartsFolder, bundle: ModelBundle, gallery: Gallery, tmp_path: Path
) -> None:
    filled(folder, bundle, tmp_path)
    folder.put(made_part(tmp_path / "made.parquet", bundle, 2, fingerprint="f" * 64), NAMES[2])
    with pytest.raises(ModelMismatch, match=f"{NAMES[2]} were made by another model"):
        ingest_embeddings(gallery, folder.location)
    assert gallery.info().faces == 10
    folder.write(NAMES[2], b"no Parquet")
    with pytest.raises(InputError, match=f"{NAMES[2]} is not a Parquet file") as raised:
        ingest_embeddings(gallery, [f"{folder.location}/{NAMES[2]}"])
    assert folder.location in str(raised.value)


def test_places_that_cannot_be_used_are_one_sentence(tmp_path: Path, gallery: Gallery) -> None:
    with pytest.raises(DataError, match=r"no way to read nosuch://"):
        parts_folder("nosuch://bucket/run")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/run cannot be used: not a directory"):
        parts_folder(tmp_path / "file" / "run").make()
    with pytest.raises(InputError, match=r"memory://faceprint-absent/e\.parquet cannot be read"):
        ingest_embeddings(gallery, "memory://faceprint-absent/e.parquet")
    with pytest.raises(InputError, match=r"e\.parquet cannot be read: no such file"):
        ingest_embeddings(gallery, tmp_path / "e.parquet")


def test_a_file_whose_name_is_a_pattern_is_that_file(
    bundle: ModelBundle, gallery: Gallery, tmp_path: Path
) -> None:
    made_part(tmp_path / "a[1].parquet", bundle, 1)
    made_part(tmp_path / "a1.parquet", bundle, 2)
    assert [part.path for part in found_parts([tmp_path / "a[1].parquet"])] == [tmp_path / "a[1].parquet"]
    assert [part.path for part in found_parts([tmp_path / "a[0-9].parquet"])] == [tmp_path / "a1.parquet"]
