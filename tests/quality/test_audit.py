"""Auditing: what is planted among drawn vectors is found, what is as usual is not, and nothing is changed."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from retrieval.cli.app import app
from retrieval.database.records import FaceRegion, NewFace
from retrieval.errors import InputError, Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.images.detection import DetectedFace
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.network import Network
from retrieval.quality.audit import audit
from retrieval.quality.audit_report import Audited, Doubt, Kind, page
from retrieval.quality.outliers import Cluster, RobustScale, skewness, widest_gap
from tests.detectors import detector, save
from tests.gallery.test_identities import revision, sha256, sha256_of
from tests.operations import tiny_model
from training.fitting.export import export

Vectors = NDArray[np.float64]

PEOPLE, PHOTOS, DIMENSION = 40, 6, 2048
# Photos of a person are about 9 apart, two people's about 18: as real embeddings of a good model are.
_PHOTO, _PERSON = 0.14, 0.25


class Drawn:
    """Rows for a gallery: people with photos, and whatever is planted among them."""

    def __init__(self, people: int = PEOPLE, photos: int = PHOTOS, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.names: list[str | None] = []
        self.vectors: list[Vectors] = []
        self.centres = {f"P{number:02d}": self.place() for number in range(people)}
        for name in self.centres:
            self.add(name, self.near(name, photos))

    def place(self) -> Vectors:
        return self.rng.normal(0, _PERSON, DIMENSION)

    def near(self, name: str, count: int) -> Vectors:
        return self.centres[name] + self.rng.normal(0, _PHOTO, (count, DIMENSION))

    def add(self, name: str | None, vectors: Vectors) -> list[int]:
        """Adds photos; returns the ids that they will have."""
        first = len(self.names) + 1
        self.names += [name] * len(vectors)
        self.vectors += list(vectors)
        return list(range(first, len(self.names) + 1))

    def into(self, gallery: Gallery, *, batch: int = 10**6) -> Gallery:
        faces = [
            NewFace(name, f"/photos/{number}.jpg", sha256(number))
            for number, name in enumerate(self.names, 1)
        ]
        for start in range(0, len(faces), batch):
            some = slice(start, start + batch)
            gallery.enroll_vectors(faces[some], np.stack(self.vectors[some]))
        return gallery


def of(kind: Kind, found: Audited) -> list[Doubt]:
    return [doubt for doubt in found.doubts if doubt.kind == kind]


def ids(doubt: Doubt) -> list[list[int]]:
    return [[face.id for face in group] for group in doubt.groups]


# What is found


def test_a_clean_gallery_has_nothing_that_is_doubted_about_its_names(gallery: Gallery) -> None:
    found = audit(Drawn().into(gallery))
    assert [doubt for doubt in found.doubts if doubt.kind is not Kind.HUB] == []
    assert (found.faces, found.identities, found.audited, found.people) == (240, 40, 240, 40)
    assert found.seed is None
    assert np.isfinite(found.skewness)


def test_a_mislabelled_photo_is_the_worst_of_its_kind_and_names_who_it_may_be(gallery: Gallery) -> None:
    drawn = Drawn()
    (wrong,) = drawn.add("P03", drawn.near("P17", 1))
    (doubt,) = of(Kind.ANOTHERS_PHOTO, audit(drawn.into(gallery)))
    assert doubt.identities == ("P03", "P17")
    assert ids(doubt)[0] == [wrong]
    assert doubt.measured["own"] > doubt.measured["other"]
    assert {face.identity for face in doubt.groups[1]} == {"P03"}
    assert {face.identity for face in doubt.groups[2]} == {"P17"}
    assert f"--face {wrong}" in doubt.next


def test_the_distances_of_a_doubted_photo_are_those_of_a_brute_force(gallery: Gallery) -> None:
    drawn = Drawn()
    drawn.add("P03", drawn.near("P17", 1))
    (doubt,) = of(Kind.ANOTHERS_PHOTO, audit(drawn.into(gallery)))
    stored = np.stack(drawn.vectors).astype(np.float32).astype(float)
    own, others = stored[18:24], np.delete(stored[:-1], np.s_[18:24], axis=0)
    query = stored[-1]
    assert doubt.measured["own"] == pytest.approx(np.linalg.norm(own - query, axis=1).min(), rel=1e-12)
    assert doubt.measured["other"] == pytest.approx(np.linalg.norm(others - query, axis=1).min(), rel=1e-12)
    assert doubt.measured["own_centroid"] == pytest.approx(np.linalg.norm(own.mean(axis=0) - query), rel=1e-9)


@pytest.mark.parametrize("photos", [(6, 6), (6, 1)])
def test_one_person_under_two_names_is_found(gallery: Gallery, photos: tuple[int, int]) -> None:
    """With several photos under each name; and with one, among others who have one."""
    drawn = Drawn()
    for number in range(25):
        drawn.centres[f"S{number:02d}"] = drawn.place()
        drawn.add(f"S{number:02d}", drawn.near(f"S{number:02d}", 1))
    drawn.add("Twice", drawn.near("P11", photos[1]))
    (doubt,) = of(Kind.TWO_LIKE_ONE, audit(drawn.into(gallery)))
    assert doubt.identities == ("P11", "Twice")
    assert "merge-identities" in doubt.next
    assert doubt.measured["centroids"] < doubt.measured["usual"]


def test_two_people_under_one_name_are_found_with_both_groups(gallery: Gallery) -> None:
    """The smaller group comes first; who is only one of the two is not doubted."""
    drawn = Drawn()
    drawn.centres["stranger"] = drawn.place()
    strange = drawn.add("P05", drawn.near("stranger", 3))
    found = audit(drawn.into(gallery))
    (doubt,) = of(Kind.ONE_LIKE_TWO, found)
    assert doubt.identities[0] == "P05"
    assert ids(doubt)[0] == strange
    assert set(ids(doubt)[1]) < set(range(31, 37))
    assert of(Kind.TWO_LIKE_ONE, found) == []


def test_one_photo_under_two_names_is_one_doubt_and_not_three(gallery: Gallery) -> None:
    drawn = Drawn()
    (copy,) = drawn.add("P20", np.stack(drawn.vectors[:1]))
    found = audit(drawn.into(gallery))
    (doubt,) = of(Kind.SAME_PHOTO_TWO_NAMES, found)
    assert ids(doubt) == [[1], [copy]]
    assert doubt.measured["distance"] == 0
    assert found.doubts[0] == doubt
    assert not of(Kind.ANOTHERS_PHOTO, found)
    for limit in found.limits:
        assert limit.kind is Kind.TWO_LIKE_ONE or limit.found == len(of(limit.kind, found))


def test_a_near_duplicate_of_a_person_is_told_from_one_under_two_names(gallery: Gallery) -> None:
    drawn = Drawn()
    (copy,) = drawn.add("P00", drawn.vectors[0][None] + drawn.rng.normal(0, 0.005, (1, DIMENSION)))
    found = audit(drawn.into(gallery))
    (doubt,) = of(Kind.SAME_PHOTO, found)
    assert ids(doubt) == [[1], [copy]]
    assert not of(Kind.SAME_PHOTO_TWO_NAMES, found)
    assert found.doubts[-1] == doubt  # it misleads nobody


def test_a_face_that_is_close_to_everybody_is_a_hub(gallery: Gallery) -> None:
    """It lies in the middle of all, as a picture without a face may."""
    drawn = Drawn()
    (hub,) = drawn.add("Blur", np.mean(drawn.vectors, axis=0)[None])
    found = audit(drawn.into(gallery))
    worst = of(Kind.HUB, found)[0]
    assert ids(worst)[0] == [hub]
    assert worst.measured["neighbour_of"] > 200
    assert worst.measured["people"] == PEOPLE
    assert found.skewness > 3


def test_nobodys_faces_are_neighbours_and_nobodys_rivals(gallery: Gallery) -> None:
    """A stranger's photo near a person's is no other name for it; a copy of it is a near duplicate."""
    drawn = Drawn()
    drawn.add(None, drawn.near("P07", 4))
    lonely = drawn.add(None, drawn.vectors[0][None])
    found = audit(drawn.into(gallery))
    (same,) = of(Kind.SAME_PHOTO, found)
    assert ids(same) == [[1], lonely]
    assert {doubt.kind for doubt in found.doubts} <= {Kind.SAME_PHOTO, Kind.HUB}
    assert found.identities == PEOPLE


def test_people_with_more_photos_than_neighbours_still_have_rivals(gallery: Gallery) -> None:
    """The nearest of others is looked for beyond the k nearest, and is exact."""
    drawn = Drawn(photos=14)
    (wrong,) = drawn.add("P03", drawn.near("P17", 1))
    found = audit(drawn.into(gallery), neighbours=2)
    assert [ids(doubt)[0] for doubt in of(Kind.ANOTHERS_PHOTO, found)] == [[wrong]]


def test_segments_and_codes_change_nothing(bundle: ModelBundle, tmp_path: Path) -> None:
    drawn = Drawn()
    drawn.add("P03", drawn.near("P17", 1))
    whole = Drawn()
    whole.names, whole.vectors = drawn.names, drawn.vectors
    with (
        Gallery.create(tmp_path / "a.gallery", bundle) as one,
        Gallery.create(tmp_path / "b.gallery", bundle) as many,
    ):
        first, second = audit(drawn.into(one)), audit(whole.into(many, batch=37))
    assert first.doubts
    assert [(d.kind, d.score, ids(d)) for d in first.doubts] == [
        (d.kind, d.score, ids(d)) for d in second.doubts
    ]


@pytest.mark.parametrize("people", [0, 1, 3])
def test_too_few_faces_give_no_limit_and_no_error(gallery: Gallery, people: int) -> None:
    if people:
        Drawn(people=people, photos=2).into(gallery)
    found = audit(gallery)
    assert found.doubts == ()
    assert all(np.isnan(limit.limit) for limit in found.limits)
    assert json.loads(json.dumps(found.summary(), allow_nan=False))["limits"][0]["limit"] is None


# The sample


def test_a_sample_is_whole_people_drawn_by_its_seed_and_compared_with_all(gallery: Gallery) -> None:
    drawn = Drawn()
    (wrong,) = drawn.add("P03", drawn.near("P17", 1))
    drawn.into(gallery)
    samples = [audit(gallery, sample=150, seed=seed) for seed in (0, 0, 1)]
    assert {found.audited for found in samples} <= {150, 151}
    assert [found.people for found in samples] == [25, 25, 25]
    assert [found.seed for found in samples] == [0, 0, 1]
    assert samples[0].doubts == samples[1].doubts
    for seed in range(8):
        doubts = of(Kind.ANOTHERS_PHOTO, audit(gallery, sample=150, seed=seed))
        # Where only the other person was drawn, theirs are doubted for being near to it.
        assert all(wrong in (ids(doubt)[0][0], ids(doubt)[2][0]) for doubt in doubts)


def test_who_asks_for_as_many_as_there_are_gets_everybody(gallery: Gallery) -> None:
    found = audit(Drawn(people=5).into(gallery), sample=30)
    assert (found.audited, found.seed) == (30, None)


# Beside others


def test_an_audit_changes_nothing_and_works_where_nothing_can_be_written(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    with Gallery.create(tmp_path / "people.gallery", bundle) as gallery:
        Drawn().into(gallery)
        before, log = revision(gallery), gallery.audit_log()
        audit(gallery)
        assert (revision(gallery), gallery.audit_log()) == (before, log)
    with Gallery.open(tmp_path / "people.gallery", read_only=True) as gallery:
        assert audit(gallery).faces == 240


def test_a_writer_may_write_meanwhile_and_who_was_forgotten_is_in_no_doubt(gallery: Gallery) -> None:
    drawn = Drawn()
    (wrong,) = drawn.add("P03", drawn.near("P17", 1))
    drawn.into(gallery)
    forgotten: list[int] = []

    def forget(done: int, total: int) -> None:
        if not forgotten:
            gallery.forget(face_id=wrong)
            forgotten.append(wrong)

    found = audit(gallery, on_progress=forget)
    assert forgotten
    assert found.faces == 241  # the snapshot that it saw
    assert found.gone >= 1
    assert wrong not in {face for doubt in found.doubts for group in ids(doubt) for face in group}


def test_progress_goes_up_to_all_there_is_and_an_end_is_asked_for_now_and_then(gallery: Gallery) -> None:
    heard: list[tuple[int, int]] = []
    Drawn().into(gallery)
    audit(gallery, on_progress=lambda done, total: heard.append((done, total)))
    assert heard == sorted(heard)
    assert heard[-1] == (280, 280)
    with pytest.raises(Interrupted):
        audit(gallery, should_stop=lambda: True)


@pytest.mark.parametrize("limit", [1e4, 1e300, float("inf")])
def test_a_limit_that_nothing_reaches_leaves_no_doubt(gallery: Gallery, limit: float) -> None:
    Drawn(people=20, photos=4).into(gallery)
    found = audit(gallery, limit=limit)
    assert found.doubts == ()
    json.dumps(found.summary(), allow_nan=False)


@pytest.mark.parametrize("wrong", [{"sample": 0}, {"neighbours": 0}, {"limit": 0.0}, {"limit": float("nan")}])
def test_what_cannot_be_asked_is_one_sentence(gallery: Gallery, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        audit(gallery, **wrong)


# The parts


def test_a_shape_is_what_its_vectors_say_in_whatever_parts_they_come() -> None:
    vectors = np.random.default_rng(3).normal(5, 2, (9, 4))
    shape = Cluster.of([vectors[:2], vectors[2:3], vectors[3:]])
    squares = ((vectors[:, None] - vectors) ** 2).sum(axis=2)
    assert shape.count == 9
    assert shape.centroid == pytest.approx(vectors.mean(axis=0))
    assert shape.within == pytest.approx(squares.sum() / (9 * 8))
    others, squared = shape.without(vectors[4])
    rest = np.delete(vectors, 4, axis=0)
    assert others.centroid == pytest.approx(rest.mean(axis=0))
    assert others.spread == pytest.approx(rest.var(axis=0).sum())
    assert squared == pytest.approx(((vectors[4] - rest.mean(axis=0)) ** 2).sum())
    left, right = Cluster.of([vectors[:4]]), Cluster.of([vectors[4:]])
    assert left.across(right) == pytest.approx(squares[:4, 4:].mean())


def _line(places: Sequence[float]) -> Vectors:
    return np.array(places, float)[:, None]


@pytest.mark.parametrize(
    ("places", "width", "inside"),
    [
        ([0, 1, 2, 10, 11], 8, [False, False, False, True, True]),
        ([10, 0, 11, 1, 2], 8, [True, False, True, False, False]),
        ([0, 1, 5, 6, 100], 4, None),  # a single one far off is no group
    ],
)
def test_the_widest_gap_has_two_or_more_on_both_sides(
    places: list[float], width: float, inside: list[bool] | None
) -> None:
    found = widest_gap(_line(places))
    assert found is not None
    assert found[0] == pytest.approx(width)
    assert inside is None or found[1].tolist() == inside


def test_where_every_edge_leaves_a_single_one_there_is_no_gap() -> None:
    star = np.concatenate([np.zeros((1, 6)), np.eye(6)])
    assert widest_gap(star) is None
    assert widest_gap(_line([0, 1, 9])) is None


def test_what_is_usual_is_not_moved_by_a_tenth_that_is_not() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 900), np.full(100, 1e9)])
    usual = RobustScale.of(values)
    assert abs(usual.median) < 0.3
    assert usual.deviation == pytest.approx(1, abs=0.3)
    assert usual.scores(np.array([usual.at(3.0)])) == pytest.approx([3.0])


def test_values_that_are_all_the_same_are_all_usual() -> None:
    usual = RobustScale.of(np.full(30, 2.0))
    assert usual.scores(np.array([2.0, 5.0])).tolist() == [0, 0]
    assert np.isnan(RobustScale.of(np.zeros(19)).median)
    assert np.isnan(skewness(np.full(5, 1)))
    assert skewness(np.array([0, 0, 0, 1])) == pytest.approx(2 / 3**0.5)


# The command


@pytest.fixture
def doubtful(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of drawn vectors with a wrong name in it; its photos do not exist."""
    drawn = Drawn()
    drawn.add("P<03>", drawn.near("P17", 1))
    drawn.names = ["P<03>" if name == "P03" else name for name in drawn.names]
    with Gallery.create(tmp_path / "people.gallery", bundle) as gallery:
        drawn.into(gallery)
    return tmp_path / "people.gallery"


def test_the_command_prints_limits_and_doubts_and_writes_json_and_a_page(
    doubtful: Path, tmp_path: Path
) -> None:
    written, html = tmp_path / "found.json", tmp_path / "found.html"
    done = CliRunner().invoke(
        app,
        ["audit", str(doubtful), "--json-file", str(written), "--page", str(html)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    assert "All 241 faces of 40 people were compared with all." in done.stdout
    assert "Face 241 of P<03>" in done.stdout
    assert f"faceprint forget {doubtful} --face 241" in done.stdout
    found = json.loads(written.read_text("utf-8"))
    assert (found["faces"], found["audited"]["faces"], found["audited"]["seed"]) == (241, 241, None)
    (doubt,) = [doubt for doubt in found["doubts"] if doubt["kind"] == "anothers-photo"]
    assert doubt["groups"][0] == [{"face_id": 241, "identity": "P<03>", "path": "/photos/241.jpg"}]
    # No face of this gallery has a place in its photo.
    without = {Kind.SMALL_FACE, Kind.BLURRED_FACE, Kind.TURNED_FACE}
    assert {limit["kind"] for limit in found["limits"]} == set(Kind) - without
    shown = html.read_text("utf-8")
    assert "P&lt;03&gt;" in shown
    assert "<03>" not in shown
    # Photos that are gone are boxes with their names.
    assert "/photos/241.jpg: there is no such file" in shown


def test_a_page_has_its_photos_in_it_and_never_another_one(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """A file that has other bytes than were enrolled is not shown."""
    photos = sorted(faces.glob("*/*.jpg"))[:2]
    drawn = Drawn()
    with Gallery.create(tmp_path / "people.gallery", bundle) as gallery:
        drawn.into(gallery)
        digests = [sha256_of(photo) for photo in photos]
        new = [
            NewFace("P01", str(photos[0]), digests[0]),
            NewFace("P02", str(photos[1]), digests[0][::-1]),
        ]
        gallery.enroll_vectors(new, np.stack(drawn.vectors[:1] * 2))
        shown = page(audit(gallery)).decode()
    assert "data:image/jpeg;base64," in shown
    assert f"{photos[1]}: the file has other bytes by now" in shown
    assert "prefers-color-scheme: dark" in shown
    assert "@media print" in shown
    assert "http" not in shown.replace("http-equiv", "")


def test_the_page_of_a_model_with_a_face_detector_shows_the_embedded_face(
    network: Network, tmp_path: Path
) -> None:
    """One of two photos has a face beside its middle; the other has none and is shown whole."""
    reader = PhotoReader(Preprocessing(32, 1.0, faces=FaceAlignment(detector().sha256)), detector())
    face = save(tmp_path / "face.png", (320, 160), [(32, 64, 16)])
    nobody = save(tmp_path / "nobody.png", (320, 160), [])
    bundle = export(
        network, tmp_path / "model", labels=tuple("ABCDEF"), reader=reader, recipe={}, split={}, figures={},
        sample=reader.square(face)[None],
    )  # fmt: skip
    drawn = Drawn()
    with Gallery.create(tmp_path / "people.gallery", bundle) as gallery:
        drawn.into(gallery)
        new = [NewFace(name, str(path), sha256_of(path)) for name, path in (("P01", face), ("P02", nobody))]
        gallery.enroll_vectors(new, np.stack(drawn.vectors[:1] * 2))
    html = tmp_path / "found.html"
    command = ["audit", str(tmp_path / "people.gallery"), "--page", str(html)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found = set(re.findall(r"data:image/jpeg;base64,([^\"]+)", html.read_text("utf-8")))
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]
    assert sorted(picture.shape for picture in shown) == [(112, 224, 3), (224, 224, 3)]
    (aligned,) = (picture for picture in shown if picture.shape == (224, 224, 3))
    expected = np.asarray(Image.fromarray(reader.square(face)).resize((224, 224)))
    assert np.abs(aligned.astype(int) - expected).mean() < 12


def test_small_blurred_and_turned_faces_are_doubts_where_places_are_known(tmp_path: Path) -> None:
    """By what is usual in the gallery; a face without a place is measured in none of these."""
    points = ((2.0, 2.0), (4.0, 2.0), (3.0, 3.0), (2.0, 4.0), (4.0, 4.0))
    rng = np.random.default_rng(0)
    with Gallery.create(tmp_path / "people.gallery", tiny_model(tmp_path / "model")) as gallery:
        faces = []
        for number in range(40):
            side, sharpness, nose = rng.normal(100, 5), rng.normal(20, 1), 3 + rng.normal(0, 0.05)
            if number == 7:
                side = 9.0
            if number == 8:
                sharpness = 1.5
            if number == 9:
                nose = 3.9
            place = (points[0], points[1], (nose, 3.0), *points[3:])
            region = FaceRegion(DetectedFace((0.0, 0.0, side, side + 4), place, 0.9), sharpness)
            digest = hashlib.sha256(str(number).encode()).hexdigest()
            name = None if number == 8 else f"P{number % 4}"
            faces.append(NewFace(name, f"/photos/{number}.png", digest, region=region))
        faces.append(NewFace("P0", "/photos/plain.png", "0" * 64))
        gallery.enroll_vectors(faces, rng.standard_normal((41, gallery.bundle.dimension)))
        found = audit(gallery)
    poor = [one for one in found.doubts if one.kind.endswith("-face")]
    assert {one.kind: one.groups[0][0].id for one in poor} == {
        "small-face": 8,
        "blurred-face": 9,
        "turned-face": 10,
    }
    limits = {limit.kind: limit for limit in found.limits}
    assert limits[Kind.SMALL_FACE].values == 40
    assert limits[Kind.SMALL_FACE].median == pytest.approx(100, abs=3)
    (small,) = (one for one in poor if one.kind == "small-face")
    assert small.says.startswith("Face 8 of P3 has a side in pixels of 9; ")
    assert "--face 8` and delete the file, unless it shows others too" in small.next
    (blurred,) = (one for one in poor if one.kind == "blurred-face")
    assert "without an identity has a sharpness of 1.5" in blurred.says


def test_a_sample_is_said_to_be_one(doubtful: Path) -> None:
    done = CliRunner().invoke(
        app, ["audit", str(doubtful), "--sample", "60", "--top", "0"], catch_exceptions=False
    )
    assert "A sample of" in done.stdout
    assert "drawn with seed 0, of 241 faces of 40 people was compared with all." in done.stdout


@pytest.mark.parametrize("option", ["--json-file", "--page"])
def test_a_file_that_cannot_be_is_said_before_anything_is_done(doubtful: Path, option: str) -> None:
    command = [sys.executable, "-m", "retrieval.cli.app", "audit", str(doubtful), option, "/nowhere/at/all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"faceprint: There is no folder /nowhere/at for {option}; make it, or name another file.\n"
    )


def test_ctrl_c_ends_the_command_cleanly(doubtful: Path, tmp_path: Path) -> None:
    """It asks for an end before the first batch, since the signal comes as soon as the command listens."""
    code = (
        "import os, signal, retrieval.system.signals as i\n"
        "from contextlib import contextmanager\n"
        "real = i.graceful\n"
        "@contextmanager\n"
        "def now():\n"
        "    with real() as asked:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield asked\n"
        "i.graceful = now\n"
        "from retrieval.cli.app import main\n"
        "import sys\n"
        f"sys.argv = ['faceprint', 'audit', {str(doubtful)!r}]\n"
        f"sys.argv += ['--json-file', {str(tmp_path / 'no.json')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.endswith("faceprint: Stopped; nothing was written.\n")
    assert not (tmp_path / "no.json").exists()
