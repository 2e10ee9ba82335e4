"""Augmentation: random flips, shifts and other changes of training photos, different in every epoch."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, zeros_like
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms


@dataclass(frozen=True)
class Augmentation:
    """The bounds of random changes of photos. The defaults are the paper's.

    Attributes:
        displacement: largest shift of a photo, horizontally and vertically, as a share of its side.
        flip: whether half of the photos are mirrored.
        zoom: largest enlargement or reduction, as a share of the photo's size.
        turn: largest rotation, in degrees.
        colour: largest relative change of brightness, contrast and saturation.
    """

    displacement: float = 1 / 16
    flip: bool = True
    zoom: float = 0.0
    turn: float = 0.0
    colour: float = 0.0


def augmented(picture: Tensor, augmentation: Augmentation, random: np.random.Generator) -> Tensor:
    """Changes a picture at random.

    Args:
        picture: (size, size, 3) uint8.
        augmentation: the bounds.
        random: source of randomness; the same state gives the same picture.

    Returns:
        A new tensor of the same shape and dtype, black where the picture does not reach.
    """
    reach = round(augmentation.displacement * picture.shape[0])
    down, right = random.integers(-reach, reach + 1, size=2).tolist()
    if augmentation.flip and random.random() < 0.5:
        picture = picture.flip(1)
    if augmentation.zoom or augmentation.turn:
        zoom = 1 + augmentation.zoom * random.uniform(-1, 1)
        picture = warped(picture, down, right, zoom, augmentation.turn * random.uniform(-1, 1))
    else:
        picture = displaced(picture, down, right)
    if augmentation.colour:
        picture = recoloured(picture, *(1 + augmentation.colour * random.uniform(-1, 1, size=3)).tolist())
    return picture


def displaced(picture: Tensor, down: int, right: int) -> Tensor:
    """Shifts a picture by whole pixels; black where the picture does not reach.

    Args:
        picture: (H, W, C) uint8.
        down: pixels; negative is up.
        right: pixels; negative is left.

    Returns:
        A new tensor of the same shape.
    """
    height, width = picture.shape[:2]
    down, right = max(-height, min(down, height)), max(-width, min(right, width))
    moved = zeros_like(picture)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = picture[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def warped(picture: Tensor, down: int, right: int, zoom: float, turn: float) -> Tensor:
    """Rotates a picture about its centre, scales and shifts it, bilinear; black where it does not reach.

    Args:
        picture: (H, W, C) uint8.
        down: pixels; negative is up.
        right: pixels; negative is left.
        zoom: 1 keeps the size.
        turn: degrees, clockwise.

    Returns:
        A new tensor of the same shape.
    """
    moved = transforms.affine(
        picture.permute(2, 0, 1),
        angle=turn,
        translate=[float(right), float(down)],
        scale=zoom,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    return moved.permute(1, 2, 0).contiguous()  # type: ignore[no-any-return]


def recoloured(picture: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Scales brightness, contrast and saturation of a picture (H, W, 3) uint8; 1 changes nothing."""
    changed = transforms.adjust_brightness(picture.permute(2, 0, 1), brightness)
    changed = transforms.adjust_contrast(changed, contrast)
    changed = transforms.adjust_saturation(changed, saturation)
    return changed.permute(1, 2, 0).contiguous()  # type: ignore[no-any-return]
