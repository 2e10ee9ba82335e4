import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieval.images import alignment
from retrieval.images.alignment import TEMPLATES, apply, composed, face_transform, inverse, similarity
from retrieval.images.picture import upright

ANGLES = st.floats(-np.pi, np.pi)
SHIFTS = st.floats(-500, 500)


def turned(angle: float, scale: float, x: float, y: float) -> np.ndarray:
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


@settings(deadline=None)
@given(ANGLES, st.floats(0.05, 20), SHIFTS, SHIFTS)
def test_a_similarity_is_found_again_from_moved_points(
    angle: float, scale: float, x: float, y: float
) -> None:
    points = np.array(TEMPLATES["arcface"])
    matrix = turned(angle, scale, x, y)
    assert np.allclose(similarity(points, apply(matrix, points)), matrix, atol=1e-6 * (1 + abs(x) + abs(y)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=5, max_size=5, unique=True))
def test_no_similarity_has_a_smaller_error(pairs: list[tuple[float, float]]) -> None:
    """Compared with the solution of the linear least squares over the four numbers of a similarity."""
    points, targets = np.array(pairs), np.array(TEMPLATES["arcface"])
    if np.linalg.svd(points - points.mean(0))[1][1] < 1:
        return
    x, y = points.T
    rows = np.concatenate(
        [
            np.column_stack([x, -y, np.ones(5), np.zeros(5)]),
            np.column_stack([y, x, np.zeros(5), np.ones(5)]),
        ]
    )
    found = similarity(points, targets)
    best = np.linalg.lstsq(rows, targets.T.ravel(), rcond=None)[0]
    error = ((apply(found, points) - targets) ** 2).sum()
    assert error <= ((rows @ best - targets.T.ravel()) ** 2).sum() + 1e-6


def test_mirrored_points_are_matched_without_a_reflection() -> None:
    points = np.array(TEMPLATES["arcface"])
    found = similarity(points * [-1, 1], points)
    assert np.linalg.det(found[:, :2]) > 0


@pytest.mark.parametrize(("size", "margin"), [(112, 0.0), (224, 0.0), (112, 0.25), (160, 0.5)])
def test_landmarks_on_the_template_are_scaled_with_the_margin_around_them(size: int, margin: float) -> None:
    points = np.array(TEMPLATES["arcface"]) + 0.5
    matrix = face_transform(points, size=size, template="arcface", margin=margin)
    scale = size / (112 * (1 + 2 * margin))
    assert np.allclose(matrix, [[scale, 0, margin * 112 * scale], [0, scale, margin * 112 * scale]])


def test_maps_compose_and_invert() -> None:
    one, other = turned(0.4, 2, 3, -7), turned(-2, 0.3, 100, 5)
    points = np.array([[0.0, 0], [5, 9], [-3, 2]])
    assert np.allclose(apply(composed(one, other), points), apply(one, apply(other, points)))
    assert np.allclose(apply(inverse(one), apply(one, points)), points)


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_points_of_the_upright_picture_lead_to_the_same_pixels_of_the_stored_one(
    orientation: int | None,
) -> None:
    stored = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    shown = np.asarray(upright(stored, orientation))
    into = alignment.upright_to_stored(orientation, *stored.size)
    rows, columns = np.indices(shown.shape).reshape(2, -1)
    places = apply(into, np.column_stack([columns, rows]) + 0.5) - 0.5
    x, y = np.rint(places).astype(int).T
    assert np.allclose(places, np.column_stack([x, y]))
    assert np.array_equal(np.asarray(stored)[y, x], shown.ravel())
