"""The formats of pictures: which files are opened, by their bytes, and why others are not."""

import io
import struct
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final

from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from retrieval.errors import Reason, UnreadableImage
from retrieval.images.containers import Container

# Pixels after a JPEG's reduction to 1/2, 1/4 or 1/8. Just above, Pillow warns of decompression bombs.
MAX_PIXELS: Final = 89_000_000
# Bytes for decoding and converting a photo, besides its file.
MAX_MEMORY: Final = 2**30

# The formats of cameras, phones and web pages. Pillow reads more, among them formats that start other
# programs (EPS) and formats that are not used for photographs.
_FORMATS: Final = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_HEIF: Final = "HEIF"

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
TOO_LARGE: Final = (
    Reason.TOO_MANY_PIXELS,
    f"decoding it takes more than {MAX_MEMORY // 2**20:,} MiB of memory, which is the limit",
)
TRUNCATED: Final = (Reason.TRUNCATED, "the file ends before the picture does")
_DAMAGED_HEADER: Final = (Reason.DAMAGED, "its header is damaged")


def may_be_picture(data: bytes) -> bool:
    """Returns whether the first bytes are those of a supported format."""
    start = data[:16]
    if _is_heif(data):
        return find_spec("pillow_heif") is not None
    accepts = (Image.OPEN[name][1] for name in _known_formats())
    return any(accept is None or accept(start) is True for accept in accepts)


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS


def open_untrusted(data: bytes) -> Image.Image:
    """Opens a file of any format. Only for a process that may be killed: some headers take hours to read."""
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
    except UnidentifiedImageError as error:
        # Do not advise to install the extra where it is installed.
        heif = _is_heif(data) and find_spec("pillow_heif")
        found = (Reason.DAMAGED, "its header is damaged") if heif else reason_not_opened(data)
        raise UnreadableImage(*found) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(Reason.TOO_MANY_PIXELS, "it has too many pixels") from error
    except MemoryError as error:
        raise UnreadableImage(*TOO_LARGE) from error
    except Exception as error:
        # Pillow's plugins raise struct, index, value and zlib errors for malformed headers.
        raise UnreadableImage(*_cut_or_damaged(data)) from error
    return image


def open_container(container: Container) -> Image.Image:
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
        raise UnreadableImage(*reason_not_opened(container.data)) from error
    except Exception as error:
        raise UnreadableImage(*_cut_or_damaged(container.data)) from error


def _cut_or_damaged(data: bytes) -> tuple[Reason, str]:
    # A WebP states its length, and does not open at all if it is shorter.
    is_cut = data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") > len(data) - 8
    return TRUNCATED if is_cut else _DAMAGED_HEADER


def _known_formats() -> tuple[str, ...]:
    """Returns the supported formats that this build of Pillow has (AVIF and JPEG 2000 are optional)."""
    Image.init()
    return tuple(name for name in (*_FORMATS, _HEIF) if name in Image.OPEN)


def reason_not_opened(data: bytes) -> tuple[Reason, str]:
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
