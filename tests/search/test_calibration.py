"""Calibration: thresholds come from strangers, searches decide by them, and a gallery keeps them in step."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval import rates
from retrieval.bulk.calibrate import calibrate
from retrieval.database.filters import Where
from retrieval.database.records import Calibration, NewFace, OperatingPoint
from retrieval.errors import GalleryBusy, InputError, Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.search import decisions
from retrieval.search.calibration import check_enough, foretold, remarks
from retrieval.search.decisions import Decision
from tests.cli.test_app import Faceprint
from tests.gallery.test_identities import sha256
from tests.operations import tiny_model, write_photos
from training.synthetic_faces import draw_faces

DIMENSION = 2048
NAMES = ("Kim", "Adi", "Zoë", None)


def spread(rows: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    vectors = np.zeros((len(rows), DIMENSION), np.float32)
    vectors[:, :2] = rows
    return vectors


def enroll(
    gallery: Gallery, names: Sequence[str | None], vectors: NDArray[np.float32], first: int = 0
) -> None:
    faces = [NewFace(name, f"/p/{first + n}.jpg", sha256(first + n)) for n, name in enumerate(names)]
    gallery.enroll_vectors(faces, vectors)


@pytest.fixture
def line(gallery: Gallery) -> Gallery:
    """Four faces on a line: Kim at 0 and 1, Adi at 10 and 12."""
    enroll(gallery, ["Kim", "Kim", "Adi", "Adi"], spread([(0, 0), (1, 0), (10, 0), (12, 0)]))
    return gallery


def away(distances: Sequence[float]) -> NDArray[np.float32]:
    """Strangers who are so far from Kim's first face, and farther from all others."""
    return spread([(-distance, 0) for distance in distances])


# What a calibration finds


def test_the_threshold_lets_just_so_many_strangers_pass(line: Gallery) -> None:
    """Ten strangers at 1 to 10 of Kim: at an FPIR of 0.2 two may be named, and the third may not."""
    found = line.calibrate(0.2, strangers=[(away(range(1, 11)), [None] * 10)])
    point = found.point()
    assert point is not None
    assert point.threshold == np.nextafter(3.0, 0)
    assert (point.seen.value, point.seen.n) == (0.2, 10)
    assert point.seen == rates.wilson(2, 10)
    # Of 0, 1, 10 and 12 each one's nearest other face is its person's, at most 2 away.
    assert (point.missed.value, point.missed.n) == (0.0, 4)
    assert [one.fpir for one in found.points] == [0.2, 0.1]
    assert (found.faces, found.identities, found.searches, found.people) == (4, 2, 10, 0)
    assert (found.strangers, found.fingerprint) == ("photos", line.bundle.fingerprint)
    assert line.calibration() == found


def test_what_a_threshold_costs_is_counted_by_leaving_each_face_out(line: Gallery) -> None:
    """At a threshold below 2 the two faces of Adi no longer find each other; a lonely face is no trial."""
    enroll(line, ["Zoë"], spread([(100, 0)]), first=50)
    found = line.calibrate(0.1, strangers=[(away([1.5] + [9.0] * 9), [None] * 10)])
    point = found.point()
    assert point is not None
    assert point.threshold == np.nextafter(9.0, 0)
    found = line.calibrate(0.3, strangers=[(away([1.5] * 4 + [9.0] * 6), [None] * 10)])
    point = found.point()
    assert point is not None
    assert point.threshold == np.nextafter(1.5, 0)
    assert (point.missed.value, point.missed.n) == (0.5, 4)


def test_without_photos_of_strangers_each_face_is_searched_for_among_other_people(line: Gallery) -> None:
    """0 and 1 are 10 and 9 from Adi; 10 and 12 are 9 and 11 from Kim."""
    found = line.calibrate(0.5)
    point = found.point()
    assert point is not None
    assert (found.strangers, found.searches, found.people) == ("gallery", 4, 2)
    assert point.threshold == np.nextafter(10.0, 0)
    assert point.seen.value == 0.5


def test_faces_of_nobody_name_nobody_and_are_no_strangers(line: Gallery) -> None:
    enroll(line, [None, None], spread([(-1, 0), (-2, 0)]), first=50)
    found = line.calibrate(0.5)
    assert (found.faces, found.identities, found.searches) == (6, 2, 4)
    (matches,) = line.search_by_vectors(away([2.0]), 1)
    assert matches[0].face.identity is None
    assert matches.decision is not None
    assert (matches.decision.identity, matches.decision.distance) == ("Kim", 2.0)


def test_a_sample_is_the_same_for_the_same_seed(line: Gallery) -> None:
    enroll(line, ["Kim"] * 40, np.random.default_rng(0).normal(size=(40, DIMENSION)).astype(np.float32), 50)
    one, again, other = (line.calibrate(0.2, sample=10, seed=seed) for seed in (1, 1, 2))
    assert one.points == again.points
    assert one.points != other.points
    assert one.searches == 10


def test_strangers_of_whom_there_are_several_photos_widen_the_interval(line: Gallery) -> None:
    """Ten photos of each of ten people, all named or none: ten trials, not a hundred."""
    vectors = away([1.0 + row // 10 for row in range(100)])
    alone = line.calibrate(0.2, strangers=[(vectors, [None] * 100)]).point()
    known = line.calibrate(0.2, strangers=[(vectors, [str(row // 10) for row in range(100)])]).point()
    assert alone is not None
    assert known is not None
    assert alone.seen == rates.wilson(20, 100)
    assert alone.threshold == known.threshold
    assert known.seen.low == 0.0
    assert known.seen.high >= 0.4


def test_too_few_strangers_are_an_error_that_says_how_many_are_needed(line: Gallery) -> None:
    with pytest.raises(InputError) as caught:
        line.calibrate(0.01, strangers=[(away(range(1, 51)), [None] * 50)])
    assert str(caught.value) == (
        "An FPIR of 0.01 needs 100 searches of strangers or more, and there are 50; name more photos with "
        "`strangers`, or ask for `fpir=0.03`."
    )
    assert line.calibration() is None
    check_enough(0.01, 100)
    with pytest.raises(InputError, match="needs 1,000 searches"):
        check_enough(0.001, 999)
    for tiny in (1e-12, 5e-324):
        with pytest.raises(InputError, match="needs more than a trillion searches"):
            check_enough(tiny, 999)
    with pytest.raises(InputError, match="not one search of a stranger"):
        line.calibrate(0.5, strangers=[])


@pytest.mark.parametrize("fpir", [0.0, -1.0, 0.51, 1.0, math.nan])
def test_a_rate_that_is_none_is_refused(line: Gallery, fpir: float) -> None:
    with pytest.raises(InputError, match="An FPIR lies above 0 and is at most"):
        line.calibrate(fpir)


def test_one_person_alone_cannot_be_told_from_others(gallery: Gallery) -> None:
    enroll(gallery, ["Kim", "Kim", None], spread([(0, 0), (1, 0), (2, 0)]))
    with pytest.raises(InputError, match="has faces of fewer than two people"):
        gallery.calibrate(0.5)


def test_a_calibration_that_is_stopped_stores_nothing(line: Gallery) -> None:
    before = line.calibrate(0.5)
    with pytest.raises(Interrupted, match="thresholds are what they were"):
        line.calibrate(0.4, should_stop=lambda: True)
    assert line.calibration() == before


def test_remarks_name_what_makes_the_rates_too_good(line: Gallery) -> None:
    def of(learned: int = 0, **fields: Any) -> list[str]:
        point = OperatingPoint(0.1, 1.0, rates.wilson(10, 100), rates.wilson(0, 0))
        whole = {"generation": 1, "fingerprint": "f", "found_at": "", "faces": 9, "identities": 9}
        whole |= {"searches": 100, "people": 50, "trained": 0, "fpir": 0.1, "points": (point,)}
        return remarks(Calibration(**{**whole, **fields}), learned)

    assert of(strangers="photos") == []
    assert [one.split()[0] for one in of(strangers="gallery", trained=3)] == ["Strangers", "The"]
    assert "3 of the 50 people" in of(strangers="photos", trained=3)[0]
    assert "each photo counts as a person of its own" in of(strangers="photos", people=0)[0]
    assert "Only 9 people" in of(strangers="photos", people=9)[0]
    assert "trained on 4 of the enrolled people" in of(strangers="photos", learned=4)[0]


def test_what_could_not_be_measured_is_no_number_in_json() -> None:
    point = OperatingPoint(0.1, 1.25, rates.wilson(10, 100), rates.wilson(0, 0))
    found = Calibration(1, "f" * 64, "2026-01-01", "photos", 9, 8, 100, 0, 0, 0.1, (point,))
    text = json.dumps(found.fields(), allow_nan=False)
    again = Calibration.of(json.loads(text))
    assert again.fields() == found.fields()
    assert math.isnan(again.points[0].missed.value)


def test_a_calibration_foretells_the_next_searches_and_one_of_an_older_version_says_that_it_does_not(
    line: Gallery,
) -> None:
    vectors = away(np.random.default_rng(0).uniform(1, 20, 200))
    point = line.calibrate(0.1, strangers=[(vectors, [str(row // 4) for row in range(200)])]).point()
    assert point is not None
    assert point.upcoming is not None
    assert 0 <= point.upcoming.low < 20 < point.upcoming.high
    assert point.upcoming.n == 200
    assert foretold(point) == point.upcoming.in_words()
    decision = line.search_by_vector(vectors[0]).decision
    assert decision is not None
    assert decision.upcoming == point.upcoming
    stored = line.calibration()
    assert stored is not None
    fields = stored.fields()
    for one in fields["points"]:
        del one["upcoming"]
    older = Calibration.of(fields).point()
    assert older is not None
    assert (older.seen, older.upcoming) == (point.seen, None)
    assert "not known: calibrate again" in foretold(older)


@given(st.lists(st.floats(0, 1e6), min_size=10, max_size=200), st.floats(0.1, 0.5), st.floats(0.1, 0.5))
def test_a_stricter_rate_never_gives_a_larger_threshold(
    distances: list[float], one: float, other: float
) -> None:
    strict, loose = sorted([one, other])
    strangers = np.array(distances)
    assert rates.threshold(strangers, strict) <= rates.threshold(strangers, loose)


# What searches decide


def brute(vectors: NDArray[np.float32], names: Sequence[str | None], query: NDArray[np.float32]) -> Any:
    """The nearest person and distance, and the second's, in float64; equal distances by face."""
    distances = np.sqrt(((vectors.astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1))
    found: dict[str, float] = {}
    for row in np.lexsort((np.arange(len(vectors)), distances)):
        name = names[row]
        if name is not None:
            found.setdefault(name, float(distances[row]))
    return [*found.items(), (None, None), (None, None)][:2]


@pytest.fixture(scope="module")
def crowd(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """60 faces, many of them equally far: mostly Kim's, some nobody's; and queries."""
    rng = np.random.default_rng(3)
    vectors = spread(rng.integers(-3, 4, (60, 2)).tolist())
    names = [NAMES[one] for one in rng.choice(4, 60, p=[0.8, 0.05, 0.05, 0.1])]
    with Gallery.create(tmp_path_factory.mktemp("crowd") / "g", bundle) as gallery:
        enroll(gallery, names[:40], vectors[:40])
        enroll(gallery, names[40:], vectors[40:], first=40)
        yield gallery, vectors, names


@pytest.mark.parametrize(("first", "most"), [(16, 4096), (1, 4096), (1, 4), (1, 0)])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    queries=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12),
    limit=st.sampled_from([0.0, 1.0, 1.5, 2.0, 5.0]),
    k=st.sampled_from([1, 3, 70]),
)
def test_a_decision_is_that_of_brute_force_singly_and_in_batches(
    crowd: Any, monkeypatch: pytest.MonkeyPatch, first: int, most: int, queries: Any, limit: float, k: int
) -> None:
    """UNKNOWN exactly where the nearest is farther than the threshold, whatever is shown and asked first."""
    gallery, vectors, names = crowd
    monkeypatch.setattr(decisions, "FIRST", first)
    monkeypatch.setattr(decisions, "_MAX_REQUEST", most)
    asked = spread(queries)
    found = gallery.search_by_vectors(asked, k, max_distance=limit)
    for query, matches in zip(asked, found, strict=True):
        (name, distance), (second, farther) = brute(vectors, names, query)
        decision = matches.decision
        assert (decision.identity is None) == (decision.distance > limit)
        assert decision.identity == (name if distance <= limit else None)
        assert (decision.second, decision.threshold) == (second, limit)
        assert (decision.distance, decision.margin) == pytest.approx((distance, farther - distance))
        assert gallery.search_by_vector(query, k, max_distance=limit).decision == decision
        near = gallery.search_by_vector(query, None, within=1.0, max_distance=limit)
        assert near.decision == decision
        (people,) = gallery.search_people_by_vectors(query[None], 1, max_distance=limit)
        assert people.decision == decision
        # The decision does not change what is shown.
        assert tuple(gallery.search_by_vector(query, k)) == tuple(matches)


def test_a_condition_and_a_face_that_is_left_out_hold_for_the_decision_too(line: Gallery) -> None:
    kim = line.search_by_vector(away([0.5])[0], 1, where=Where(identities=("Adi",)), max_distance=3.0)
    assert kim.decision == Decision(None, 10.5, None, None, 3.0)
    itself = line.search_by_face(1, 1, max_distance=3.0).decision
    assert itself == Decision("Kim", 1.0, 9.0, "Adi", 3.0)
    nobody = line.search_by_vector(away([0.5])[0], 1, where=Where(identities=("Bo",)), max_distance=3.0)
    assert nobody.decision == Decision(None, None, None, None, 3.0)


def test_nothing_is_decided_before_a_gallery_is_calibrated(line: Gallery) -> None:
    assert line.search_by_vector(away([0.5])[0], 1).decision is None
    with pytest.raises(InputError) as caught:
        line.search_by_vector(away([0.5])[0], 1, fpir=0.01)
    assert str(caught.value) == (
        f"{line.folder} is not calibrated for an FPIR of 0.01; "
        f"run `faceprint calibrate {line.folder}` with `fpir=0.01`."
    )


def test_a_search_may_ask_for_another_rate_or_another_distance(line: Gallery) -> None:
    line.calibrate(0.2, strangers=[(away(range(1, 11)), [None] * 10)])
    query = away([2.5])[0]
    asked = line.search_by_vector(query, 1).decision
    assert asked is not None
    assert (asked.identity, asked.fpir, asked.expected_fpir, asked.outgrown) == ("Kim", 0.2, 0.2, False)
    strict = line.search_by_vector(query, 1, fpir=0.1).decision
    assert strict is not None
    assert (strict.identity, strict.fpir, strict.threshold) == (None, 0.1, np.nextafter(2.0, 0))
    given = line.search_by_vector(query, 1, max_distance=2.5).decision
    assert given == Decision("Kim", 2.5, 10.0, "Adi", 2.5)
    with pytest.raises(InputError, match=r"FPIR of 0\.03, only for 0\.2, 0\.1; run"):
        line.search_by_vector(query, 1, fpir=0.03)
    with pytest.raises(InputError, match="not both"):
        line.search_by_vector(query, 1, fpir=0.1, max_distance=1.0)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="must be a number of at least 0"):
            line.search_by_vector(query, 1, max_distance=wrong)


def test_a_gallery_that_has_grown_says_what_to_expect_now(line: Gallery) -> None:
    """Four faces then, five now: as much as is tolerated; six are more."""
    line.calibrate(0.2, strangers=[(away(range(1, 11)), [None] * 10)])
    for number, outgrown in ((1, False), (2, True)):
        enroll(line, ["Bo"], spread([(50 + number, 0)]), first=60 + number)
        decision = line.search_by_vector(away([1.0])[0], 1).decision
        assert decision is not None
        assert decision.outgrown is outgrown
        assert decision.expected_fpir == pytest.approx(0.2 * (4 + number) / 4)


def test_the_classifier_agrees_or_not_or_does_not_know_the_person(gallery: Gallery, faces: Path) -> None:
    """The network's weights are random: what it says of a photo is known only by asking it."""
    photo = sorted(faces.glob("*/*.jpg"))[0]
    said = gallery.embedder.bundle.labels
    gallery.enroll([(photo, said[0])])
    result = gallery.search(photo, 1, max_distance=1.0)
    assert result.decision is not None
    assert result.decision.identity == said[0]
    assert result.decision.classifier_agrees is (result.prediction.identity == said[0])
    (people,) = gallery.search_people([photo], 1, max_distance=1.0)
    assert people.decision == result.decision
    gallery.rename_identity(said[0], "Somebody else")
    known = gallery.search(photo, 1, max_distance=1.0).decision
    assert known is not None
    # The label went with the name.
    assert known.classifier_agrees is result.decision.classifier_agrees
    far = Decision(None, 9.0, 1.0, "Kim", 2.0).beside("Kim", ["Kim"])
    assert far.classifier_agrees is None
    near = Decision("Bo", 1.0, 1.0, "Kim", 2.0)
    assert near.beside("Kim", ["Kim"]).classifier_agrees is None
    assert near.beside("Kim", ["Kim", "Bo"]).classifier_agrees is False
    assert near.beside("Bo", ["Kim", "Bo"]).classifier_agrees is True


# Where it is kept


def test_a_calibration_outlives_the_erasure_of_a_person(line: Gallery) -> None:
    found = line.calibrate(0.5)
    line.forget("Kim")
    assert line.calibration() == found


def test_a_backup_brings_its_calibration_and_no_other(line: Gallery, tmp_path: Path) -> None:
    line.backup(tmp_path / "empty")
    found = line.calibrate(0.5)
    line.backup(tmp_path / "backup")
    line.calibrate(0.4)
    line.close()
    Gallery.restore(tmp_path / "backup", line.folder)
    Gallery.restore(tmp_path / "backup", tmp_path / "new.gallery")
    for folder in (line.folder, tmp_path / "new.gallery"):
        with Gallery.open(folder) as restored:
            assert restored.calibration() == found
    Gallery.restore(tmp_path / "empty", line.folder)
    with Gallery.open(line.folder) as restored:
        assert restored.calibration() is None


def test_an_export_brings_its_calibration_into_a_gallery_that_becomes_the_same(
    line: Gallery, bundle: ModelBundle, tmp_path: Path
) -> None:
    """Not into one that has other faces beside, nor over one that it has."""
    pytest.importorskip("pyarrow")
    from retrieval.transfer.export_reader import read_export

    found = line.calibrate(0.5)
    line.export(tmp_path / "out")
    exported = read_export(tmp_path / "out")
    with Gallery.create(tmp_path / "same", bundle) as same:
        same.import_export(exported)
        taken = same.calibration()
        assert taken is not None
        assert taken.points == found.points
        own = same.calibrate(0.4)
        same.import_export(exported)
        assert same.calibration() == own
    with Gallery.create(tmp_path / "other", bundle) as other:
        enroll(other, ["Bo"], spread([(5, 5)]), first=90)
        other.import_export(exported)
        assert other.calibration() is None


def test_a_calibration_belongs_to_its_model(tmp_path: Path) -> None:
    """Another model has none; going back to the former brings its own back; dropped, it is gone."""
    write_photos(tmp_path / "photos", range(12))
    former, other = tiny_model(tmp_path / "one"), tiny_model(tmp_path / "two", seed=1)
    gallery = Gallery.create(tmp_path / "g", former)
    paths = sorted((tmp_path / "photos").glob("*/*.png"))
    gallery.enroll([(path, path.parent.name) for path in paths])
    found = gallery.calibrate(0.1)
    assert gallery.reembed(other).switched
    assert gallery.calibration() is None
    assert gallery.search(paths[0], 1).decision is None
    assert gallery.reembed(gallery.other_model()).switched
    assert gallery.calibration() == found
    assert gallery.reembed(other).switched
    gallery.drop_other_model()
    assert gallery.calibration() is None
    assert gallery.verify().whole
    gallery.close()


def test_a_gallery_that_is_calibrated_is_whole(line: Gallery) -> None:
    line.calibrate(0.5)
    assert line.verify().whole
    assert [one.action for one in line.audit_log()] == ["enroll", "calibrate"]


def test_another_writer_is_waited_for_and_then_named(line: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    import retrieval.storage.vault
    from retrieval.system import lock

    monkeypatch.setattr(retrieval.storage.vault, "LOCK_TIMEOUT", 0.05)
    with (
        lock.exclusive(line.folder / "writer.lock", timeout=0),
        pytest.raises(GalleryBusy, match=f"^Process {os.getpid()} is writing to "),
    ):
        line.calibrate(0.5)
    assert line.calibration() is None


def test_a_gallery_that_is_read_only_refuses(line: Gallery) -> None:
    line.close()
    with (
        Gallery.open(line.folder, read_only=True) as opened,
        pytest.raises(InputError, match="opened for reading only"),
    ):
        opened.calibrate(0.5)


# Photos of strangers


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six drawn people: four to enroll, and a folder of the other two, of one of the four, and of litter."""
    people = draw_faces(tmp_path_factory.mktemp("all"), identities=6, photos=6, size=64)
    enrolled, strange = people.parent / "enrolled", people.parent / "strange"
    for number, folder in enumerate(sorted(people.iterdir())):
        shutil.copytree(folder, (enrolled if number < 4 else strange) / folder.name)
    first, second = sorted(enrolled.iterdir())[:2]
    shutil.copytree(first, strange / first.name)
    other = strange / sorted(strange.iterdir())[-1].name
    shutil.copy(sorted(second.iterdir())[0], other / "enrolled_as_somebody.jpg")
    shutil.copy(sorted(other.iterdir())[0], other / "again.jpg")
    (other / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    return enrolled, strange


def test_photos_of_strangers_are_counted_and_the_enrolled_left_out(
    gallery: Gallery, two_folders: tuple[Path, Path]
) -> None:
    enrolled, strange = two_folders
    gallery.enroll([(path, path.parent.name) for path in sorted(enrolled.glob("*/*.jpg"))])
    outcomes: list[Any] = []
    done = calibrate(gallery, 0.1, strangers=[strange], batch_size=4, on_outcome=outcomes.append)
    report = done.report
    assert report is not None
    assert (report.used, report.enrolled, report.repeated, report.rejected) == (12, 7, 1, 1)
    assert report.found == len(outcomes) == 21
    assert (done.calibration.searches, done.calibration.people) == (12, 2)
    assert gallery.calibration() == done.calibration
    # The labels of the model are the drawn people's names, so it was trained on both strangers.
    assert done.calibration.trained == 2
    named = [gallery.search(path, 1) for path in sorted(strange.glob("*/*_000*.jpg"))]
    strangers = [one.decision for one in named if one.matches[0].distance > 0]
    assert sum(one is not None and one.identity is not None for one in strangers) <= 1
    assert gallery.info().faces == 24


def test_sources_without_a_photo_are_an_error(gallery: Gallery, tmp_path: Path) -> None:
    enroll(gallery, ["Kim", "Adi"], spread([(0, 0), (1, 0)]))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="There are no photos in"):
        calibrate(gallery, 0.1, strangers=[tmp_path / "nothing"])


# The command


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.fixture(scope="module")
def calibrated(bundle: ModelBundle, two_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "g"
    with Gallery.create(folder, bundle) as gallery:
        gallery.enroll([(p, p.parent.name) for p in sorted(two_folders[0].glob("*/*.jpg"))])
    return folder


def test_the_command_prints_a_table_and_searches_go_by_it(
    faceprint: Faceprint, calibrated: Path, two_folders: Any
) -> None:
    enrolled, strange = two_folders
    photo = sorted(enrolled.glob("*/*.jpg"))[0]
    status, out, err = faceprint("search", calibrated, photo)
    assert status == 0
    assert "decision" not in out
    assert "no decision:" in err
    assert "faceprint calibrate" in err
    status, out, err = faceprint("calibrate", calibrated, "--show")
    assert (status, "is not calibrated" in err) == (2, True)
    status, out, err = faceprint("calibrate", calibrated, "--fpir", 0.1, "--strangers", strange)
    assert status == 0, err
    assert "found 21 = strangers 12 + enrolled 7 + repeated 1 + rejected 1" in out
    assert "FPIR wanted" in out
    assert "Of the next 12 strangers' searches between " in " ".join(out.split())
    assert "note: The model was trained on 2 of the 2 people" in err
    status, shown, _ = faceprint("calibrate", calibrated, "--show", "--json")
    fields = json.loads(shown)
    assert [point["fpir"] for point in fields["points"]] == [0.1]
    assert (fields["searches"], fields["faces"], fields["faces_now"]) == (12, 24, 24)
    with Gallery.open(calibrated) as gallery:
        learned = set(gallery.bundle.labels) & {path.name for path in enrolled.iterdir()}
    told = f"The model was trained on {len(learned)} of the enrolled people"
    assert learned
    assert told in " ".join(fields["remarks"])
    status, out, err = faceprint("search", calibrated, photo, "--exclude-self")
    assert status == 0
    assert "decision: " in out
    assert f"threshold {fields['points'][0]['threshold']:.3f}" in out
    assert "no decision" not in err
    assert "decided for an FPIR of 0.1: of the next 12 strangers' searches between " in err
    assert "of the next 12 strangers' searches" in " ".join(faceprint("info", calibrated)[1].split())
    status, out, _ = faceprint("search", calibrated, photo, "--face", 2, "--json", "--max-distance", 1e6)
    decided = [answer["decision"] for answer in json.loads(out)]
    assert [one["threshold"] for one in decided] == [1e6, 1e6]
    assert decided[0]["identity"] == photo.parent.name
    assert decided[0].keys() == set(Decision.__dataclass_fields__)
    status, _, err = faceprint("search", calibrated, photo, "--fpir", 0.001)
    assert (status, "is not calibrated for an FPIR of 0.001, only for 0.1" in err) == (2, True)
    status, _, err = faceprint("calibrate", calibrated, "--fpir", 0.001)
    assert status == 2
    assert "needs 1,000 searches" in err


def test_a_command_that_is_killed_leaves_the_thresholds_that_were(calibrated: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the searches; at every call to the disk it is killed in test_crash."""
    folder = shutil.copytree(calibrated, tmp_path / "g")
    with Gallery.open(folder) as gallery:
        before = gallery.calibrate(0.2)
    code = (
        "import os, signal, sys; from retrieval import Gallery\n"
        f"gallery = Gallery.open({os.fspath(folder)!r})\n"
        "gallery.calibrate(0.1, on_progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with Gallery.open(folder) as gallery:
        assert gallery.calibration() == before
        assert gallery.verify().whole
