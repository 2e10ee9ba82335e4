"""Colour conversion: from the ICC profile of a photo to sRGB, by Little CMS."""

import io
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, ImageCms

# The colour space of a profile, by the mode of the pictures to which it may apply.
_COLOUR_SPACES: Final = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_DEVICE_CLASSES: Final = ("scnr", "mntr", "prtr", "spac")
# A profile that changes no test colour by more than this many levels is sRGB.
_MAX_SRGB_DIFFERENCE: Final = 2

Transform: TypeAlias = ImageCms.ImageCmsTransform


def converts(profile: bytes, mode: str) -> bool:
    """Returns whether a profile changes the colours of pictures of a mode."""
    return _transform(profile, mode) is not None


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns a picture of mode RGB, L or CMYK as RGB in sRGB.

    Pillow's own conversion is used without a profile, with an sRGB profile, and with a profile that is
    damaged, is for another mode, or is absurd (its white is dark, or its black is bright).
    """
    transform = None if profile is None else _transform(profile, picture.mode)
    if transform is None:
        return picture.convert("RGB")
    converted = transform.apply(picture)
    return converted.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> Transform | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if (
            opened.profile.xcolor_space != _COLOUR_SPACES[mode]
            or opened.profile.device_class not in _DEVICE_CLASSES
        ):
            return None
        target = ImageCms.createProfile("sRGB")
        found = ImageCms.buildTransform(opened, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        return found if _is_sound(found, mode) and not _is_srgb(found, mode) else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return None


def _is_sound(transform: Transform, mode: str) -> bool:
    least, most = (transform.apply(Image.new(mode, (1, 1), (level,) * len(mode))) for level in (0, 255))
    black, white = map(np.asarray, (most, least) if mode == "CMYK" else (least, most))
    return bool(white.min() >= 128 and black.max() < 128)


def _is_srgb(transform: Transform, mode: str) -> bool:
    if mode == "CMYK":
        return False
    steps = np.linspace(0, 255, 17 if mode == "RGB" else 256).round().astype(np.uint8)
    if mode == "RGB":
        levels = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(17, -1, 3)
        expected = levels.astype(int)
    else:
        levels = steps[None]
        expected = np.repeat(levels[..., None], 3, axis=2).astype(int)
    found = np.asarray(transform.apply(Image.fromarray(levels)))
    return bool(np.abs(found - expected).max() <= _MAX_SRGB_DIFFERENCE)
