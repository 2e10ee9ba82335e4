"""An export is the gallery, whole, in files that any program can read; and an import brings it back."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import GalleryBusy, GalleryDamaged, InputError, ModelMismatch, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.network import Network
from retrieval.transfer import import_
from retrieval.transfer.export import export
from retrieval.transfer.export_reader import read_export, rows
from retrieval.transfer.import_ import Imported, import_export
from retrieval.transfer.manifest import Export, _checksum
from tests.faults import FaultServer, Kind, needs_shim, power_loss_images, sweep, trace
from tests.faults import Outcome as Ended
from tests.transfer.numbered_faces import (
    NAMES,
    Row,
    add,
    contents,
    digest_of,
    disk_that_takes,
    face,
    said,
    vector_of,
)
from training.fitting.export import export as export_model


def import_into(gallery: Gallery, folder: Path, **options: Any) -> Imported:
    return import_export(gallery.vault, read_export(folder), gallery.enroll_vectors, **options)


def exported_contents(exported: Export, **options: int) -> set[Row]:
    return {
        (face.sha256, face.identity, face.paths, vector.tobytes())
        for batch in rows(exported, **options)
        for face, vector in zip(batch.faces, batch.vectors, strict=True)
    }


# There and back


@pytest.mark.parametrize("rows_per_file", [1, 4, 100_000])
def test_an_import_brings_back_digests_identities_paths_and_equal_vectors(
    people: Gallery, other: Gallery, tmp_path: Path, rows_per_file: int
) -> None:
    """Whatever the number of files; a face that has several paths has them in the same order."""
    exported = export(people.vault, tmp_path / "out", rows_per_file=rows_per_file)
    assert [file.rows for file in exported.files[:-1]] == [rows_per_file] * (len(exported.files) - 1)
    assert read_export(tmp_path / "out") == exported
    assert max(len(paths) for _, _, paths, _ in contents(people)) == 3
    assert exported_contents(exported) == contents(people)
    report = import_into(other, tmp_path / "out")
    assert report == Imported(enrolled=exported.faces)
    assert contents(other) == contents(people)
    assert other.search_by_vector(vector_of(3), 1)[0].distance == 0.0


def test_photos_survive_the_round_trip(gallery: Gallery, other: Gallery, faces: Path, tmp_path: Path) -> None:
    """What the model made of them, and the bytes of one that was never a file."""
    photos = sorted(faces.glob("*/*"))[:7]
    gallery.enroll([(photo, photo.parent.name) for photo in photos[:-1]])
    gallery.enroll([(shutil.copy(photos[0], tmp_path / "copy"), None), (photos[-1].read_bytes(), None)])
    export(gallery.vault, tmp_path / "out")
    assert import_into(other, tmp_path / "out") == Imported(enrolled=7)
    assert contents(other) == contents(gallery)
    assert other.search(photos[3], 1).matches[0].face.path == str(photos[3])


def test_importing_twice_enrolls_nothing(people: Gallery, other: Gallery, tmp_path: Path) -> None:
    """A face without a path is a duplicate of itself, as it is when its bytes are enrolled again."""
    faces = export(people.vault, tmp_path / "out").faces
    told: list[Outcome] = []
    import_into(other, tmp_path / "out")
    before = contents(other)
    report = import_into(other, tmp_path / "out", on_outcome=told.append)
    assert report == Imported(known=faces - 1, duplicate=1)
    assert [outcome.status for outcome in told].count(Status.KNOWN) == faces - 1
    assert len(told) == report.found == faces
    assert contents(other) == before


def test_what_the_gallery_knows_better_is_judged_as_always(
    gallery: Gallery, other: Gallery, tmp_path: Path
) -> None:
    """A conflict is rejected, a new path makes a duplicate, a path that led elsewhere is counted."""
    add(gallery, 0, 6)
    export(gallery.vault, tmp_path / "out")
    theirs = [
        NewFace("Somebody Else", "/photos/a.jpg", digest_of(0)),
        NewFace(NAMES[1], "/photos/b.jpg", digest_of(1)),
        NewFace("Ann", face(2).path, digest_of(1000)),
        face(3),
    ]
    other.enroll_vectors(theirs, np.stack([vector_of(n) for n in (0, 1, 1000, 3)]))
    told: list[Outcome] = []
    report = import_into(other, tmp_path / "out", on_outcome=told.append)
    assert report == Imported(enrolled=3, duplicate=1, known=1, rejected=1, replaced=1)
    assert {(one.status, one.path) for one in told} == {
        (Status.REJECTED, face(0).path),
        (Status.DUPLICATE, face(1).path),
        (Status.KNOWN, face(3).path),
    }


def test_an_import_that_is_stopped_says_so_and_keeps_what_it_enrolled(
    gallery: Gallery, other: Gallery, tmp_path: Path
) -> None:
    """A batch ends with a file; it can go on later."""
    add(gallery, 0, 6)
    export(gallery.vault, tmp_path / "out", rows_per_file=2)
    answers = iter([False, True])
    report = import_into(other, tmp_path / "out", should_stop=lambda: next(answers))
    assert report == Imported(enrolled=2, interrupted=True)
    assert import_into(other, tmp_path / "out") == Imported(enrolled=4, known=2)


def test_an_empty_gallery_gives_one_file_without_rows(
    gallery: Gallery, other: Gallery, tmp_path: Path
) -> None:
    """So that its columns can be read, and it can be imported."""
    exported = export(gallery.vault, tmp_path / "out")
    assert [(file.name, file.rows) for file in exported.files] == [("faces-00000.parquet", 0)]
    assert (exported.faces, exported.identities, list(rows(read_export(tmp_path / "out")))) == (0, 0, [])
    assert import_into(other, tmp_path / "out") == Imported()


def test_a_face_with_very_many_paths_gets_them_all(
    gallery: Gallery, other: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are offered some at a time, not with as many copies of its vector at once."""
    paths = [f"/photos/{number}.jpg" for number in range(40)]
    offers = [NewFace("Kim", path, digest_of(0)) for path in paths]
    gallery.enroll_vectors(offers, np.stack([vector_of(0)] * len(paths)))
    add(gallery, 1, 3)
    export(gallery.vault, tmp_path / "out")
    monkeypatch.setattr(import_, "BLOCK", 16)
    assert import_into(other, tmp_path / "out") == Imported(enrolled=4)
    assert contents(other) == contents(gallery)


def test_another_model_s_export_is_refused(gallery: Gallery, strangers: ModelBundle, tmp_path: Path) -> None:
    """Its vectors mean nothing here."""
    add(gallery, 0, 3)
    export(gallery.vault, tmp_path / "out")
    with Gallery.create(tmp_path / "strangers.gallery", strangers) as opened:
        with pytest.raises(
            ModelMismatch, match=f"made with another model.*{gallery.bundle.fingerprint[:12]}"
        ):
            import_into(opened, tmp_path / "out")
        assert contents(opened) == set()


# What is in the files


def test_a_stranger_reads_the_export_with_pyarrow_alone(people: Gallery, tmp_path: Path) -> None:
    """Types, values, the files' own metadata, and every sum that the manifest states."""
    exported = export(people.vault, tmp_path / "out", rows_per_file=10)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["faces-00000.parquet", "faces-00001.parquet", "manifest.json"]
    table = pa.concat_tables(pq.read_table(tmp_path / "out" / name) for name in names[:-1])
    assert [(field.name, str(field.type).replace(" not null", "")) for field in table.schema] == [
        ("id", "int64"),
        ("identity", "string"),
        ("sha256", "string"),
        ("enrolled_at", "string"),
        ("paths", "list<element: string>"),
        ("metadata", "string"),
        ("identity_metadata", "string"),
        ("vector", "fixed_size_list<element: float>[2048]"),
    ]
    assert table.schema.metadata == {
        b"faceprint.fingerprint": people.bundle.fingerprint.encode(),
        b"faceprint.gallery": people.info().uuid.encode(),
    }
    with people.vault.store.read() as reader:
        stored = [face for page in reader.all_faces() for face in page]
    columns = table.drop_columns(["vector"]).to_pylist()
    nothing = {"metadata": None, "identity_metadata": None}
    assert columns == [{**_fields(face), "paths": list(face.paths), **nothing} for face in stored]
    row = table.column("sha256").to_pylist().index(digest_of(5))
    assert table.column("vector")[row].as_py() == vector_of(5).tolist()

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert (manifest["format"], manifest["version"]) == ("faceprint-export", 2)
    assert manifest["gallery"] == people.info().uuid
    assert (manifest["faces"], manifest["identities"]) == (table.num_rows, people.info().identities)
    assert manifest["model"] == {
        "fingerprint": people.bundle.fingerprint,
        "architecture": "resnet14-narrow",
        "dimension": 2048,
        "preprocessing": {"size": 32, "crop": 1.0},
        "distance": "euclidean",
        "dtype": "float32",
    }
    assert manifest["columns"].keys() == set(table.column_names)
    for file in manifest["files"]:
        data = (tmp_path / "out" / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert exported.bytes == sum(file["bytes"] for file in manifest["files"])
    checksum = manifest.pop("checksum")
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == checksum


def _fields(stored: Any) -> dict[str, Any]:
    return {name: getattr(stored, name) for name in ("id", "identity", "sha256", "enrolled_at")}


def test_an_export_names_nobody_who_is_not_in_the_gallery(people: Gallery, tmp_path: Path) -> None:
    """Neither who was forgotten nor whom the model was trained on."""
    people.forget("Zoë")
    export(people.vault, tmp_path / "out")
    data = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert "山田 太郎".encode() in data
    assert not any(name.encode() in data for name in ("Zoë", *people.bundle.labels))


def test_an_export_is_written_in_the_audit_log_with_numbers_only(people: Gallery, tmp_path: Path) -> None:
    """As an entry of its own."""
    exported = export(people.vault, tmp_path / "out")
    entry = people.audit_log()[-1]
    assert (entry.action, entry.faces, entry.detail) == ("export", exported.faces, {})


def test_a_gallery_that_is_open_for_reading_only_can_be_exported(people: Gallery, tmp_path: Path) -> None:
    """It is changed in nothing, its log neither."""
    with Gallery.open(people.folder, read_only=True) as opened:
        exported = export(opened.vault, tmp_path / "out")
        assert exported_contents(exported) == contents(people)
    assert "export" not in [entry.action for entry in people.audit_log()]


def test_blocks_of_any_size_hold_the_same_rows(people: Gallery, tmp_path: Path) -> None:
    """A block never spans two files, and the last of a file may be shorter."""
    exported = export(people.vault, tmp_path / "out", rows_per_file=10)
    for size in (1, 3, 7, 10, 1000):
        found = [len(batch.faces) for batch in rows(exported, size=size)]
        assert max(found) <= size
        assert sum(found) == exported.faces
        assert exported_contents(exported, size=size) == contents(people)


def test_a_gallery_whose_vectors_and_faces_differ_is_not_exported(people: Gallery, tmp_path: Path) -> None:
    """The sentence says what to run; nothing is left."""
    with people.vault.writing() as writer:
        writer.remove_faces([2])
    with pytest.raises(GalleryDamaged, match="faceprint verify"):
        export(people.vault, tmp_path / "out")
    with people.vault.writing() as writer:
        writer.add_faces(1000, [NewFace(None, None, digest_of(1000))])
    with pytest.raises(GalleryDamaged, match="has a vector 2 without a face"):
        export(people.vault, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vectors_that_are_not_what_was_written_are_not_exported(people: Gallery, tmp_path: Path) -> None:
    """An export never gives a new checksum to an old damage; the sentence names the file."""
    path = sorted((people.folder / "vectors").glob("*.faiss"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(GalleryDamaged, match=f"{path.name} is not what was written; see `faceprint verify"):
        export(people.vault, tmp_path / "out")
    people.close()  # and so forgets the mapped file
    path.unlink()
    with (
        Gallery.open(people.folder) as opened,
        pytest.raises(GalleryDamaged, match=f"{path.name} is missing"),
    ):
        export(opened.vault, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# While others write


def test_an_export_beside_a_writer_is_one_snapshot(gallery: Gallery, tmp_path: Path) -> None:
    """The writer merges segments all the while; each export has whole batches, all from the beginning on."""
    batch, stop = 7, threading.Event()

    def enroll() -> None:
        with Gallery.open(gallery.folder) as opened:
            for first in range(0, 10_000, batch):
                add(opened, first, batch)
                if stop.is_set():
                    return

    writer = threading.Thread(target=enroll)
    writer.start()
    sizes: list[int] = []
    try:
        while len(sizes) < 5 or sizes[-1] == sizes[0]:
            exported = export(gallery.vault, tmp_path / str(len(sizes)), rows_per_file=50)
            found = exported_contents(exported)
            assert found == {
                (digest_of(n), NAMES[n % len(NAMES)], (f"/photos/ünïcode {n}.jpg",), vector_of(n).tobytes())
                for n in range(len(found))
            }
            assert len(found) % batch == 0
            sizes.append(len(found))
    finally:
        stop.set()
        writer.join()
    assert sizes == sorted(sizes)


# All or nothing


def test_a_target_that_is_not_empty_is_left_alone(people: Gallery, tmp_path: Path) -> None:
    """An empty folder is taken; a file or a folder with something in it is not."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(InputError, match=f"{name} exists already and is not empty"):
            export(people.vault, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert "export" not in [entry.action for entry in people.audit_log()]
    export(people.vault, tmp_path / "empty")
    assert read_export(tmp_path / "empty").faces == people.info().faces


def test_a_file_must_have_a_row(people: Gallery, tmp_path: Path) -> None:
    """Anything less is refused."""
    with pytest.raises(InputError, match="at least one row, not 0"):
        export(people.vault, tmp_path / "out", rows_per_file=0)


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_full_disk_leaves_nothing_of_an_export(people: Gallery, tmp_path: Path, size: int) -> None:
    """Nor a temporary folder beside it."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with disk_that_takes(size), pytest.raises(StorageError, match="cannot be written: file too large"):
        export(people.vault, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_gallery_that_somebody_else_writes_to_is_exported_as_soon_as_the_log_can_be_written(
    people: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that cannot be logged does not exist."""
    monkeypatch.setattr("retrieval.storage.vault.LOCK_TIMEOUT", 0.05)
    with Gallery.open(people.folder) as opened, opened.vault.writing():
        with pytest.raises(GalleryBusy):
            export(people.vault, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export(people.vault, tmp_path / "out")


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(
        ["retrieval.gallery.gallery", "retrieval.transfer.export", "pyarrow.parquet"]
    ) as started:
        yield started


def export_it(root: Path, gallery: Path) -> None:
    """Runs in a child."""
    with Gallery.open(gallery, read_only=True) as opened:
        export(opened.vault, root / "out", rows_per_file=10)


@needs_shim
@pytest.mark.parametrize("kind", [Kind.KILL, Kind.ENOSPC])
def test_an_export_is_whole_or_not_there_wherever_it_fails(
    people: Gallery, server: FaultServer, tmp_path: Path, kind: Kind
) -> None:
    """Killed before any call that changes the disk, or with that call refused."""
    people.close()

    def check(root: Path, ended: Ended) -> None:
        if (root / "out").exists():
            assert read_export(root / "out").faces == 13
        if kind is Kind.ENOSPC:
            assert (root / "out").exists() or ended.error == "StorageError"
            # Where the folder beside it cannot be removed, at least nothing is in it but its lock.
            assert {path.name for path in root.glob(".out-*/*")} <= {".faceprint-lock"}

    swept = sweep(
        export_it,
        lambda root: None,
        check,
        kind=kind,
        servers=[server],
        workspace=tmp_path,
        args=(people.folder,),
    )
    assert swept.points > 10
    assert swept.failures == []


@needs_shim
def test_an_export_survives_the_loss_of_power_whole(
    people: Gallery, server: FaultServer, tmp_path: Path
) -> None:
    """Whatever the disk has of it at any moment: no folder, or everything in it; in the end, everything."""
    people.close()
    root, images = tmp_path / "root", tmp_path / "images"
    for folder in (root, images, tmp_path / "before"):
        folder.mkdir()
    calls = trace(server, export_it, (root, people.folder), root)
    found = []
    for number, _, image in power_loss_images(tmp_path / "before", calls, images, distinct=True):
        there = (image / "out").exists()
        assert not there or read_export(image / "out").faces == 13
        assert there or number < len(calls)
        found.append(there)
    assert set(found) == {True, False}


# Damage


def test_a_flipped_byte_in_any_file_is_refused_by_name_before_anything_is_enrolled(
    people: Gallery, other: Gallery, tmp_path: Path
) -> None:
    """Then a file that is cut, and one that is missing."""
    export(people.vault, tmp_path / "out", rows_per_file=10)
    for path in sorted((tmp_path / "out").iterdir()):
        data = path.read_bytes()
        step = 3 if path.name == "manifest.json" else len(data) // 20
        for position in [*range(0, len(data), step), len(data) - 1]:
            damaged = bytearray(data)
            damaged[position] ^= 1 << position // step % 8
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=path.name):
                import_into(other, tmp_path / "out")
        path.write_bytes(data[:-2])
        with pytest.raises(InputError, match=path.name):
            import_into(other, tmp_path / "out")
        path.unlink()
        with pytest.raises(InputError, match=path.name):
            import_into(other, tmp_path / "out")
        path.write_bytes(data)
    assert contents(other) == set()
    assert import_into(other, tmp_path / "out").enrolled == people.info().faces


def forge(folder: Path, **changes: Any) -> None:
    """A manifest with other contents, and the right checksum."""
    exported = dataclasses.replace(read_export(folder), **changes)
    (folder / "manifest.json").write_text(exported.manifest(), "utf-8")


def test_a_manifest_that_does_not_fit_its_files_is_refused(people: Gallery, tmp_path: Path) -> None:
    """However right its checksum is."""
    folder = tmp_path / "out"
    (file,) = export(people.vault, folder).files
    manifest = (folder / "manifest.json").read_text("utf-8")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"faces": file.rows + 1}, "do not have as many rows"),
        (
            {"files": (dataclasses.replace(file, rows=3),)},
            r"faces-00000.parquet has 13 rows and should have 3",
        ),
        ({"files": (dataclasses.replace(file, name="../secret"),)}, "names files that no export has"),
        ({"dimension": 64}, r"faces-00000.parquet has no column vector of type fixed_size_list"),
    ]
    for changes, message in wrong:
        forge(folder, **changes)
        with pytest.raises(InputError, match=message):
            read_export(folder)
        (folder / "manifest.json").write_text(manifest, "utf-8")
    assert read_export(folder).faces == 13


def edit(folder: Path, field: str, value: Any) -> None:
    """Changes a field of a manifest, such as `files.0.rows`, and makes its checksum right; ... removes it."""
    path = folder / "manifest.json"
    card = json.loads(path.read_text("utf-8"))
    del card["checksum"]
    place = card
    *above, last = [int(name) if name.isdigit() else name for name in field.split(".")]
    for name in above:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    text = json.dumps(card, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    path.write_text(json.dumps(card | {"checksum": hashlib.sha256(text.encode()).hexdigest()}), "utf-8")


COUNTS = ("revision", "faces", "identities")
OF_MODELS = ("fingerprint", "dimension", "preprocessing", "architecture")
OF_FILES = ("name", "rows", "bytes", "sha256")


@pytest.fixture(scope="module")
def calibrated_export(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a gallery that is calibrated."""
    folder = tmp_path_factory.mktemp("calibrated")
    with Gallery.create(folder / "g", bundle) as gallery:
        add(gallery, 0, 12)
        gallery.calibrate(0.5)
        export(gallery.vault, folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        *((name, wrong, name) for name in ("format", "created_at", "gallery") for wrong in (..., None, 1)),
        *((name, wrong, name) for name in COUNTS for wrong in (..., None, "1", -1, 1.5)),
        ("version", "2", "version"),
        ("version", 0, "version"),
        ("gallery", "../../else", "gallery"),
        ("faces", 2**70, "faces"),
        ("identities", 99, "identities"),
        *((f"model.{name}", wrong, f"model.{name}") for name in OF_MODELS for wrong in (None, [])),
        ("model", "x", "model"),
        ("model.fingerprint", "x" * 64, "model.fingerprint"),
        ("model.dimension", 0, "model.dimension"),
        ("model.dimension", 2**40, "model.dimension"),
        ("model.preprocessing.size", "32", "model.preprocessing.size"),
        ("model.preprocessing.crop", 0, "model.preprocessing.crop"),
        *(("files", wrong, "files") for wrong in (..., None, {}, [], "faces-00000.parquet")),
        *((f"files.0.{name}", wrong, name) for name in OF_FILES for wrong in (..., None, [])),
        ("files.0.rows", -1, "files[0].rows"),
        ("files.0.sha256", "../x", "files[0].sha256"),
        ("files.0.bytes", 1, "faces-00000.parquet"),
        *(("files.0.name", wrong, "names files") for wrong in ("../faces-00000.parquet", "/etc/passwd")),
        *(("files.0.name", wrong, "names files") for wrong in ("manifest.json", "faces-00000.parquet\0")),
        ("calibration", [], "calibration"),
        ("calibration.points", None, "calibration.points"),
        ("calibration.points", [], "calibration.fpir"),
        ("calibration.fpir", "0.5", "calibration.fpir"),
        ("calibration.fpir", 0.123, "calibration.fpir"),
        ("calibration.fingerprint", "f" * 64, "calibration.fingerprint"),
        ("calibration.strangers", "nobody", "calibration.strangers"),
        ("calibration.faces", -1, "calibration.faces"),
        ("calibration.points.0.threshold", None, "threshold"),
        ("calibration.points.0.seen.n", -1, "calibration.points[0]"),
        ("calibration.points.0.seen.value", None, "calibration.points[0]"),
        ("calibration.points.0.seen.high", 2, "calibration.points[0]"),
        ("calibration.points.0.upcoming.low", 99, "calibration.points[0]"),
        ("calibration.points.0.upcoming", "none", "upcoming"),
    ],
)  # fmt: skip
def test_a_manifest_with_a_wrong_field_is_one_sentence_that_names_it(
    field: str, value: Any, named: str, calibrated_export: Path, tmp_path: Path
) -> None:
    """However right its checksum is."""
    shutil.copytree(calibrated_export, tmp_path / "out")
    edit(tmp_path / "out", field, value)
    with pytest.raises(InputError, match=r"^[^\n]*\.$") as caught:
        read_export(tmp_path / "out")
    assert named in str(caught.value) or (field, value) == ("format", value)


def test_a_manifest_that_is_nested_deeply_or_is_no_json_is_one_sentence(
    calibrated_export: Path, tmp_path: Path
) -> None:
    shutil.copytree(calibrated_export, tmp_path / "out")
    for text in ("[" * 100_000, '{"format": ' * 50_000, "", "null", "\xff", '{"format": NaN}'):
        (tmp_path / "out" / "manifest.json").write_text(text, "latin-1")
        with pytest.raises(InputError, match=r"^[^\n]*manifest\.json is damaged"):
            read_export(tmp_path / "out")


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replaces the rows of an export, and makes hashes and numbers of its manifest right."""
    path = folder / "faces-00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    data = path.read_bytes()
    edit(folder, "files.0.sha256", hashlib.sha256(data).hexdigest())
    edit(folder, "files.0.bytes", len(data))
    for field in ("files.0.rows", "faces"):
        edit(folder, field, pq.read_metadata(path).num_rows)


def with_last(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    """Another value of a column in the last row."""

    def change(table: pa.Table) -> pa.Table:
        column = table.column(name)
        values = pa.array([*column.to_pylist()[:-1], value], column.type)
        place = table.column_names.index(name)
        return table.set_column(place, pa.field(name, column.type), values)

    return change


def with_first_again(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_last(name, table.column(name)[0].as_py())(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_last("id", None), "Row 11 .* value of id"),
        (with_last("id", -3), "Row 11 .* value of id"),
        (with_first_again("id"), "A face id comes twice"),
        (with_last("sha256", None), "Row 11 .* value of sha256"),
        (with_last("sha256", "x"), "Row 11 .* value of sha256"),
        (with_first_again("sha256"), "A SHA-256 comes twice"),
        (with_last("enrolled_at", None), "Row 11 .* value of enrolled_at"),
        (with_last("identity", "A\0b"), "Row 11 .* value of identity"),
        (with_last("identity", "somebody else"), "as many faces or identities"),
        (with_last("paths", None), "Row 11 .* value of paths"),
        (with_last("paths", ["/a\0b.jpg"]), "Row 11 .* value of paths"),
        (with_last("paths", ["a.jpg"]), "Row 11 .* value of paths"),
        (with_first_again("paths"), "A path comes twice"),
        (with_last("metadata", "[" * 10_000), "metadata of row 11"),
        (with_last("metadata", json.dumps({"a": "x" * 100_000})), "metadata of row 11"),
        (with_last("identity_metadata", "3"), "metadata of row 11"),
        (with_last("vector", None), "Row 11 .* has no vector"),
        (with_last("vector", [float("nan")] * 2048), "vector in row 11"),
        (lambda table: table.drop_columns(["sha256"]), "has no column sha256"),
        (lambda table: table.append_column("id", table.column("id")), "has no column id"),
        (lambda table: table.set_column(0, "id", table.column("id").cast(pa.int32())), "has no column id"),
    ],
)
def test_rows_that_no_export_has_are_refused_before_any_is_enrolled(
    change: Callable[[pa.Table], pa.Table], message: str, calibrated_export: Path, tmp_path: Path
) -> None:
    """However right the hashes of the manifest are: who has an Export can trust it."""
    shutil.copytree(calibrated_export, tmp_path / "out")
    rewrite(tmp_path / "out", change)
    with pytest.raises(InputError, match=message):
        read_export(tmp_path / "out")


def test_rows_that_were_changed_and_are_right_are_imported(
    calibrated_export: Path, other: Gallery, tmp_path: Path
) -> None:
    """So that the test before is one of what it changes."""
    shutil.copytree(calibrated_export, tmp_path / "out")
    rewrite(tmp_path / "out", with_last("paths", ["/elsewhere.jpg"]))
    assert import_into(other, tmp_path / "out").enrolled == 12
    assert other.calibration() is not None


def test_links_and_pipes_in_place_of_the_files_of_an_export_are_refused(
    calibrated_export: Path, tmp_path: Path
) -> None:
    for name in ("faces-00000.parquet", "manifest.json"):
        folder = tmp_path / name
        shutil.copytree(calibrated_export, folder)
        (folder / name).unlink()
        (folder / name).symlink_to(calibrated_export / name)
        with pytest.raises(InputError, match=name):
            read_export(folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=name):
            read_export(folder)


def test_an_export_of_a_model_that_heeds_colour_profiles_is_refused_by_who_knows_of_none(
    people: Gallery, network: Network, tmp_path: Path
) -> None:
    """Version 0.1.0's first readers know export versions up to 2 and cards up to format 2."""
    heeding = export_model(
        network,
        tmp_path / "model",
        labels=people.bundle.labels,
        reader=PhotoReader(Preprocessing(size=32, crop=1.0, colour="srgb")),
        recipe={},
        split={},
        figures={},
        sample=np.zeros((1, 32, 32, 3), np.uint8),
    )
    assert json.loads((heeding.folder / "bundle.json").read_text("utf-8"))["format"] == 3
    with Gallery.create(tmp_path / "g", heeding) as gallery:
        export(gallery.vault, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))["version"] == 3
    found = read_export(tmp_path / "out")
    assert (found.version, found.preprocessing) == (3, heeding.preprocessing)
    with Gallery.create(tmp_path / "same", heeding) as gallery:
        assert gallery.import_export(found).enrolled == 0
    with pytest.raises(ModelMismatch):
        people.import_export(found)


def test_a_folder_without_a_manifest_and_a_newer_version_are_refused(people: Gallery, tmp_path: Path) -> None:
    """With the sentence that says what to do."""
    with pytest.raises(InputError, match=r"is not an export: it has no manifest\.json"):
        read_export(tmp_path)
    export(people.vault, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text("utf-8").replace('"version": 2', '"version": 5'), "utf-8")
    with pytest.raises(InputError, match=r"has version 5 and .* reads up to 4; upgrade faceprint"):
        read_export(tmp_path / "out")
    path.write_text("[]")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_export(tmp_path / "out")


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    """And the module itself can be imported."""
    code = """
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from retrieval.transfer.export import export
from retrieval.transfer.vector_files import read_embeddings, write_embeddings
from retrieval.errors import MissingDependency
calls = [
    lambda: export(None, Path("out")),
    lambda: read_embeddings(Path("e"), fingerprint="", dimension=1, trusted=True),
    lambda: write_embeddings(Path("e"), [], fingerprint="", dimension=1),
]
for call in calls:
    try:
        call()
    except MissingDependency as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    sentence = (
        "Reading and writing Parquet needs pyarrow; install it with pip install 'faceprint[parquet]'.\n"
    )
    assert done.stdout == 3 * sentence


# Metadata of faces and identities


def test_an_import_brings_back_what_was_said(people: Gallery, other: Gallery, tmp_path: Path) -> None:
    """With its types; a second import is no news."""
    faces = {1: {"é": 1.0, "n": 2**60, "deep": [{"a": None}]}, 3: {"b": True}, 13: {"none": 1}}
    people.annotate(faces=faces, identities={"Zoë": {"country": "FR"}, "🙂": {"x": {"y": "z"}}})
    exported = export(people.vault, tmp_path / "out")
    assert sum(bool(face.metadata) for batch in rows(exported, size=4) for face in batch.faces) == 3
    import_into(other, tmp_path / "out")
    assert said(other) == said(people)
    assert repr(said(other)) == repr(said(people))
    log = other.audit_log()
    import_into(other, tmp_path / "out")
    assert (said(other), other.audit_log()) == (said(people), log)


def test_what_a_gallery_says_itself_is_kept_and_filled_in(
    people: Gallery, other: Gallery, tmp_path: Path
) -> None:
    people.annotate(faces={1: {"a": 1, "b": 1}}, identities={"Zoë": {"country": "FR", "badge": 7}})
    export(people.vault, tmp_path / "out")
    add(other, 0, 2)
    other.annotate(faces={1: {"a": 2}}, identities={"Zoë": {"country": "IT"}})
    other.rename_identity("Zoë", "Zora")
    import_into(other, tmp_path / "out")
    assert said(other)[0] == {digest_of(0): {"a": 2, "b": 1}}
    assert other.identity_metadata(["Zora"]) == {"Zora": {"country": "IT", "badge": 7}}


def test_an_export_of_version_1_can_be_imported(people: Gallery, other: Gallery, tmp_path: Path) -> None:
    """It had no columns of metadata."""
    people.annotate(faces={1: {"a": 1}})
    export(people.vault, tmp_path / "out")
    path, manifest = tmp_path / "out" / "faces-00000.parquet", tmp_path / "out" / "manifest.json"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["metadata", "identity_metadata"]), path, use_dictionary=False)
    card = json.loads(manifest.read_text())
    del card["checksum"], card["columns"]["metadata"], card["columns"]["identity_metadata"]
    card["version"] = 1
    card["files"][0] |= {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps({**card, "checksum": _checksum(card)}))
    assert read_export(tmp_path / "out").version == 1
    import_into(other, tmp_path / "out")
    assert contents(other) == contents(people)
    assert said(other) == ({}, {})
