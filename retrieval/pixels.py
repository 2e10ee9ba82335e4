"""From a picture to pixels: the only place that decodes, turns, crops and resizes."""

import errno
import hashlib
import io
import math
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from retrieval.errors import InputError, Reason, UnreadableImage
from retrieval.files import Stamp

Pixels: TypeAlias = NDArray[np.uint8]
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

_T = TypeVar("_T")

MAX_BYTES: Final = 128 * 2**20
# Pillow itself starts to warn of decompression bombs just above this many pixels.
MAX_PIXELS: Final = 89_000_000

# The formats a camera, a phone or a web page produces. Pillow knows more, among them ones
# that start other programs (EPS) and ones that nobody has photographs in.
_FORMATS: Final = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size when what is left of the crop is still
# at least this many times the size asked for. `tests/test_pixels.py` states what that costs.
_DRAFT_MARGIN: Final = 2

_LOOKS_LIKE: Final[tuple[tuple[bytes, int, Reason, str], ...]] = (
    (b"<!doctype html", 0, Reason.NOT_AN_IMAGE, "it is a web page"),
    (b"<html", 0, Reason.NOT_AN_IMAGE, "it is a web page"),
    (b"%pdf", 0, Reason.NOT_AN_IMAGE, "it is a PDF document"),
    (b"pk\x03\x04", 0, Reason.NOT_AN_IMAGE, "it is a zip archive"),
    (b"ftypheic", 4, Reason.UNSUPPORTED_FORMAT, "it is a HEIC photo; convert it to JPEG"),
    (b"ftypheix", 4, Reason.UNSUPPORTED_FORMAT, "it is a HEIC photo; convert it to JPEG"),
    (b"ftypmif1", 4, Reason.UNSUPPORTED_FORMAT, "it is a HEIF photo; convert it to JPEG"),
    (b"ftypavif", 4, Reason.DAMAGED, "its header is damaged"),
    (b"ftyp", 4, Reason.NOT_AN_IMAGE, "it is a video"),
    (b"webp", 8, Reason.DAMAGED, "its header is damaged"),
)
_CUT: Final = (Reason.TRUNCATED, "the file ends before the picture does")


def read(source: ImageSource, *, size: int, crop: float = 1.0) -> Pixels:
    """Reads a picture as the network wants it.

    The bytes decide the format, never a file's extension. EXIF orientation is applied, any mode
    becomes RGB (transparency over white), the central square of side `crop` x the shorter side is
    resized to `size` with an antialiased bilinear filter.

    Args:
        source: a path, the file's bytes, a PIL image or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
            A path and its bytes give identical pixels; a PIL image that is already decoded gives the
            pixels of the full decode, which a large JPEG's scaled decode approaches within 2 levels
            on average.
        size: side of the result in pixels.
        crop: share of the shorter side that is kept, above 0 and at most 1.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        UnreadableImage: with its reason; nothing else for a bad picture.
        InputError: an array that is not uint8 or not of one of these shapes.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    # A caller's own PIL image is never put into a reduced scale under its hands.
    may_draft = not isinstance(source, Image.Image)
    try:
        return _decoded(open_image(source), lambda image: _fit(image, size, crop, may_draft=may_draft))
    except UnreadableImage as error:
        raise UnreadableImage(error.reason, error.detail, name) from error.__cause__


def thumbnail(source: ImageSource, *, side: int) -> Image.Image:
    """The whole picture, upright, RGB, at most `side` pixels wide and high, for showing to a person.

    Raises:
        UnreadableImage: as `read`.
    """
    return _decoded(open_image(source), lambda image: _thumbnail(image, side))


@dataclass(frozen=True, slots=True, eq=False)
class Glance:
    """What can be said of a picture at a glance.

    Attributes:
        width, height: of the whole picture, upright, in pixels.
        small: uint8 (side, side, 3), RGB: all of it, upright, squeezed into a square.
    """

    width: int
    height: int
    small: Pixels


def glance(source: ImageSource, *, side: int) -> Glance:
    """The whole of a picture, small, and how large it is.

    Raises:
        UnreadableImage, InputError: as `read`.
    """
    return _decoded(open_image(source), lambda image: _glance(image, side))


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """A file's bytes, read only when it is a regular file of at most `max_bytes`.

    Raises:
        UnreadableImage: missing, no permission, not a file, empty, too many bytes, or an I/O error.
    """
    return read_file(path, max_bytes=max_bytes)[0]


def read_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> tuple[bytes, Stamp | None]:
    """As `read_bytes`, with the stamp by which the file can be known as unchanged later.

    The stamp is None where the file may have other bytes by now and the same stamp.
    """
    try:
        # Before it is opened: opening a pipe would wake up whoever waits to write to it.
        _check_status(os.stat(path), max_bytes)
        now = time.time_ns()
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            _check_status(before, max_bytes)
            data = file.read()
            stamp = Stamp.of(os.fstat(file.fileno()))
    except OSError as error:
        raise UnreadableImage(*_os_reason(error)) from error
    except ValueError as error:
        raise UnreadableImage(Reason.MISSING, "no file can have this name") from error
    if not data:
        raise UnreadableImage(Reason.EMPTY_FILE, "the file is empty")
    same = stamp == Stamp.of(before) and stamp.size == len(data)
    return data, stamp if same and stamp.settled(now) else None


def _check_status(status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage(Reason.NOT_A_FILE, "it is not a regular file")
    if status.st_size > max_bytes:
        raise UnreadableImage(
            Reason.TOO_MANY_BYTES, f"it has {status.st_size:,} bytes and {max_bytes:,} is the limit"
        )


def content_sha256(source: bytes | Image.Image | NDArray[np.uint8]) -> str:
    """What a picture is known by: SHA-256, in hex, of a file's bytes; elsewhere of its upright RGB pixels.

    Raises:
        UnreadableImage, InputError: as `read`.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    # Palette, transparency and orientation all count, as they do in what `read` gives.
    image = _decoded(open_image(source), lambda image: _upright(_rgb(image), image))
    return hashlib.sha256(f"{image.width} {image.height}\n".encode() + image.tobytes()).hexdigest()


def open_image(source: ImageSource) -> Image.Image:
    """A PIL image of any source, header read, pixels not yet decoded where they need not be.

    Raises:
        UnreadableImage: as `read`.
        InputError: an array that is not a uint8 picture.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    return _from_bytes(source if isinstance(source, bytes) else read_bytes(source))


def _os_reason(error: OSError) -> tuple[Reason, str]:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Reason.MISSING, "there is no such file"
    if isinstance(error, PermissionError):
        return Reason.NO_PERMISSION, "its permissions do not allow reading it"
    if error.errno == errno.ELOOP:
        return Reason.LINK_LOOP, "it is a symbolic link that leads back to itself"
    return Reason.IO_ERROR, error.strerror or "the disk reported an error"


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits or array.size == 0:
        raise InputError(
            f"An image array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
            f"not {array.dtype} {array.shape}."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _from_bytes(data: bytes) -> Image.Image:
    if not data:
        raise UnreadableImage(Reason.EMPTY_FILE, "the file is empty")
    if len(data) > MAX_BYTES:
        raise UnreadableImage(
            Reason.TOO_MANY_BYTES, f"it has {len(data):,} bytes and {MAX_BYTES:,} is the limit"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
    except UnidentifiedImageError as error:
        raise UnreadableImage(*_what_is(data)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(Reason.TOO_MANY_PIXELS, "it has too many pixels") from error
    except Exception as error:
        # A WebP says how long it is, and does not open at all when it is shorter.
        if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") > len(data) - 8:
            raise UnreadableImage(*_CUT) from error
        # Pillow's plugins let struct, index, value and zlib errors through for hostile headers.
        raise UnreadableImage(Reason.DAMAGED, "its header is damaged") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            Reason.TOO_MANY_PIXELS, f"it has {width} x {height} pixels and {MAX_PIXELS:,} is the limit"
        )
    return image


def _known_formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow has (AVIF and JPEG 2000 are optional)."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _what_is(data: bytes) -> tuple[Reason, str]:
    """What bytes that no decoder knows are, as far as their first few tell."""
    head = data[:512].lstrip().lower()
    for magic, offset, reason, words in _LOOKS_LIKE:
        if head[offset:].startswith(magic):
            return reason, words
    # A drawing may begin with an XML declaration, a comment or a doctype of its own.
    if head.startswith(b"<") and b"<svg" in head:
        return Reason.UNSUPPORTED_FORMAT, "it is an SVG drawing; convert it to PNG"
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")):
        return Reason.DAMAGED, "its header is damaged"
    return Reason.NOT_AN_IMAGE, "its bytes are no image that we know"


def _decoded(image: Image.Image, work: Callable[[Image.Image], _T]) -> _T:
    """Runs `work`, which decodes `image`, and turns whatever a broken file raises into its reason."""
    try:
        return work(image)
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(Reason.TOO_MANY_PIXELS, "it has too many pixels") from error
    except Exception as error:
        # A decoder fed hostile bytes may raise anything; one bad file must never end a run.
        words = str(error).lower()
        if any(sign in words for sign in ("truncated", "end of file", "eof", "not enough", "incomplete")):
            raise UnreadableImage(*_CUT) from error
        raise UnreadableImage(Reason.DAMAGED, "its data are damaged") from error


def _fit(image: Image.Image, size: int, crop: float, *, may_draft: bool) -> Pixels:
    width, height = image.size
    side = max(1.0, crop * min(width, height))
    # Not the quotient of the sizes: 1597 pixels at 1/4 are 400 whole ones, the last three quarters empty.
    scale = _draft(image, _DRAFT_MARGIN * size / side) if may_draft else 1.0
    decoded = _rgb(image)
    box = (
        (width - side) / 2 * scale,
        (height - side) / 2 * scale,
        (width + side) / 2 * scale,
        (height + side) / 2 * scale,
    )
    square = decoded.resize((size, size), Image.Resampling.BILINEAR, box=box)
    # Turning commutes with a central square, and is cheaper on the small picture.
    return np.array(_upright(square, image))


def _draft(image: Image.Image, least: float) -> float:
    """Asks a JPEG's decoder for 1/2, 1/4 or 1/8 of its size, but for no less than `least`; says which."""
    if image.format not in ("JPEG", "MPO") or least >= 1:
        return 1.0
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width * least), math.ceil(height * least)))
    return 1.0 if drafted is None else drafted[1][2] / width


def _thumbnail(image: Image.Image, side: int) -> Image.Image:
    copy = _rgb(image).copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _upright(copy, image)


def _glance(image: Image.Image, side: int) -> Glance:
    width, height = image.size
    _draft(image, min(1.0, _DRAFT_MARGIN * side / min(width, height)))
    small = _rgb(image).resize((side, side), Image.Resampling.BILINEAR)
    if _orientation(image) in _LYING:
        width, height = height, width
    return Glance(width, height, np.array(_upright(small, image)))


_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Of these orientations width and height are the other way round.
_LYING: Final = frozenset({5, 6, 7, 8})


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation; None where there is none that can be read."""
    try:
        return cast("int | None", image.getexif().get(0x0112))
    except Exception:
        # Broken EXIF beside a good picture: cameras and editors do that; the picture stands as it is.
        return None


def _upright(picture: Image.Image, original: Image.Image) -> Image.Image:
    """`picture`, turned as the EXIF orientation of `original` says."""
    turn = _TURNS.get(_orientation(original) or 1)
    return picture if turn is None else picture.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; transparency lies over white, 16 bits are scaled and never clipped."""
    image.load()
    if image.mode.startswith("I"):
        return _from_deep(np.asarray(image).astype(np.float64) / 257)
    if image.mode == "F":
        return _from_deep(_float_levels(np.asarray(image, np.float64)))
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


def _float_levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise UnreadableImage(Reason.UNSUPPORTED_MODE, "it has pixels that are not finite numbers")
    return values * 255 if values.max() <= 1 else values


def _from_deep(levels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8)).convert("RGB")
