"""Bulk enrollment: what happens to every file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval.bulk.ingest import ingest, ingest_photos
from retrieval.bulk.reports import IngestReport
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import DataError, InputError, ModelMismatch, Reason, RunError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.search.nearest import vector_of
from retrieval.sources.photos import Photo, scan
from retrieval.system.memory import peak_memory
from tests.broken import make_broken
from tests.operations import tiny_model


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


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"workers": 0}, {"decoders": -1}])
def test_nonsensical_numbers_are_refused(gallery: Gallery, faces: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"at least [01]"):
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
    bulk = vector_of(gallery.vault, 4)
    gallery.forget(photo.parent.name)
    (outcome,) = gallery.enroll([(photo, photo.parent.name)])
    assert outcome.status is Status.ENROLLED
    assert outcome.face_id == 37
    np.testing.assert_array_equal(vector_of(gallery.vault, 37), bulk)


# Stages


def threads_of_ours() -> list[str]:
    stages = ("faceprint-recognize-", "faceprint-prepare-", "faceprint-embed-")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(stages)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_same_bytes_twice_while_both_are_underway_are_one_face_and_a_duplicate(
    batch_size: int, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))[:4]
    for number, photo in enumerate([*photos, *photos]):
        shutil.copy(photo, tmp_path / f"{number}.jpg")
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    outcomes: list[Outcome] = []
    ingest(gallery, paths, batch_size=batch_size, workers=3, on_outcome=outcomes.append)
    assert [o.status for o in outcomes] == [Status.ENROLLED] * 4 + [Status.DUPLICATE] * 4
    assert [o.face_id for o in outcomes] == [1, 2, 3, 4] * 2


def test_a_switch_to_another_model_ends_the_run_with_the_batches_before_enrolled(
    gallery: Gallery, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    done: list[Outcome] = []

    def switch(outcome: Outcome) -> None:
        done.append(outcome)
        if len(done) == 5:
            with Gallery.open(gallery.folder) as another:
                another.reembed(other)

    with pytest.raises(ModelMismatch, match="run the same command again"):
        ingest(gallery, [faces], batch_size=5, on_outcome=switch)
    assert threads_of_ours() == []
    assert (len(done), gallery.info().faces) == (5, 5)
    assert gallery.verify().findings == ()
    report = ingest(gallery, [faces], batch_size=5)
    assert (report.known, report.enrolled, gallery.verify().findings) == (5, 31, ())


def test_a_face_that_is_forgotten_while_its_copy_is_underway_is_enrolled_from_the_copy(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    """The copy was known by its bytes when it was read, so its picture was not kept."""
    first, *others = sorted(faces.glob("*/*.jpg"))[:5]
    gallery.enroll([(first.read_bytes(), None)])
    copy = tmp_path / "copy.jpg"
    shutil.copy(first, copy)
    outcomes: list[Outcome] = []

    def forget(outcome: Outcome) -> None:
        if not outcomes:
            gallery.forget(face_id=1)
        outcomes.append(outcome)

    ingest(gallery, [*others, copy], batch_size=1, on_outcome=forget)
    assert [o.status for o in outcomes] == [Status.ENROLLED] * 5
    assert {o.face_id for o in outcomes} == set(range(2, 7))


def _archive_of(faces: Path, path: Path) -> Path:
    """The drawn faces as a zip, whose members are the same bytes under other paths."""
    with zipfile.ZipFile(path, "w") as archive:
        for photo in sorted(faces.glob("*/*.jpg")):
            archive.write(photo, photo.relative_to(faces))
    return path


def test_members_of_an_archive_whose_bytes_are_enrolled_are_not_embedded(
    gallery: Gallery, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    ingest(gallery, photos[:-1])
    embedded: list[int] = []
    embed = gallery.embedder.embed

    def counted(squares: np.ndarray) -> object:
        embedded.append(len(squares))
        return embed(squares)

    monkeypatch.setattr(gallery.embedder, "embed", counted)
    outcomes: list[Outcome] = []
    report = ingest(gallery, [_archive_of(faces, tmp_path / "faces.zip")], on_outcome=outcomes.append)
    assert (report.duplicate, report.enrolled, embedded) == (35, 1, [1])
    assert [Path(one.path or "").name for one in outcomes] == [photo.name for photo in photos]
    assert gallery.info().faces == 36


def test_a_face_that_is_forgotten_while_its_copy_in_an_archive_is_underway_is_enrolled_from_the_copy(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    ingest(gallery, photos)
    archive = _archive_of(faces, tmp_path / "faces.zip")
    outcomes: list[Outcome] = []

    def forget(outcome: Outcome) -> None:
        if not outcomes:
            gallery.forget(face_id=2)
            archive.unlink()  # nobody can read the member again
        outcomes.append(outcome)

    ingest(gallery, [archive], batch_size=1, on_outcome=forget)
    assert [one.status for one in outcomes] == [Status.DUPLICATE, Status.ENROLLED, *[Status.DUPLICATE] * 34]
    assert outcomes[1].face_id == 37
    found = gallery.search(photos[1], k=1).matches[0]
    assert (found.face.id, found.distance) == (37, 0.0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_caller_leaves_no_thread_and_whole_batches(
    error: type[BaseException], gallery: Gallery, faces: Path
) -> None:
    def fail(outcome: Outcome) -> None:
        raise error

    with pytest.raises(error):
        ingest(gallery, [faces], batch_size=4, on_outcome=fail)
    assert threads_of_ours() == []
    assert gallery.info().faces == 4
    assert gallery.verify().findings == ()


def test_scanning_never_runs_far_ahead_however_many_photos_there_are(
    gallery: Gallery, tmp_path: Path
) -> None:
    """Memory is bounded by what is underway."""
    given = done = most = 0

    def many() -> Iterator[Photo]:
        nonlocal given
        for number in range(30_000):
            given += 1
            yield Photo(tmp_path / f"{number}", None, Reason.IO_ERROR)

    def note(outcome: Outcome) -> None:
        nonlocal done, most
        done += 1
        most = max(most, given - done)

    report = ingest_photos(gallery, many(), on_outcome=note, workers=2)
    assert (report.found, report.rejected, given) == (30_000, 30_000, 30_000)
    assert most <= 16 * 512


def test_the_report_says_what_each_stage_did_and_which_had_most_to_do(gallery: Gallery, faces: Path) -> None:
    report = ingest(gallery, [faces], batch_size=8, workers=2)
    by_name = {stage.name: stage for stage in report.stages}
    assert list(by_name) == ["scan", "recognize", "read", "look up", "decode", "embed", "commit"]
    assert [by_name[name].items for name in ("scan", "read", "look up", "decode", "commit")] == [36] * 5
    assert by_name["embed"].items == 5
    assert (by_name["read"].workers, by_name["embed"].workers) == (2, 1)
    assert all(0 < stage.busy_seconds <= report.seconds * stage.workers for stage in report.stages)
    assert report.bottleneck is not None
    shares = {name: stage.busy_seconds / stage.workers for name, stage in by_name.items()}
    assert report.bottleneck.name == max(shares, key=lambda name: shares[name])
    assert report.bytes_read == sum(path.stat().st_size for path in faces.glob("*/*.jpg"))
    assert report.peak_memory > 2**24
    summary = json.loads(json.dumps(report.summary()))
    assert (summary["found"], summary["enrolled"], summary["bottleneck"]) == (36, 36, report.bottleneck.name)
    assert [stage["name"] for stage in summary["stages"]] == list(by_name)


def test_a_run_that_insists_on_hashes_has_no_stage_that_recognizes(gallery: Gallery, faces: Path) -> None:
    report = ingest(gallery, [faces], rehash=True)
    assert [stage.name for stage in report.stages][:2] == ["scan", "read"]


# Processes that decode


def test_decoders_change_nothing_of_what_becomes_of_photos(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "mixed")
    make_broken(tmp_path / "mixed" / "Broken")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    found = [*scan([tmp_path / "mixed"]), Photo("/a picture", None, content=picture)]
    runs = []
    for decoders in (0, 2):
        outcomes: list[Outcome] = []
        with Gallery.create(tmp_path / str(decoders), bundle) as gallery:
            report = ingest_photos(
                gallery, found, decoders=decoders, batch_size=64, on_outcome=outcomes.append
            )
            vectors = [vector_of(gallery.vault, number).tobytes() for number in range(1, 38)]
            runs.append((outcomes, vectors, _everything(gallery)))
        assert (report.enrolled, report.rejected) == (37, 20)
    assert runs[0] == runs[1]


def decoders_of_ours() -> list[int]:
    """The processes that decode for this one."""
    lists = Path("/proc/self/task").glob("*/children")
    children = [int(child) for one in lists for child in one.read_text().split()]
    return [child for child in children if b"decoders" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_decoder_that_is_killed_ends_the_run_with_the_batches_before_and_the_next_run_goes_on(
    gallery: Gallery, faces: Path
) -> None:
    content = min(faces.glob("*/*.jpg")).read_bytes()
    photos = [Photo(f"/{n}.jpg", None, content=content + str(n).encode()) for n in range(500)]
    done: list[Outcome] = []

    def kill(outcome: Outcome) -> None:
        done.append(outcome)
        for process in decoders_of_ours():
            os.kill(process, signal.SIGKILL)

    with pytest.raises(RunError, match="A process that decodes photos has ended; what was enrolled is kept"):
        ingest_photos(gallery, photos, decoders=1, workers=1, batch_size=5, on_outcome=kill)
    assert (threads_of_ours(), decoders_of_ours()) == ([], [])
    assert 5 <= len(done) == gallery.info().faces < 500
    assert gallery.verify().findings == ()
    again = ingest_photos(gallery, photos, decoders=1)
    assert (again.known, again.enrolled, gallery.info().faces) == (len(done), 500 - len(done), 500)


def test_ctrl_c_reaches_no_decoder_and_ends_the_run_with_a_whole_batch(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """As a terminal does, it is sent to the whole group of processes."""
    content = min(faces.glob("*/*.jpg")).read_bytes()
    (tmp_path / "many").mkdir()
    for number in range(600):
        (tmp_path / "many" / f"{number}.jpg").write_bytes(content + str(number).encode())
    command = [sys.executable, "-m", "retrieval.cli.app", "ingest", tmp_path / "g", tmp_path / "many"]
    options = ["--model", bundle.folder, "--decoders", "2", "--batch-size", "1", "--log-json"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("done", 0):
                os.killpg(process.pid, signal.SIGINT)
                break
        rest, said = process.communicate()
    assert process.returncode == 130
    assert said == "faceprint: Stopped; what was enrolled stays, and the same command goes on from here.\n"
    summary = json.loads(rest.splitlines()[-1])["summary"]
    assert summary["interrupted"]
    with Gallery.open(tmp_path / "g") as gallery:
        assert 0 < gallery.info().faces == summary["enrolled"] < 600
        assert gallery.verify().findings == ()


def test_the_peak_of_memory_is_this_process_own_and_not_that_of_whoever_started_it() -> None:
    held = np.ones(300 * 2**20, np.uint8)
    code = "from retrieval.system.memory import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    own, held_here = int(done.stdout), peak_memory()
    assert held_here > held.nbytes
    assert 10 * 2**20 < own < held.nbytes
