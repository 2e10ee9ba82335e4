"""A `Picture`: an opened image with the memory that it takes, converted to upright RGB and resized."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.errors import Interrupted, Reason, UnreadableImage
from retrieval.images import containers
from retrieval.images.colour import converts, to_srgb
from retrieval.images.containers import Container
from retrieval.images.formats import MAX_MEMORY, MAX_PIXELS, TOO_LARGE, TRUNCATED

Pixels: TypeAlias = NDArray[np.uint8]
# The treatment of a photo's colour profile: ignore it, or convert the colours to sRGB.
Colour: TypeAlias = Literal["ignore", "srgb"]
# Holds bytes of the memory budget while a picture is decoded.
Hold: TypeAlias = Callable[[int], AbstractContextManager[None]]

# Conversion works in strips of rows: bytes of a strip, at up to 24 bytes a pixel; and the most bytes of all
# rows once they are reduced to the width of the result.
_STRIP_BYTES: Final = 8 * 2**20
_CONVERTED_PIXEL_BYTES: Final = 24
_NARROW_BYTES: Final = 64 * 2**20
# Bytes a pixel that decoders of whole pictures need, besides the pixel as Pillow stores it. Measured with 12
# and 88 million pixels; JPEG 2000: for each component; TIFF: for the pixels of a strip or tile.
DECODER_BYTES: Final = {"WEBP": 13, "AVIF": 12, "HEIF": 16}
_COMPONENT_BYTES: Final = 6
_TIFF_BYTES: Final = 8
_PLAIN_BYTES: Final = 40


class Picture:
    """A picture with a parsed header, and what its conversion to upright RGB needs."""

    def __init__(self, image: Image.Image, container: Container | None = None, *, page: bool = False) -> None:
        """Wraps an image of the caller, a file with a parsed container, or, with `page`, another file."""
        self.image = image
        self.container = container
        # A PIL image of the caller is never reduced in place, and never refused as too large.
        self.is_file = container is not None or page
        if page and image.format == "TIFF":
            _seek_largest_page(image)

    @property
    def orientation(self) -> int | None:
        if self.container is not None:
            return self.container.orientation
        return _orientation(self.image)

    @property
    def profile(self) -> bytes | None:
        if self.container is not None:
            return self.container.profile
        found = self.image.info.get("icc_profile")
        return found if isinstance(found, bytes) and len(found) <= containers.MAX_PROFILE else None

    def loaded(self) -> Image.Image:
        """Decodes the image and returns it."""
        self.image.load()
        return self.image

    def memory(self, across: int) -> int:
        """Returns the bytes for decoding, converting and resizing to a width of `across` pixels.

        Raises:
            UnreadableImage: the file has too many pixels, or takes too many bytes.
        """
        width, height = self.image.size
        needed = self._decoding() + _converting(self.image, across)
        if self.is_file and width * height > MAX_PIXELS:
            raise UnreadableImage(
                Reason.TOO_MANY_PIXELS, f"it has {width} x {height} pixels and {MAX_PIXELS:,} is the limit"
            )
        if self.is_file and needed > MAX_MEMORY:
            raise UnreadableImage(*TOO_LARGE)
        return needed

    def _decoding(self) -> int:
        """Returns the bytes that the decoder takes, with the pixels."""
        image = self.image
        pixels = image.width * image.height
        needed = pixels * (_stored_bytes(image.mode) + DECODER_BYTES.get(image.format or "", 0))
        if self.container is not None:
            needed += self.container.buffered
        elif image.format == "JPEG2000":
            needed += pixels * _COMPONENT_BYTES * len(image.getbands())
        elif image.format == "TIFF":
            needed += _TIFF_BYTES * _largest_piece(cast(Any, image).tag_v2, image.size)
        elif image.format == "PPM":
            needed += pixels * _PLAIN_BYTES * any(tile[0] != "raw" for tile in cast(Any, image).tile)
        return needed


def _largest_piece(tags: Any, size: tuple[int, int]) -> int:
    """Returns the pixels of a TIFF that are decoded together: a tile, or a strip of rows."""
    across, down = tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)
    if isinstance(across, int) and isinstance(down, int):
        return across * down
    rows = tags.get(_ROWS_PER_STRIP)
    return size[0] * (min(rows, size[1]) if isinstance(rows, int) else size[1])


def _converting(image: Image.Image, across: int) -> int:
    """Returns the bytes that `resized` takes besides the picture."""
    width, height = image.size
    if image.mode == "RGB" and "transparency" not in image.info:
        return 0
    if _is_in_one(width, height, across):
        return width * height * _CONVERTED_PIXEL_BYTES
    return max(_STRIP_BYTES, width * _CONVERTED_PIXEL_BYTES) + 4 * across * height


def _is_in_one(width: int, height: int, across: int) -> bool:
    """Returns whether a picture is converted whole: it is small, or so tall that strips save no memory."""
    return width * height * _CONVERTED_PIXEL_BYTES <= _STRIP_BYTES or 4 * across * height > _NARROW_BYTES


def _stored_bytes(mode: str) -> int:
    """Returns the bytes that Pillow stores for a pixel."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4


def _seek_largest_page(image: Image.Image) -> None:
    """Seeks the page of the picture in a TIFF with a thumbnail as its first page.

    Raises:
        UnreadableImage: the picture is not among the pages that can be read.
    """
    tiff = cast(Any, image)
    is_reduced = bool(tiff.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1)
    if is_reduced and _SUB_DIRECTORIES in tiff.tag_v2:
        raise UnreadableImage(
            Reason.UNSUPPORTED_FORMAT,
            "its first page is a thumbnail, and the picture itself is of a kind that is not read; "
            "convert it to JPEG",
        )
    sizes = [image.size]
    with suppress(EOFError):
        for page in range(1, _MAX_TIFF_PAGES):
            tiff.seek(page)
            sizes.append(tiff.size)
    areas = [width * height for width, height in sizes]
    largest = areas.index(max(areas))
    # The pages of a document have about the same size, and its first page is used.
    tiff.seek(largest if is_reduced or areas[largest] >= _MIN_THUMBNAIL_RATIO * areas[0] else 0)


# Tags of TIFF.
_NEW_SUBFILE_TYPE: Final = 254
_ROWS_PER_STRIP: Final = 278
_TILE_WIDTH: Final = 322
_TILE_HEIGHT: Final = 323
_SUB_DIRECTORIES: Final = 330
# The most pages of a TIFF that are examined, and the least ratio of the areas of picture and thumbnail.
_MAX_TIFF_PAGES: Final = 16
_MIN_THUMBNAIL_RATIO: Final = 4


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Converts any error of a decoder into an UnreadableImage with a reason."""
    try:
        yield
    except (UnreadableImage, Interrupted):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(Reason.TOO_MANY_PIXELS, "it has too many pixels") from error
    except MemoryError as error:
        raise UnreadableImage(*TOO_LARGE) from error
    except Exception as error:
        # A decoder may raise anything for malformed bytes; one bad file must never end a run.
        words = str(error).lower()
        if any(sign in words for sign in ("truncated", "end of file", "eof", "not enough", "incomplete")):
            raise UnreadableImage(*TRUNCATED) from error
        raise UnreadableImage(Reason.DAMAGED, "its data are damaged") from error


def resized_in_colour(
    picture: Picture,
    size: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[float, float, float, float] | None,
    hold: Hold,
    *,
    colour: Colour,
) -> Image.Image:
    """Returns what `resized` returns, converted to sRGB if `colour` is "srgb"."""
    # The resized picture is converted: converting the whole picture first would cost many times as much.
    profile = (picture.profile or None) if colour == "srgb" else None
    keep_cmyk = profile is not None and picture.image.mode == "CMYK" and converts(profile, "CMYK")
    with hold(picture.memory(size[0])):
        small = resized(picture, size, resampling, box, keep_cmyk=keep_cmyk)
    if profile is None:
        return small
    is_grey = picture.image.mode in _GREY_MODES
    return to_srgb(small.getchannel(0) if is_grey else small, profile)


# The modes to which a grey profile may apply.
_GREY_MODES: Final = ("1", "L", "La", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def draft(picture: Picture, least: float) -> float:
    """Sets a JPEG decoder to 1/2, 1/4 or 1/8 of the size, at least `least`, and returns the scale."""
    image = picture.image
    if not picture.is_file or image.format not in ("JPEG", "MPO") or least >= 1:
        return 1.0
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width * least), math.ceil(height * least)))
    return 1.0 if drafted is None else drafted[1][2] / width


def resized(
    picture: Picture,
    size: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[float, float, float, float] | None,
    *,
    keep_cmyk: bool = False,
) -> Image.Image:
    """Returns a box of a picture, or all of it, in RGB at another size; in CMYK with `keep_cmyk`.

    The pixels are the same as if the whole picture were converted first and then resized. Where that would
    take much memory, it works in strips of rows: the width is reduced first, as in Pillow, then the height.
    """
    image = picture.loaded()
    width, height = image.size
    if keep_cmyk:
        return image.resize(size, resampling, box=box)
    converted = Conversion(picture)
    box = (0, 0, width, height) if box is None else box
    across, down = size
    if _is_in_one(width, height, across) or not converted.changes:
        return converted(image).resize(size, resampling, box=box)
    rows = max(1, _STRIP_BYTES // (width * _CONVERTED_PIXEL_BYTES))
    narrow = Image.new("RGB", (across, height))
    # A filter reaches beyond the box by up to 3 pixels of the result, or 3 of the picture.
    reach = math.ceil(3 * max(1.0, (box[3] - box[1]) / down)) + 1
    first, last = max(0, math.floor(box[1]) - reach), min(height, math.ceil(box[3]) + reach)
    for top in range(first, last, rows):
        strip = converted(image.crop((0, top, width, min(last, top + rows))))
        squeezed = strip.resize((across, strip.height), resampling, box=(box[0], 0, box[2], strip.height))
        narrow.paste(squeezed, (0, top))
    return narrow.resize(size, resampling, box=(0, box[1], across, box[3]))


_TRANSPOSE_BY_ORIENTATION: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# The orientations that exchange width and height.
SWAPS_SIDES: Final = frozenset({5, 6, 7, 8})


def _orientation(image: Image.Image) -> int | None:
    """Returns the EXIF orientation; None where it is missing or unreadable."""
    try:
        return cast("int | None", image.getexif().get(0x0112))
    except Exception:
        # Cameras and editors write broken EXIF beside a good picture; the picture is used without rotation.
        return None


def upright(picture: Image.Image, orientation: int | None) -> Image.Image:
    """Returns the picture rotated or flipped by an EXIF orientation."""
    turn = _TRANSPOSE_BY_ORIENTATION.get(orientation or 1)
    return picture if turn is None else picture.transpose(turn)


class Conversion:
    """Converts any mode to RGB: transparency over white; 16 bits are scaled and never clipped.

    It is made for a whole picture and may be called with parts of it.
    """

    def __init__(self, picture: Picture) -> None:
        """Scans all pixels where their range decides the conversion (floating-point modes).

        Raises:
            UnreadableImage: a pixel is not a finite number.
        """
        image = picture.image
        self._floats_of_one = image.mode == "F" and _highest(image) <= 1
        self.changes = image.mode != "RGB" or image.has_transparency_data

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I"):
            return _from_float_levels(np.asarray(image).astype(np.float64) / 257)
        if image.mode == "F":
            levels = np.asarray(image, np.float64)
            return _from_float_levels(levels * 255 if self._floats_of_one else levels)
        if image.has_transparency_data:
            layered = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            white = Image.new("RGBA", layered.size, "white")
            return Image.alpha_composite(white, layered).convert("RGB")
        try:
            return image if image.mode == "RGB" else image.convert("RGB")
        except ValueError as error:
            raise UnreadableImage(
                Reason.UNSUPPORTED_MODE, f"its colour mode {image.mode} cannot be turned into RGB"
            ) from error


def _highest(image: Image.Image) -> float:
    """Returns the highest floating-point level, computed in strips of rows."""
    width, height = image.size
    rows = max(1, _STRIP_BYTES // (width * _CONVERTED_PIXEL_BYTES))
    highest = -math.inf
    for top in range(0, height, rows):
        levels = np.asarray(image.crop((0, top, width, min(height, top + rows))))
        if not np.isfinite(levels).all():
            raise UnreadableImage(Reason.UNSUPPORTED_MODE, "it has pixels that are not finite numbers")
        highest = max(highest, float(levels.max()))
    return highest


def _from_float_levels(levels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8)).convert("RGB")
