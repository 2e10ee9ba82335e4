"""The invented faces: deterministic, varied, laid out like LFW, neither trivial nor hopeless to recognise."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training.synthetic_faces import NAMES, draw_face, draw_faces

SIZE = 48


def pixels(identity: int, photo: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.asarray(draw_face(identity, photo, size=SIZE, seed=seed))


def test_same_arguments_give_the_same_pixels() -> None:
    assert np.array_equal(pixels(3, 5, seed=7), pixels(3, 5, seed=7))


@pytest.mark.parametrize("other", [(2, 4, 0), (2, 3, 1), (4, 3, 0)], ids=["photo", "seed", "identity"])
def test_another_photo_seed_or_identity_gives_another_picture(other: tuple[int, int, int]) -> None:
    """Not merely other noise: the pictures differ by more than the sensor noise of any photo."""
    difference = np.abs(pixels(2, 3).astype(float) - pixels(*other))
    assert difference.mean() > 12


def test_a_photo_does_not_depend_on_what_was_drawn_before() -> None:
    wanted = [(identity, photo) for identity in range(3) for photo in range(4)]
    forwards = {key: pixels(*key) for key in wanted}
    backwards = {key: pixels(*key) for key in reversed(wanted)}
    assert all(np.array_equal(forwards[key], backwards[key]) for key in wanted)


@pytest.mark.parametrize("size", [24, 112, 160])
def test_a_face_is_rgb_and_as_large_as_asked(size: int) -> None:
    image = draw_face(0, 0, size=size)
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_every_identity_of_a_large_set_can_be_drawn() -> None:
    """Every hair style, beard, pair of glasses and occlusion occurs among these."""
    for identity in range(120):
        assert np.std(pixels(identity, identity)) > 4


def test_names_are_distinct_on_any_file_system_and_some_are_not_ascii() -> None:
    assert len({name.casefold() for name in NAMES}) == len(NAMES) >= 60
    assert sum(not name.isascii() for name in NAMES) >= 5


def test_the_folder_is_laid_out_like_lfw(tmp_path: Path) -> None:
    """One folder a name, files numbered from 1 in four digits, each the JPEG of the face asked for."""
    folder = draw_faces(tmp_path / "new" / "faces", identities=20, photos=2, size=SIZE, seed=4)
    assert folder == tmp_path / "new" / "faces"
    expected = {f"{name}/{name}_{number:04d}.jpg" for name in NAMES[:20] for number in (1, 2)}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")} == expected
    assert any(not path.isascii() for path in expected)
    with Image.open(folder / NAMES[1] / f"{NAMES[1]}_0002.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
        error = np.asarray(image, float) - pixels(1, 1, seed=4)
    assert np.abs(error).mean() < 8  # what JPEG loses on a noisy picture


def test_more_identities_than_names_are_numbered(tmp_path: Path) -> None:
    count = 2 * len(NAMES) + 1
    draw_faces(tmp_path, identities=count, photos=1, size=16)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == count
    assert {NAMES[0], f"{NAMES[0]}_2", f"{NAMES[0]}_3"} <= names


def test_raw_pixels_identify_people_better_than_chance_but_far_from_always() -> None:
    """Leave-one-out nearest neighbour on pixels: a model has something to learn, and something to beat."""
    people, photos = 16, 12
    faces = [pixels(person, photo).ravel() for person in range(people) for photo in range(photos)]
    stack, who = np.array(faces, np.float64), np.repeat(np.arange(people), photos)
    squares = (stack**2).sum(axis=1)
    distance = squares[:, None] + squares[None, :] - 2 * stack @ stack.T
    np.fill_diagonal(distance, np.inf)
    accuracy = float(np.mean(who[distance.argmin(axis=1)] == who))
    chance = (photos - 1) / (people * photos - 1)
    assert 2 * chance < accuracy < 0.9
