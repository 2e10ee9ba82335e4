"""Augmentation: what becomes of the pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.augmentation import Augmentation, augmented, displaced, recoloured, warped


def spot(row: int, column: int) -> torch.Tensor:
    """A black picture of 33 x 33 with a white square of 3 x 3 about a place."""
    picture = torch.zeros(33, 33, 3, dtype=torch.uint8)
    picture[row - 1 : row + 2, column - 1 : column + 2] = 255
    return picture


def place(picture: torch.Tensor) -> tuple[float, float]:
    """Where the light of a picture is, on the mean."""
    light = picture[:, :, 0].double()
    rows, columns = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    return (light * rows).sum().item() / light.sum().item(), (
        light * columns
    ).sum().item() / light.sum().item()


def test_a_picture_moved_down_and_left_is_black_at_the_top_and_the_right() -> None:
    picture = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)[:, :, None]
    expected = torch.tensor([[0, 0, 0], [2, 3, 0], [5, 6, 0]], dtype=torch.uint8)[:, :, None]
    assert torch.equal(displaced(picture, 1, -1), expected)


@settings(deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.sampled_from([1, 3]),
    down=st.integers(-10, 10),
    right=st.integers(-10, 10),
)
def test_every_pixel_of_a_displaced_picture_is_the_one_it_came_from_or_black(
    height: int, width: int, channels: int, down: int, right: int
) -> None:
    count = height * width * channels
    picture = torch.arange(1, count + 1, dtype=torch.uint8).reshape(height, width, channels)
    expected = torch.zeros_like(picture)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                expected[y, x] = picture[y - down, x - right]
    before = picture.clone()
    assert torch.equal(displaced(picture, down, right), expected)
    assert torch.equal(picture, before)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"down": 3, "right": -5}, (9, 21)),
        ({"zoom": 1.2}, (16 - 12, 16 + 12)),
        ({"turn": 90.0}, (16 + 10, 16 + 10)),
        ({"turn": -90.0}, (16 - 10, 16 - 10)),
    ],
    ids=str,
)
def test_a_spot_goes_where_a_picture_is_moved_enlarged_and_turned(
    change: dict[str, float], expected: tuple[float, float]
) -> None:
    """It begins 10 pixels above and right of the middle; turns are clockwise, about the middle."""
    still: dict[str, float] = {"down": 0, "right": 0, "zoom": 1.0, "turn": 0.0}
    moved = warped(spot(6, 26), **{**still, **change})  # type: ignore[arg-type]
    assert moved.shape == (33, 33, 3)
    assert moved.dtype == torch.uint8
    assert place(moved) == pytest.approx(expected, abs=0.35)


def test_light_contrast_and_saturation_change_as_they_say() -> None:
    grey = torch.full((4, 4, 3), 100, dtype=torch.uint8)
    assert recoloured(grey, 1.2, 1.0, 1.0).unique().tolist() == [120]
    colours = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    assert torch.equal(recoloured(colours, 1.0, 1.0, 1.0), colours)
    pale = recoloured(colours, 1.0, 1.0, 0.0)
    assert torch.equal(pale[..., 0], pale[..., 2])
    assert recoloured(colours, 1.0, 0.5, 1.0).double().std() < 0.6 * colours.double().std()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), zoom=st.sampled_from([0.0, 0.2]), colour=st.sampled_from([0.0, 0.3]))
def test_the_same_state_gives_the_same_picture_and_leaves_the_old_one(
    seed: int, zoom: float, colour: float
) -> None:
    picture = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    before = picture.clone()
    bounds = Augmentation(zoom=zoom, turn=10 * zoom, colour=colour)
    once, again = (augmented(picture, bounds, np.random.default_rng(seed)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == picture.shape
    assert torch.equal(picture, before)
