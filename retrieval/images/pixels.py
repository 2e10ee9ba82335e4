"""From an image file to pixels: the only module that decodes, rotates, crops and resizes.

The memory and the time of a photo are limited, whatever its file states. The memory is known from the header
before decoding, and all threads share one budget of it. The calling thread decodes JPEG, PNG and WebP files
with headers that bound the time as well. A separate process decodes all others, and is killed at the time
limit (`retrieval.system.isolation`).
"""

import dataclasses
import errno
import hashlib
import io
import math
import os
import resource
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from retrieval.errors import InputError, Interrupted, Reason, UnreadableImage
from retrieval.images import containers
from retrieval.images.colour import converts, to_srgb
from retrieval.images.containers import Container
from retrieval.system import isolation
from retrieval.system.files import Stamp
from retrieval.system.memory_budget import ByteBudget

Pixels: TypeAlias = NDArray[np.uint8]
# The treatment of a photo's colour profile: ignore it, or convert the colours to sRGB.
Colour: TypeAlias = Literal["ignore", "srgb"]
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

MAX_BYTES: Final = 128 * 2**20
# Pixels after a JPEG's reduction to 1/2, 1/4 or 1/8. Just above, Pillow warns of decompression bombs.
MAX_PIXELS: Final = 89_000_000
# Bytes for decoding and converting a photo, besides its file.
MAX_MEMORY: Final = 2**30
# Seconds for decoding a photo in a separate process. The slowest picture within the other limits, a JPEG 2000
# of 89 million pixels, takes 15 s.
MAX_SECONDS: Final = 60.0

# The memory for decoding and converting that all threads of this process share.
MEMORY: Final = ByteBudget(MAX_MEMORY)

# The formats of cameras, phones and web pages. Pillow reads more, among them formats that start other
# programs (EPS) and formats that are not used for photographs.
_FORMATS: Final = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_HEIF: Final = "HEIF"

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if the reduced crop is still at least this many times
# the requested size. `tests/images/test_pixels.py` states the error.
_DRAFT_MARGIN: Final = 2

# The limits of files that a thread decodes itself: none within them takes longer than 1 s, or 80 MiB.
_LIGHT_BYTES: Final = 16 * 2**20
_LIGHT_PIXELS: Final = {"JPEG": 16_000_000, "PNG": 16_000_000, "WEBP": 4_000_000}
# The most pixels times scans of a JPEG: each scan passes over all pixels before the reduction.
_LIGHT_SCANNED_PIXELS: Final = 100_000_000

# Conversion works in strips of rows: bytes of a strip, at up to 24 bytes a pixel; and the most bytes of all
# rows once they are reduced to the width of the result.
_STRIP_BYTES: Final = 8 * 2**20
_CONVERTED_PIXEL_BYTES: Final = 24
_NARROW_BYTES: Final = 64 * 2**20
# Bytes a pixel that decoders of whole pictures need, besides the pixel as Pillow stores it. Measured with 12
# and 88 million pixels; JPEG 2000: for each component; TIFF: for the pixels of a strip or tile.
_DECODER_BYTES: Final = {"WEBP": 13, "AVIF": 12, "HEIF": 16}
_COMPONENT_BYTES: Final = 6
_TIFF_BYTES: Final = 8
_PLAIN_BYTES: Final = 40

_PROGRAM: Final = "import sys; from retrieval.images.pixels import serve; serve(int(sys.argv[1]))"

_HEIC_BRANDS: Final = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
)
_RAW: Final = "it is a camera's raw photo; convert it to JPEG"
_KNOWN_SIGNATURES: Final[tuple[tuple[bytes, int, Reason, str], ...]] = (
    (b"<!doctype html", 0, Reason.NOT_AN_IMAGE, "it is a web page"),
    (b"<html", 0, Reason.NOT_AN_IMAGE, "it is a web page"),
    (b"%pdf", 0, Reason.NOT_AN_IMAGE, "it is a PDF document"),
    (b"pk\x03\x04", 0, Reason.NOT_AN_IMAGE, "it is a zip archive"),
    *(
        (
            b"ftyp" + brand,
            4,
            Reason.UNSUPPORTED_FORMAT,
            "it is a HEIC photo; install faceprint[heif], or convert it to JPEG",
        )
        for brand in _HEIC_BRANDS
    ),
    (b"ftypcrx", 4, Reason.UNSUPPORTED_FORMAT, _RAW),
    (b"ftypavif", 4, Reason.DAMAGED, "its header is damaged"),
    (b"ftypavis", 4, Reason.DAMAGED, "its header is damaged"),
    (b"ftypjxl", 4, Reason.UNSUPPORTED_FORMAT, "it is a JPEG XL picture; convert it to JPEG"),
    (b"ftyp", 4, Reason.NOT_AN_IMAGE, "it is a video"),
    (b"webp", 8, Reason.DAMAGED, "its header is damaged"),
    (b"8bps", 0, Reason.UNSUPPORTED_FORMAT, "it is a Photoshop document; convert it to JPEG"),
    (b"fujifilmccd-raw", 0, Reason.UNSUPPORTED_FORMAT, _RAW),
)
# These signatures are binary: leading white space must not be skipped.
_BINARY_MAGIC: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\x0a", "it is a JPEG XL picture; convert it to JPEG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "it is a JPEG XL picture; convert it to JPEG"),
    (b"\0\0\1\0", "it is an icon; convert it to PNG"),
    (b"\0\0\2\0\1\0", "it is a cursor; convert it to PNG"),
    (b"DDS \x7c\0\0\0", "it is a DDS texture; convert it to PNG"),
    # SGI: plain or packed, of 8 or 16 bits.
    *(
        (b"\x01\xda" + kind, "it is an SGI picture; convert it to PNG")
        for kind in (b"\0\1\0", b"\0\2\0", b"\1\1\0", b"\1\2\0")
    ),
    (b"IIU\0", _RAW),
    (b"IIRO", _RAW),
    (b"IIRS", _RAW),
)
_TRUNCATED: Final = (Reason.TRUNCATED, "the file ends before the picture does")
_DAMAGED_HEADER: Final = (Reason.DAMAGED, "its header is damaged")


@dataclass(frozen=True, slots=True)
class _Task:
    """The requested result: a square for a network, a thumbnail, or a glance."""

    what: Literal["square", "thumbnail", "glance"]
    size: int
    crop: float = 1.0
    colour: Colour = "ignore"


# Pixels uint8 (H, W, 3), and the upright width and height of the whole picture.
_Made: TypeAlias = tuple[Pixels, int, int]
_Hold: TypeAlias = Callable[[int], AbstractContextManager[None]]


def read(
    source: ImageSource,
    *,
    size: int,
    crop: float = 1.0,
    colour: Colour = "ignore",
    seconds: float = MAX_SECONDS,
) -> Pixels:
    """Returns the pixels of a picture as the input of a network.

    The bytes decide the format, never the extension of a file. EXIF orientation is applied, any mode becomes
    RGB (transparency over white), and the central square of side `crop` x the shorter side is resized to
    `size` with an antialiased bilinear filter.

    Args:
        source: a path, the file's bytes, a PIL image or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
            A path and its bytes give identical pixels. A decoded PIL image gives the pixels of the full
            decode; the scaled decode of a large JPEG differs from it by at most 2 levels on average.
        size: side of the result in pixels.
        crop: share of the shorter side that is kept, above 0 and at most 1.
        colour: "srgb" converts colours to sRGB where the picture has another profile; a profile that is
            damaged, or is not for its mode, is ignored.
        seconds: the time limit of a file that is decoded in a separate process.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        UnreadableImage: the picture cannot be read; the only error for a bad picture, with a reason.
        InputError: an array is not uint8 or not of one of these shapes.
        RunError: the decoding process was killed.
        Interrupted: the run was cancelled by Ctrl-C.
    """
    return _made(source, _Task("square", size, crop, colour), seconds)[0]


def thumbnail(source: ImageSource, *, side: int, seconds: float = MAX_SECONDS) -> Image.Image:
    """Returns the whole picture for display, upright, at most `side` pixels wide and high.

    The result is RGB in sRGB; a damaged or unknown profile is ignored.

    Raises:
        UnreadableImage, RunError, Interrupted: as `read`.
    """
    return Image.fromarray(_made(source, _Task("thumbnail", side), seconds)[0])


@dataclass(frozen=True, slots=True, eq=False)
class Glance:
    """The size of a picture, and a small version of all of it.

    Attributes:
        width, height: of the whole picture, upright, in pixels.
        small: uint8 (side, side, 3), RGB: the whole picture, upright, scaled to a square.
    """

    width: int
    height: int
    small: Pixels


def glance(source: ImageSource, *, side: int, seconds: float = MAX_SECONDS) -> Glance:
    """Returns a small version of the whole picture, and its size.

    Raises:
        UnreadableImage, InputError, RunError, Interrupted: as `read`.
    """
    small, width, height = _made(source, _Task("glance", side), seconds)
    return Glance(width, height, small)


def is_light(data: bytes, *, size: int, crop: float = 1.0) -> bool:
    """Returns whether `read` certainly takes less than 1 s and 80 MiB for a file."""
    container = containers.parse(data)
    return container is not None and _is_light(container, _Task("square", size, crop))


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the bytes of a regular file of at most `max_bytes`.

    Raises:
        UnreadableImage: missing, no permission, not a file, empty, too many bytes, or an I/O error.
    """
    return read_file(path, max_bytes=max_bytes)[0]


def read_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> tuple[bytes, Stamp | None]:
    """Returns what `read_bytes` returns, and the stamp that later shows whether the file has changed.

    The stamp is None where the file could change without a change of the stamp.
    """
    try:
        # Before it is opened: opening a pipe would wake up a process that waits to write to it.
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
    """Returns the SHA-256 that identifies a picture, in hex: of a file's bytes, else of upright RGB pixels.

    Raises:
        UnreadableImage, InputError: as `read`.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    picture = _Picture(_in_memory(source))
    with _reasons():
        # Palette, transparency and orientation all count, as they do in what `read` gives.
        image = _upright(_Conversion(picture)(picture.loaded()), picture.orientation)
    return hashlib.sha256(f"{image.width} {image.height}\n".encode() + image.tobytes()).hexdigest()


def _made(source: ImageSource, task: _Task, seconds: float) -> _Made:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    try:
        if isinstance(source, Image.Image | np.ndarray):
            return _work(_Picture(_in_memory(source)), task, MEMORY.holding)
        return _from_file(source if isinstance(source, bytes) else read_bytes(source), task, seconds)
    except UnreadableImage as error:
        raise UnreadableImage(error.reason, error.detail, name) from error.__cause__


def _from_file(data: bytes, task: _Task, seconds: float) -> _Made:
    if not data:
        raise UnreadableImage(Reason.EMPTY_FILE, "the file is empty")
    if len(data) > MAX_BYTES:
        raise UnreadableImage(
            Reason.TOO_MANY_BYTES, f"it has {len(data):,} bytes and {MAX_BYTES:,} is the limit"
        )
    container = containers.parse(data)
    if container is not None and _is_light(container, task):
        return _work_on_container(container, task, MEMORY.holding)
    if container is None and not _may_be_picture(data):
        raise UnreadableImage(*_what_is(data))
    return _in_process(data, task, seconds)


def _is_light(container: Container, task: _Task) -> bool:
    pixels = container.width * container.height
    scale = 1
    if container.kind == "JPEG":
        side = max(1.0, task.crop * min(container.width, container.height))
        scale = max(by for by in (1, 2, 4, 8) if by == 1 or by * _DRAFT_MARGIN * task.size <= side)
    return (
        pixels <= _LIGHT_PIXELS[container.kind] * scale**2
        and pixels * max(1, container.scans) <= _LIGHT_SCANNED_PIXELS
        and len(container.data) <= _LIGHT_BYTES
        and container.buffered <= 4 * _LIGHT_BYTES
        and not container.animated
    )


# In a separate process


def _in_process(data: bytes, task: _Task, seconds: float) -> _Made:
    """Decodes a file in a process that is killed at the time limit.

    Raises:
        UnreadableImage, RunError, Interrupted: as `read`.
    """
    try:
        return _in_one_process(data, task, seconds)
    except isolation.Ended:
        # The reason may have been another photo, or none: this one gets a second attempt.
        return _in_one_process(data, task, seconds)


def _in_one_process(data: bytes, task: _Task, seconds: float) -> _Made:
    try:
        with isolation.process(_PROGRAM) as process:
            started = time.monotonic()
            process.send((task, data))
            reply = process.receive(seconds)
            if isinstance(reply, int):
                left = seconds - (time.monotonic() - started)
                with MEMORY.holding(reply):
                    process.send(None)
                    reply = process.receive(left)
    except isolation.TooSlow as error:
        raise UnreadableImage(
            Reason.TOO_SLOW, f"decoding it takes longer than {seconds:g} seconds, which is the limit"
        ) from error
    except isolation.Crashed as error:
        raise UnreadableImage(Reason.DAMAGED, "its decoder crashes over it") from error
    if isinstance(reply[0], Reason):
        raise UnreadableImage(*reply)
    return cast(_Made, reply)


def serve(pipe: int) -> None:
    """Runs a decoding process: decodes one file at a time.

    Args:
        pipe: the file descriptor of its pipe.
    """
    # The answer says what is wrong with a file.
    warnings.filterwarnings("ignore", module="PIL")
    # For decoders that take more than the header announces; the file is in memory up to three times.
    with suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY + 2**29 + 3 * MAX_BYTES, hard))
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    # The decoders are loaded before the time limit of a photo starts.
    Image.init()
    isolation.serve(pipe, _answer)


def _answer(caller: isolation.Caller) -> None:
    task, data = caller.receive()

    @contextmanager
    def asking(number: int) -> Iterator[None]:
        caller.send(number)
        caller.receive()
        yield

    try:
        container = containers.parse(data)
        if container is not None:
            answer: object = _work_on_container(container, task, asking)
        else:
            answer = _work(_Picture(_open_untrusted(data), page=True), task, asking)
    except UnreadableImage as error:
        answer = error.reason, error.detail
    caller.send(answer)


# Opening


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


def _in_memory(source: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return source if isinstance(source, Image.Image) else _from_array(source)


def _may_be_picture(data: bytes) -> bool:
    """Returns whether the first bytes are those of a supported format."""
    start = data[:16]
    if _is_heif(data):
        return find_spec("pillow_heif") is not None
    accepts = (Image.OPEN[name][1] for name in _known_formats())
    return any(accept is None or accept(start) is True for accept in accepts)


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS


def _open_untrusted(data: bytes) -> Image.Image:
    """Opens a file of any format. Only for a process that may be killed: some headers take hours to read."""
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
    except UnidentifiedImageError as error:
        # Do not advise to install the extra where it is installed.
        heif = _is_heif(data) and find_spec("pillow_heif")
        found = (Reason.DAMAGED, "its header is damaged") if heif else _what_is(data)
        raise UnreadableImage(*found) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(Reason.TOO_MANY_PIXELS, "it has too many pixels") from error
    except MemoryError as error:
        raise UnreadableImage(*_TOO_LARGE) from error
    except Exception as error:
        # Pillow's plugins raise struct, index, value and zlib errors for malformed headers.
        raise UnreadableImage(*_cut_or_damaged(data)) from error
    return image


def _open_container(container: Container) -> Image.Image:
    """Opens a JPEG, PNG or WebP file with a parsed header."""
    plugins: dict[str, Callable[[io.BytesIO], Image.Image]] = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
    }
    try:
        # Not by `Image.open`, which limits the pixels of a JPEG before its reduction.
        return plugins[container.kind](io.BytesIO(container.data))
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        raise UnreadableImage(*_what_is(container.data)) from error
    except Exception as error:
        raise UnreadableImage(*_cut_or_damaged(container.data)) from error


def _cut_or_damaged(data: bytes) -> tuple[Reason, str]:
    # A WebP states its length, and does not open at all if it is shorter.
    is_cut = data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") > len(data) - 8
    return _TRUNCATED if is_cut else _DAMAGED_HEADER


def _known_formats() -> tuple[str, ...]:
    """Returns the supported formats that this build of Pillow has (AVIF and JPEG 2000 are optional)."""
    Image.init()
    return tuple(name for name in (*_FORMATS, _HEIF) if name in Image.OPEN)


def _what_is(data: bytes) -> tuple[Reason, str]:
    """Returns why no decoder accepts the bytes, as far as their signature tells."""
    for magic, words in _BINARY_MAGIC:
        if data.startswith(magic):
            return Reason.UNSUPPORTED_FORMAT, words
    if _is_pcx(data):
        return Reason.UNSUPPORTED_FORMAT, "it is a PCX picture; convert it to PNG"
    head = data[:512].lstrip().lower()
    for magic, offset, reason, words in _KNOWN_SIGNATURES:
        if head[offset:].startswith(magic):
            return reason, words
    # A drawing may begin with an XML declaration, a comment or a doctype of its own.
    if head.startswith(b"<") and b"<svg" in head:
        return Reason.UNSUPPORTED_FORMAT, "it is an SVG drawing; convert it to PNG"
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")):
        return _DAMAGED_HEADER
    return Reason.NOT_AN_IMAGE, "its bytes are no image that we know"


_PCX_HEADER: Final = 128


def _is_pcx(data: bytes) -> bool:
    """Returns whether a file is PCX. Its signature is only four small bytes, so the header must fit too."""
    if len(data) < _PCX_HEADER or data[0] != 10 or data[1] not in (0, 2, 3, 4, 5) or data[2] > 1:
        return False
    left, top, right, bottom = struct.unpack_from("<4H", data, 4)
    planes, row = struct.unpack_from("<BH", data, 65)
    bits = data[3]
    fits = left <= right and top <= bottom and 8 * row >= (right - left + 1) * bits
    return bits in (1, 2, 4, 8) and 1 <= planes <= 4 and fits


_TOO_LARGE: Final = (
    Reason.TOO_MANY_PIXELS,
    f"decoding it takes more than {MAX_MEMORY // 2**20:,} MiB of memory, which is the limit",
)


# Decoding


class _Picture:
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
            raise UnreadableImage(*_TOO_LARGE)
        return needed

    def _decoding(self) -> int:
        """Returns the bytes that the decoder takes, with the pixels."""
        image = self.image
        pixels = image.width * image.height
        needed = pixels * (_stored_bytes(image.mode) + _DECODER_BYTES.get(image.format or "", 0))
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
    """Returns the bytes that `_resized` takes besides the picture."""
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


def _work_on_container(container: Container, task: _Task, hold: _Hold) -> _Made:
    if container.kind == "WEBP" and (
        container.width * container.height > MAX_PIXELS
        # The decoder of WebP allocates its memory on opening.
        or container.width * container.height * (4 + _DECODER_BYTES["WEBP"]) > MAX_MEMORY
    ):
        raise UnreadableImage(*_TOO_LARGE)
    try:
        return _work(_Picture(_open_container(container), container), task, hold)
    except UnreadableImage as error:
        if error.reason is not Reason.TRUNCATED or container.kind != "JPEG":
            raise
        made = _completed_jpeg_pixels(container, task, hold)
        if made is None:
            raise
        return made


def _completed_jpeg_pixels(container: Container, task: _Task, hold: _Hold) -> _Made | None:
    """Returns the pixels of a JPEG that lacks only its end mark; None where more is missing."""
    found: list[_Made] = []
    for data in containers.completed_jpeg(container.data) or ():
        completed = dataclasses.replace(container, data=data)
        with suppress(UnreadableImage):
            found.append(_work(_Picture(_open_container(completed), completed), task, hold))
    same = len(found) == _END_MARKS and all(np.array_equal(found[0][0], other[0]) for other in found)
    return found[0] if same else None


# The number of variants of `containers.completed_jpeg`.
_END_MARKS: Final = 3


@contextmanager
def _reasons() -> Iterator[None]:
    """Converts any error of a decoder into an UnreadableImage with a reason."""
    try:
        yield
    except (UnreadableImage, Interrupted):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(Reason.TOO_MANY_PIXELS, "it has too many pixels") from error
    except MemoryError as error:
        raise UnreadableImage(*_TOO_LARGE) from error
    except Exception as error:
        # A decoder may raise anything for malformed bytes; one bad file must never end a run.
        words = str(error).lower()
        if any(sign in words for sign in ("truncated", "end of file", "eof", "not enough", "incomplete")):
            raise UnreadableImage(*_TRUNCATED) from error
        raise UnreadableImage(Reason.DAMAGED, "its data are damaged") from error


def _work(picture: _Picture, task: _Task, hold: _Hold) -> _Made:
    with _reasons():
        make = {"square": _square, "thumbnail": _thumbnail, "glance": _glance}[task.what]
        return make(picture, task, hold)


def _square(picture: _Picture, task: _Task, hold: _Hold) -> _Made:
    width, height = picture.image.size
    side = max(1.0, task.crop * min(width, height))
    # Not the quotient of the sizes: 1597 pixels at 1/4 become 400, and 3/4 of the last one are padding.
    scale = _draft(picture, _DRAFT_MARGIN * task.size / side)
    box = (
        (width - side) / 2 * scale,
        (height - side) / 2 * scale,
        (width + side) / 2 * scale,
        (height + side) / 2 * scale,
    )
    size, resampling = (task.size, task.size), Image.Resampling.BILINEAR
    square = _coloured(picture, size, resampling, box, hold, colour=task.colour)
    # Rotation commutes with a central crop, and is cheaper on the small picture.
    return np.array(_upright(square, picture.orientation)), width, height


def _thumbnail(picture: _Picture, task: _Task, hold: _Hold) -> _Made:
    width, height = picture.image.size
    _draft(picture, _DRAFT_MARGIN * task.size / max(width, height))
    shrink = min(1.0, task.size / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    # HTML pages state no colour space, so a browser assumes sRGB.
    small = _coloured(picture, size, Image.Resampling.LANCZOS, None, hold, colour="srgb")
    return np.array(_upright(small, picture.orientation)), width, height


def _glance(picture: _Picture, task: _Task, hold: _Hold) -> _Made:
    width, height = picture.image.size
    _draft(picture, _DRAFT_MARGIN * task.size / min(width, height))
    with hold(picture.memory(task.size)):
        small = _resized(picture, (task.size, task.size), Image.Resampling.BILINEAR, None)
    if picture.orientation in _SWAPS_SIDES:
        width, height = height, width
    return np.array(_upright(small, picture.orientation)), width, height


def _coloured(
    picture: _Picture,
    size: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[float, float, float, float] | None,
    hold: _Hold,
    *,
    colour: Colour,
) -> Image.Image:
    """Returns what `_resized` returns, converted to sRGB if `colour` is "srgb"."""
    # The resized picture is converted: converting the whole picture first would cost many times as much.
    profile = (picture.profile or None) if colour == "srgb" else None
    keep_cmyk = profile is not None and picture.image.mode == "CMYK" and converts(profile, "CMYK")
    with hold(picture.memory(size[0])):
        small = _resized(picture, size, resampling, box, keep_cmyk=keep_cmyk)
    if profile is None:
        return small
    is_grey = picture.image.mode in _GREY_MODES
    return to_srgb(small.getchannel(0) if is_grey else small, profile)


# The modes to which a grey profile may apply.
_GREY_MODES: Final = ("1", "L", "La", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def _draft(picture: _Picture, least: float) -> float:
    """Sets a JPEG decoder to 1/2, 1/4 or 1/8 of the size, at least `least`, and returns the scale."""
    image = picture.image
    if not picture.is_file or image.format not in ("JPEG", "MPO") or least >= 1:
        return 1.0
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width * least), math.ceil(height * least)))
    return 1.0 if drafted is None else drafted[1][2] / width


def _resized(
    picture: _Picture,
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
    converted = _Conversion(picture)
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
_SWAPS_SIDES: Final = frozenset({5, 6, 7, 8})


def _orientation(image: Image.Image) -> int | None:
    """Returns the EXIF orientation; None where it is missing or unreadable."""
    try:
        return cast("int | None", image.getexif().get(0x0112))
    except Exception:
        # Cameras and editors write broken EXIF beside a good picture; the picture is used without rotation.
        return None


def _upright(picture: Image.Image, orientation: int | None) -> Image.Image:
    """Returns the picture rotated or flipped by an EXIF orientation."""
    turn = _TRANSPOSE_BY_ORIENTATION.get(orientation or 1)
    return picture if turn is None else picture.transpose(turn)


class _Conversion:
    """Converts any mode to RGB: transparency over white; 16 bits are scaled and never clipped.

    It is made for a whole picture and may be called with parts of it.
    """

    def __init__(self, picture: _Picture) -> None:
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
