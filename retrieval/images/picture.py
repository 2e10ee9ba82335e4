"""A `Picture`: an opened image with the memory that it takes; and how it becomes RGB, resized and upright.

In this order: `draft` lets a JPEG be decoded at a fraction of its size, `resized` decodes it and returns RGB
of another size, and `upright` turns the small result by the orientation that the file states.
"""

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
from retrieval.images.formats import MAX_MEMORY, MAX_PIXELS, TOO_LARGE, TRUNCATED, open_container

Pixels: TypeAlias = NDArray[np.uint8]
# The treatment of a photo's colour profile: ignore it, or convert the colours to sRGB.
Colour: TypeAlias = Literal["ignore", "srgb"]
# Holds bytes of the memory budget while a picture is decoded.
Hold: TypeAlias = Callable[[int], AbstractContextManager[None]]

# Large pictures are converted in strips of rows, each reduced at once to the width of the result.
# Bytes of a strip; the most bytes that a pixel takes while it is converted; and the most bytes of all reduced
# rows together, 4 a pixel: with more, strips would save nothing.
_STRIP_BYTES: Final = 8 * 2**20
_CONVERTED_PIXEL_BYTES: Final = 24
_MAX_REDUCED_BYTES: Final = 64 * 2**20

# Bytes that decoders need, besides the pixels as Pillow stores them; measured with 12 and 88 million pixels.
# WebP, AVIF, HEIF: for each pixel.
DECODER_BYTES: Final = {"WEBP": 13, "AVIF": 12, "HEIF": 16}
# JPEG 2000: for each component of a pixel.
_JPEG2000_COMPONENT_BYTES: Final = 6
# TIFF: for each pixel of a strip or tile.
_TIFF_PIXEL_BYTES: Final = 8
# PPM with levels as text: for each pixel.
_TEXT_PPM_PIXEL_BYTES: Final = 40

# Tags of TIFF.
_NEW_SUBFILE_TYPE: Final = 254
_ROWS_PER_STRIP: Final = 278
_TILE_WIDTH: Final = 322
_TILE_HEIGHT: Final = 323
_SUB_DIRECTORIES: Final = 330
# The most pages of a TIFF that are examined, and the least ratio of the areas of picture and thumbnail.
_MAX_TIFF_PAGES: Final = 16
_MIN_THUMBNAIL_RATIO: Final = 4

# The modes to which a grey profile may apply.
_GREY_MODES: Final = ("1", "L", "La", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")

# The tag of EXIF for the orientation, and what its values ask for; 1 is upright.
_ORIENTATION: Final = 0x0112
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


class Picture:
    """A picture with a parsed header, and what its conversion to upright RGB needs.

    Attributes:
        image: as Pillow opened it; decoded by `loaded`.
        container: the header as `containers` parsed it; None where Pillow alone read it.
        is_file: whether it comes from a file. An image that the caller holds in memory is never reduced in
            place, and never refused as too large.
    """

    def __init__(self, image: Image.Image, container: Container | None = None, *, is_file: bool) -> None:
        """Use `of_image`, `of_container` or `of_file`."""
        self.image = image
        self.container = container
        self.is_file = is_file

    @classmethod
    def of_image(cls, image: Image.Image) -> "Picture":
        """Wraps an image that the caller holds in memory."""
        return cls(image, is_file=False)

    @classmethod
    def of_container(cls, container: Container) -> "Picture":
        """Opens a file with a header that `containers` parsed.

        Raises:
            UnreadableImage: it cannot be opened.
        """
        return cls(open_container(container), container, is_file=True)

    @classmethod
    def of_file(cls, image: Image.Image) -> "Picture":
        """Wraps a file that Pillow opened; of a TIFF with a thumbnail before the picture, it is the picture.

        Raises:
            UnreadableImage: the picture of a TIFF is not among the pages that can be read.
        """
        if image.format == "TIFF":
            _seek_largest_page(image)
        return cls(image, is_file=True)

    @property
    def orientation(self) -> int | None:
        """The EXIF orientation, 1 to 8; None where it is missing or unreadable."""
        if self.container is not None:
            return self.container.orientation
        return _orientation(self.image)

    @property
    def profile(self) -> bytes | None:
        """The colour profile (ICC); None where it is missing or too large."""
        if self.container is not None:
            return self.container.profile
        found = self.image.info.get("icc_profile")
        return found if isinstance(found, bytes) and len(found) <= containers.MAX_PROFILE else None

    def loaded(self) -> Image.Image:
        """Decodes the image and returns it."""
        self.image.load()
        return self.image

    def memory(self, new_width: int) -> int:
        """Returns the bytes of memory for decoding, converting and resizing to a width in pixels.

        Raises:
            UnreadableImage: the file has too many pixels, or takes too many bytes.
        """
        width, height = self.image.size
        needed = self._decoding_bytes() + _conversion_bytes(self.image, new_width)
        if self.is_file and width * height > MAX_PIXELS:
            raise UnreadableImage(
                Reason.TOO_MANY_PIXELS, f"it has {width} x {height} pixels and {MAX_PIXELS:,} is the limit"
            )
        if self.is_file and needed > MAX_MEMORY:
            raise UnreadableImage(*TOO_LARGE)
        return needed

    def _decoding_bytes(self) -> int:
        """Returns the bytes of the decoded pixels and of the decoder."""
        image = self.image
        pixels = image.width * image.height
        needed = pixels * (_stored_bytes(image.mode) + DECODER_BYTES.get(image.format or "", 0))
        if self.container is not None:
            needed += self.container.buffered
        elif image.format == "JPEG2000":
            needed += pixels * _JPEG2000_COMPONENT_BYTES * len(image.getbands())
        elif image.format == "TIFF":
            needed += _TIFF_PIXEL_BYTES * _tiff_part_pixels(cast(Any, image).tag_v2, image.size)
        elif image.format == "PPM":
            is_text = any(tile[0] != "raw" for tile in cast(Any, image).tile)
            needed += pixels * _TEXT_PPM_PIXEL_BYTES if is_text else 0
        return needed


def _tiff_part_pixels(tags: Any, size: tuple[int, int]) -> int:
    """Returns how many pixels of a TIFF are decoded together: those of a tile, or of a strip of rows."""
    tile_width, tile_height = tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)
    if isinstance(tile_width, int) and isinstance(tile_height, int):
        return tile_width * tile_height
    rows = tags.get(_ROWS_PER_STRIP)
    return size[0] * (min(rows, size[1]) if isinstance(rows, int) else size[1])


def _conversion_bytes(image: Image.Image, new_width: int) -> int:
    """Returns the bytes that `resized` takes besides the decoded picture."""
    width, height = image.size
    if image.mode == "RGB" and "transparency" not in image.info:
        return 0
    if _is_converted_whole(width, height, new_width):
        return width * height * _CONVERTED_PIXEL_BYTES
    strip = max(_STRIP_BYTES, width * _CONVERTED_PIXEL_BYTES)
    return strip + _reduced_bytes(new_width, height)


def _is_converted_whole(width: int, height: int, new_width: int) -> bool:
    """Returns whether a picture is converted in one piece: it is small, or strips would save nothing."""
    is_small = width * height * _CONVERTED_PIXEL_BYTES <= _STRIP_BYTES
    return is_small or _reduced_bytes(new_width, height) > _MAX_REDUCED_BYTES


def _reduced_bytes(new_width: int, height: int) -> int:
    """Returns the bytes of all rows at the width of the result, in RGB, which Pillow stores in 4 bytes."""
    return 4 * new_width * height


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


def draft(picture: Picture, min_scale: float) -> float:
    """Lets the file of a JPEG be decoded at a fraction of its size, which saves time; returns the scale.

    The scale is 1/2, 1/4 or 1/8, the smallest that is not below `min_scale`; 1 where none is possible. From
    here on, the size of `picture.image` is the reduced one.
    """
    image = picture.image
    if not picture.is_file or image.format not in ("JPEG", "MPO") or min_scale >= 1:
        return 1.0
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width * min_scale), math.ceil(height * min_scale)))
    # Of the box that Pillow returns, which is the whole picture at its reduced size, the right edge.
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
    new_width, new_height = size
    if _is_converted_whole(width, height, new_width) or not converted.changes:
        return converted(image).resize(size, resampling, box=box)
    rows = max(1, _STRIP_BYTES // (width * _CONVERTED_PIXEL_BYTES))
    reduced = Image.new("RGB", (new_width, height))
    # A filter reaches beyond the box by up to 3 pixels of the result, or 3 of the picture.
    reach = math.ceil(3 * max(1.0, (box[3] - box[1]) / new_height)) + 1
    first, last = max(0, math.floor(box[1]) - reach), min(height, math.ceil(box[3]) + reach)
    for top in range(first, last, rows):
        strip = converted(image.crop((0, top, width, min(last, top + rows))))
        strip = strip.resize((new_width, strip.height), resampling, box=(box[0], 0, box[2], strip.height))
        reduced.paste(strip, (0, top))
    return reduced.resize(size, resampling, box=(0, box[1], new_width, box[3]))


def _orientation(image: Image.Image) -> int | None:
    """Returns the EXIF orientation; None where it is missing or unreadable."""
    try:
        return cast("int | None", image.getexif().get(_ORIENTATION))
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

    Attributes:
        changes: whether it changes anything: False for RGB without transparency.
    """

    def __init__(self, picture: Picture) -> None:
        """Scans all pixels where their range decides the conversion (floating-point modes).

        Raises:
            UnreadableImage: a pixel is not a finite number.
        """
        image = picture.image
        # Floating-point levels have no stated range: up to 1 they are shares of white, otherwise 0 to 255.
        self._is_up_to_one = image.mode == "F" and _highest(image) <= 1
        self.changes = image.mode != "RGB" or image.has_transparency_data

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I"):
            # From 0 to 65,535 to 0 to 255.
            return _from_float_levels(np.asarray(image).astype(np.float64) / 257)
        if image.mode == "F":
            levels = np.asarray(image, np.float64)
            return _from_float_levels(levels * 255 if self._is_up_to_one else levels)
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
