"""The rules about faces: which photos they list, in which order, and what they advise."""

import numpy as np
import pytest

from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.quality.finding_rules import MAX_YAW, MIN_SHARPNESS, Evidence, findings, least_sharpness
from retrieval.quality.findings import DataFinding, Kind, Level
from retrieval.quality.near_duplicates import SIDE
from retrieval.quality.photo_set import CheckOptions, PhotoSet
from retrieval.quality.photo_stats import FaceStats, PhotoStats
from tests.detectors import detector

_FACES = FaceAlignment(detector().sha256)
_KINDS = (Kind.NO_FACE, Kind.FACE_TOO_SMALL, Kind.SEVERAL_FACES, Kind.FACE_BLURRED, Kind.FACE_TURNED)


def photo(
    name: str,
    *,
    identity: str | None = "Ada",
    faces: int | None = 1,
    side: float = 150,
    sharpness: float = 10,
    yaw: float = 0,
    found: bool = True,
) -> PhotoStats:
    """The statistics of a grey photo, named like no other."""
    grey = np.random.default_rng(list(name.encode())).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    face = FaceStats((10.0, 10.0, side, side + 20), 1.5 * side, sharpness, yaw) if found else None
    return PhotoStats(
        f"/{name}", identity, sha256=name, width=400, height=400, brightness=120, contrast=50, grey=grey,
        faces=faces, face=face,
    )  # fmt: skip


def said(*photos: PhotoStats, preprocessing: Preprocessing) -> dict[Kind, DataFinding]:
    """The findings about faces and input sizes, by kind."""
    evidence = Evidence(PhotoSet(photos, CheckOptions(preprocessing=preprocessing)))
    return {one.kind: one for one in findings(evidence) if one.kind in (*_KINDS, Kind.TINY, Kind.STRETCHED)}


def listed(finding: DataFinding) -> list[tuple[str | None, str]]:
    return [(item.photos[0].path, item.detail) for item in finding.items]


def test_each_kind_lists_its_photos_the_worst_first() -> None:
    found = said(
        photo("good"),
        photo("none", faces=0, found=False),
        photo("small", faces=0, side=19.4),
        photo("smaller", faces=0, side=12),
        photo("two", faces=2),
        photo("five", faces=5),
        photo("soft", sharpness=4.7),
        photo("softer", sharpness=2),
        photo("left", yaw=-1.5),
        photo("right", yaw=1.1),
        preprocessing=Preprocessing(112, 1.0, faces=_FACES),
    )
    assert listed(found[Kind.NO_FACE]) == [("/none", "")]
    assert listed(found[Kind.FACE_TOO_SMALL]) == [
        ("/smaller", "face of 12 pixels"),
        ("/small", "face of 19 pixels"),
    ]
    assert listed(found[Kind.SEVERAL_FACES]) == [("/five", "5 faces"), ("/two", "2 faces")]
    assert listed(found[Kind.FACE_BLURRED]) == [("/softer", "sharpness 2.0"), ("/soft", "sharpness 4.7")]
    assert listed(found[Kind.FACE_TURNED]) == [("/left", "yaw 1.50"), ("/right", "yaw 1.10")]
    assert {found[kind].level for kind in _KINDS} == {Level.LOOK}


def test_the_advice_has_the_options_with_their_limits() -> None:
    found = said(
        photo("soft", sharpness=1), photo("left", yaw=-1.5), photo("two", faces=2), photo("tiny", side=9),
        preprocessing=Preprocessing(112, 1.0, faces=_FACES),
    )  # fmt: skip
    assert "ingest --min-sharpness 4.8 rejects" in found[Kind.FACE_BLURRED].advice
    assert "a sharpness below 4.8, at 112 pixels" in found[Kind.FACE_BLURRED].says
    assert "ingest --max-yaw 1 rejects" in found[Kind.FACE_TURNED].advice
    assert "ingest --faces one rejects" in found[Kind.SEVERAL_FACES].advice
    assert "ingest --min-face sets" in found[Kind.FACE_TOO_SMALL].advice


def test_values_at_a_limit_are_good() -> None:
    found = said(
        photo("soft", sharpness=MIN_SHARPNESS), photo("left", yaw=-MAX_YAW), photo("small", side=20),
        preprocessing=Preprocessing(112, 1.0, faces=_FACES),
    )  # fmt: skip
    assert set(found) == {Kind.TINY}


def test_faces_that_are_too_small_are_not_said_to_be_blurred_or_turned_as_well() -> None:
    one = photo("bad", side=10, sharpness=0, yaw=3, faces=0)
    assert set(said(one, preprocessing=Preprocessing(112, 1.0, faces=_FACES))) == {Kind.FACE_TOO_SMALL}


def test_several_faces_matter_only_under_a_name() -> None:
    wanted = Preprocessing(112, 1.0, faces=_FACES)
    assert said(photo("group", identity=None, faces=4), preprocessing=wanted) == {}


def test_photos_in_which_no_faces_were_searched_for_have_no_finding_about_faces() -> None:
    assert said(photo("plain", faces=None, found=False), preprocessing=Preprocessing(112, 1.0)) == {}


def test_the_input_is_compared_with_the_face_and_not_with_the_photo() -> None:
    wanted = Preprocessing(256, 1.0, faces=_FACES)
    finding = said(photo("face", side=100), photo("larger", side=200), preprocessing=wanted)[Kind.TINY]
    assert listed(finding) == [("/face", "150 pixels of 400 x 400")]
    assert "`image_size=150`" in finding.advice


@pytest.mark.parametrize(
    ("size", "margin", "expected"), [(112, 0.0, 4.8), (64, 0.0, 9.2), (160, 0.0, 3.2), (224, 0.0, 2.0)]
)  # fmt: skip
def test_the_limit_of_sharpness_follows_the_input_as_measured(
    size: int, margin: float, expected: float
) -> None:
    """The expected values are what 1 % of 1,200 photos of LFW fall below."""
    faces = FaceAlignment(detector().sha256, margin=margin)
    assert least_sharpness(Preprocessing(size, 1.0, faces=faces)) == pytest.approx(expected, rel=0.06)


def test_a_margin_counts_as_a_smaller_face() -> None:
    faces = FaceAlignment(detector().sha256, margin=0.5)
    assert least_sharpness(Preprocessing(224, 1.0, faces=faces)) == MIN_SHARPNESS
