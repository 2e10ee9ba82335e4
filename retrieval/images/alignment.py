"""Alignment: the similarity transform that moves a face's landmarks onto a template."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# The side of the template's square in pixels.
_SIDE: Final = 112

# Eyes, tip of the nose, corners of the mouth, from left to right in the picture: the positions that the
# recognition models of ArcFace (Deng et al., 2019) and most later ones are trained with, as coordinates of
# pixel centres.
TEMPLATES: Final = {
    "arcface": (
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    )
}


def face_transform(landmarks: NDArray[np.float64], *, size: int, template: str, margin: float) -> Matrix:
    """Returns the matrix that maps points of a picture to points of the aligned face.

    Args:
        landmarks: (5, 2) x and y in pixels, where (0, 0) is the corner of the first pixel.
        size: side of the aligned face in pixels.
        template: one of TEMPLATES.
        margin: context on each side of the template's square, as a share of its side.

    Returns:
        (2, 3): rotation and scale, and the shift.
    """
    points = np.array(TEMPLATES[template]) + 0.5
    wanted = (points + margin * _SIDE) * size / (_SIDE * (1 + 2 * margin))
    return similarity(landmarks, wanted)


def similarity(points: NDArray[np.float64], targets: NDArray[np.float64]) -> Matrix:
    """Returns the similarity transform with the least squared error, (2, 3), without reflection.

    The method is Umeyama's ("Least-squares estimation of transformation parameters between two point
    patterns", 1991).

    Args:
        points, targets: (n, 2); the points must not all coincide.
    """
    centre, goal = points.mean(0), targets.mean(0)
    spread, wanted = points - centre, targets - goal
    left, scales, right = np.linalg.svd(wanted.T @ spread / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    rotation = (left * signs) @ right
    scale = (scales * signs).sum() / spread.var(0).sum()
    matrix = scale * rotation
    return np.column_stack([matrix, goal - matrix @ centre])


def apply(matrix: Matrix, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns points (n, 2) moved by a matrix (2, 3)."""
    moved: NDArray[np.float64] = points @ matrix[:, :2].T + matrix[:, 2]
    return moved


def inverse(matrix: Matrix) -> Matrix:
    """Returns the matrix (2, 3) of the inverse map."""
    turned = np.linalg.inv(matrix[:, :2])
    return np.column_stack([turned, -turned @ matrix[:, 2]])


def composed(after: Matrix, before: Matrix) -> Matrix:
    """Returns the matrix (2, 3) that applies `before` and then `after`."""
    return np.column_stack([after[:, :2] @ before[:, :2], after[:, :2] @ before[:, 2] + after[:, 2]])


def upright_to_stored(orientation: int | None, width: int, height: int) -> Matrix:
    """Returns the matrix (2, 3) from points of the upright picture to points of the stored one.

    Args:
        orientation: of EXIF, 1 to 8; None for 1.
        width, height: of the stored picture in pixels.
    """
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    mirror = np.array([[-1.0, 0, width], [0, 1, 0]])
    upset = np.array([[1.0, 0, 0], [0, -1, height]])
    swap = np.array([[0.0, 1, 0], [1, 0, 0]])
    half = composed(mirror, upset)
    return {
        2: mirror,
        3: half,
        4: upset,
        5: swap,
        6: composed(upset, swap),
        7: composed(half, swap),
        8: composed(mirror, swap),
    }.get(orientation or 1, identity)
