"""Bulk enrollment: what happens to every file."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from retrieval.bundle import ModelBundle
from retrieval.errors import DataError, InputError, Reason
from retrieval.gallery import Gallery, Outcome, Status
from retrieval.ingestion import IngestReport, ingest
from tests.broken import make_broken


def _everything(gallery: Gallery) -> dict[int, tuple[str | None, str | None, str]]:
    with gallery.vault.store.read() as reader:
        faces = reader.faces(range(1, reader.gallery().next_face_id))
    return {number: (face.identity, face.path, face.sha256) for number, face in faces.items()}


def test_every_photo_of_identity_folders_becomes_a_face_of_its_person(gallery: Gallery, faces: Path) -> None:
    report = ingest(gallery, [faces])
    assert (report.found, report.enrolled, report.rejected) == (36, 36, 0)
    stored = _everything(gallery)
    assert {(identity, path) for identity, path, _ in stored.values()} == {
        (path.parent.name, str(path)) for path in faces.glob("*/*.jpg")
    }
    assert gallery.info().faces == 36


def test_a_second_run_enrolls_nothing(gallery: Gallery, faces: Path) -> None:
    ingest(gallery, [faces])
    before = _everything(gallery)
    report = ingest(gallery, [faces])
    assert (report.found, report.enrolled, report.known) == (36, 0, 36)
    assert _everything(gallery) == before


def test_twenty_broken_files_among_good_ones_are_twenty_lines_and_no_abort(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mixed"
    shutil.copytree(faces, source)
    expected = make_broken(source / "Broken")
    outcomes: list[Outcome] = []
    report = ingest(gallery, [source], on_outcome=outcomes.append, batch_size=7)
    assert len(expected) == 20
    assert (report.found, report.enrolled, report.rejected) == (56, 36, 20)
    rejected = {Path(o.path or "").name: o.reason for o in outcomes if o.status is Status.REJECTED}
    assert rejected == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_face_ids_and_vectors_do_not_depend_on_threads_or_batches(
    gallery: Gallery, faces: Path, workers: int, batch_size: int
) -> None:
    ingest(gallery, [faces], workers=workers, batch_size=batch_size)
    paths = sorted(faces.glob("*/*.jpg"), key=str)
    assert [path for _, path, _ in _everything(gallery).values()] == [str(path) for path in paths]
    alone = gallery.search(paths[17], k=1).matches[0]
    assert (alone.face.path, alone.distance) == (str(paths[17]), 0.0)


def test_outcomes_come_in_the_order_of_the_files(gallery: Gallery, faces: Path) -> None:
    outcomes: list[Outcome] = []
    ingest(gallery, [faces], workers=4, batch_size=5, on_outcome=outcomes.append)
    assert [o.path for o in outcomes] == sorted(str(path) for path in faces.glob("*/*.jpg"))


def test_the_same_bytes_elsewhere_are_a_duplicate_and_under_another_name_a_conflict(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    first = sorted(faces.glob("*/*.jpg"))[0]
    same, other = tmp_path / "s" / first.parent.name, tmp_path / "s" / "Zoë"
    for folder in (same, other):
        folder.mkdir(parents=True)
        shutil.copy(first, folder / "copy.jpg")
    ingest(gallery, [faces])
    outcomes: list[Outcome] = []
    report = ingest(gallery, [tmp_path / "s"], on_outcome=outcomes.append)
    assert (report.duplicate, report.rejected, report.enrolled) == (1, 1, 0)
    assert [o.reason for o in outcomes] == [None, Reason.IDENTITY_CONFLICT]
    assert first.parent.name in (outcomes[1].detail or "")


def test_single_files_and_flat_folders_have_no_identity(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(photos[0], flat)
    ingest(gallery, [flat, photos[1]])
    assert [identity for identity, _, _ in _everything(gallery).values()] == [None, None]


def test_names_in_any_script_go_in_and_come_out(gallery: Gallery, faces: Path, tmp_path: Path) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    names = ["Ægir Þór", "王小明", "نور", 'O\'Brien "Bob"; DROP TABLE face', "emoji 🙂"]
    for name, photo in zip(names, photos, strict=False):
        (tmp_path / "people" / name).mkdir(parents=True)
        shutil.copy(photo, tmp_path / "people" / name / "a photo.jpg")
    assert ingest(gallery, [tmp_path / "people"]).enrolled == len(names)
    assert sorted(identity or "" for identity, _, _ in _everything(gallery).values()) == sorted(names)


def test_a_name_that_is_not_utf8_is_a_line_in_the_report(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0]
    (tmp_path / "flat").mkdir()
    shutil.copy(photo, os.fsencode(tmp_path / "flat") + b"/caf\xe9.jpg")
    outcomes: list[Outcome] = []
    report = ingest(gallery, [tmp_path / "flat"], on_outcome=outcomes.append)
    assert report.reasons == {Reason.NAME_NOT_UTF8: 1}
    (outcomes[0].path or "").encode()  # can be written to a report


def test_stopping_keeps_whole_batches_and_the_next_run_ends_as_if_undisturbed(
    gallery: Gallery, faces: Path
) -> None:
    asked = iter([False, True])
    report = ingest(gallery, [faces], batch_size=10, should_stop=lambda: next(asked))
    assert (report.interrupted, report.enrolled, gallery.info().faces) == (True, 20, 20)
    again = ingest(gallery, [faces], batch_size=10)
    assert (again.known, again.enrolled, gallery.info().faces) == (20, 16, 36)


def test_a_missing_source_is_said_before_anything_is_enrolled(gallery: Gallery, faces: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        ingest(gallery, [faces, faces / "nowhere"])
    assert gallery.info().faces == 0


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"workers": 0}])
def test_nonsensical_numbers_are_refused(gallery: Gallery, faces: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        ingest(gallery, [faces], **arguments)


def test_a_gallery_or_a_model_among_the_photos_is_passed_over(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "photos")
    bundle.save(tmp_path / "photos" / "a model")
    with Gallery.create(tmp_path / "photos" / "a gallery", bundle) as gallery:
        report = ingest(gallery, [tmp_path / "photos"], batch_size=5)
        again = ingest(gallery, [tmp_path / "photos"], batch_size=5)
    assert (report.found, report.enrolled, again.found, again.known) == (36, 36, 36, 36)


def test_an_empty_folder_is_an_empty_report(gallery: Gallery, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ingest(gallery, [tmp_path / "empty"]).found == 0


def test_found_is_the_sum_of_the_four_fates() -> None:
    report = IngestReport()
    for status, reason in (
        (Status.ENROLLED, None),
        (Status.KNOWN, None),
        (Status.DUPLICATE, None),
        (Status.REJECTED, Reason.TRUNCATED),
        (Status.REJECTED, Reason.NO_PERMISSION),
    ):
        report.count(Outcome("p", None, status, reason=reason))
    assert (report.found, report.rejected, report.worth_retrying) == (5, 2, 1)


def test_one_photo_taken_by_library_call_equals_the_one_taken_in_bulk(gallery: Gallery, faces: Path) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[3]
    ingest(gallery, [faces])
    bulk = gallery._vector(4)
    gallery.forget(photo.parent.name)
    (outcome,) = gallery.enroll([(photo, photo.parent.name)])
    assert outcome.status is Status.ENROLLED
    assert outcome.face_id == 37
    np.testing.assert_array_equal(gallery._vector(37), bulk)
