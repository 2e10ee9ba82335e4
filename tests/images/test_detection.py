from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from retrieval.images.detection import DetectedFace, find_faces
from retrieval.images.face_detector import FaceDetector
from tests.detectors import BOX_CELLS, LANDMARKS, detector, drawn, graph


def expected(left: int, top: int, side: int, scale: float = 1.0) -> DetectedFace:
    """The face that the detector of the tests finds around a mark."""
    middle = np.array([left, top]) + side / 2 + 0.5
    corner, reach = middle - BOX_CELLS * side / 2, BOX_CELLS * side
    points = (middle + LANDMARKS * side) * scale
    box = (*(corner * scale), reach * scale, reach * scale)
    return DetectedFace(box, tuple(map(tuple, points)), 1.0)


def assert_same(found: Sequence[DetectedFace], faces: Sequence[DetectedFace]) -> None:
    assert len(found) == len(faces)
    for one, other in zip(found, faces, strict=True):
        assert np.allclose(one.box, other.box, atol=1e-3)
        assert np.allclose(one.landmarks, other.landmarks, atol=1e-3)
        assert one.score == pytest.approx(other.score, abs=1e-3)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_a_face_of_each_grid_is_found_where_it_is(side: int) -> None:
    picture = np.asarray(drawn((200, 160), [(2 * side, side, side)]))
    assert_same(find_faces(picture, detector(), least=0.7), [expected(2 * side, side, side)])


def test_faces_come_from_left_to_right_with_their_scores() -> None:
    marks = [(400, 64, 16), (64, 96, 16), (200, 48, 8)]
    found = find_faces(np.asarray(drawn((500, 200), marks)), detector(), least=0.7)
    assert_same(found, [expected(*mark) for mark in [marks[1], marks[2], marks[0]]])


def test_a_picture_without_a_face_has_none() -> None:
    assert find_faces(np.asarray(drawn((300, 200), [])), detector(), least=0.7) == []


@pytest.mark.parametrize("size", [(1, 1), (31, 7), (33, 64), (640, 31)])
def test_pictures_of_any_size_are_searched(size: tuple[int, int]) -> None:
    assert find_faces(np.asarray(drawn(size, [])), detector(), least=0.7) == []


def test_a_graph_of_a_fixed_size_finds_the_same_as_one_of_any_size() -> None:
    picture = np.asarray(drawn((200, 160), [(64, 48, 16), (136, 80, 8)]))
    fixed = FaceDetector(graph(64))
    assert find_faces(picture, fixed, least=0.7) == find_faces(picture, detector(), least=0.7)


def test_of_boxes_that_overlap_the_one_with_the_higher_score_is_kept() -> None:
    picture = np.array(drawn((300, 160), [(64, 48, 16), (80, 48, 16)]))
    picture[48:64, 64:80] = picture[48:64, 64:80] * 0.9
    assert_same(find_faces(picture, detector(), least=0.7), [expected(80, 48, 16)])


def test_a_large_picture_is_searched_at_640_x_480_pixels() -> None:
    """A mark of 64 pixels is no face at full size, and one of 32 at half of it."""
    small = drawn((640, 480), [(64, 96, 32)])
    picture = np.asarray(small.resize((1280, 960), Image.Resampling.NEAREST))
    found = find_faces(picture, detector(), least=0.5)
    assert len(found) == 1
    assert found[0].box[2] == pytest.approx(6 * 64, rel=0.01)


def test_small_faces_are_searched_again_at_full_size() -> None:
    """At the smaller size a mark of 8 is 4 pixels wide and is not found."""
    picture = np.asarray(drawn((1280, 960), [(640, 320, 8)]))
    assert_same(find_faces(picture, detector(), least=0.7), [expected(640, 320, 8)])


def upright_marks(pixels: np.ndarray) -> Sequence[np.ndarray]:
    """A network that knows only marks with a bright half above and a dark one below."""
    height, width = pixels.shape[2:]
    outputs = [
        np.zeros((1, height * width // stride**2, columns), np.float32)
        for columns in (1, 1, 4, 10)
        for stride in (8, 16, 32)
    ]
    red = pixels[0, 2].reshape(height // 16, 16, width // 16, 16).transpose(0, 2, 1, 3)
    halves = red[:, :, :8].mean((2, 3)), red[:, :, 8:].mean((2, 3))
    hit = ((halves[0] > 240) & (halves[1] < 15)).ravel()
    outputs[1][0, hit], outputs[4][0, hit] = 1, 0.81
    outputs[7][0, :, :2], outputs[7][0, :, 2:] = 0.5, np.log(2)
    outputs[10][0] = (LANDMARKS + 0.5).ravel()
    return outputs


@pytest.mark.parametrize("quarters", [0, 1, 3])
def test_a_face_on_its_side_is_found_by_turning_the_picture(quarters: int) -> None:
    picture = np.full((96, 160, 3), 128, np.uint8)
    picture[32:40, 64:80], picture[40:48, 64:80] = 255, 0
    (face,) = find_faces(picture, upright_marks, least=0.7)
    (found,) = find_faces(np.ascontiguousarray(np.rot90(picture, quarters)), upright_marks, least=0.7)
    middle = np.array(face.landmarks[2])
    places = {0: middle, 1: [middle[1], 160 - middle[0]], 3: [96 - middle[1], middle[0]]}
    assert np.allclose(found.landmarks[2], places[quarters])
    assert found.score == pytest.approx(0.9)
    # The eyes are on a line across the upright face.
    along = np.subtract(found.landmarks[1], found.landmarks[0])
    directions = {0: (1, 0), 1: (0, -1), 3: (0, 1)}
    assert np.allclose(along / np.linalg.norm(along), directions[quarters])


@pytest.mark.parametrize(("nose", "yaw"), [(0.0, 0.0), (0.5, 0.5), (-1.0, -1.0)])
def test_yaw_is_the_place_of_the_nose_between_the_eyes(nose: float, yaw: float) -> None:
    landmarks = ((10.0, 20.0), (30.0, 20.0), (20.0 + 10 * nose, 31.0), (14.0, 40.0), (26.0, 40.0))
    assert DetectedFace((0, 0, 40, 50), landmarks, 0.9).yaw == pytest.approx(yaw)


def test_eyes_at_one_point_have_no_yaw() -> None:
    assert DetectedFace((0, 0, 40, 50), ((1.0, 1.0),) * 5, 0.9).yaw == 0.0
