"""Headers of JPEG, PNG and WebP files, for `pixels`: size, orientation, colour profile, bytes to decode.

Parts that affect no pixel (comments, thumbnails, dates, resolutions) are removed from the bytes that a
decoder gets, so that damage in them does no harm. The parsers read headers only, and stop at anything
unusual.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["JPEG", "PNG", "WEBP"]

# The most segments of a JPEG, or chunks of a PNG or WebP, that are parsed. 128 MiB of PNG in libpng's chunks
# of 8 KiB are 16,384 chunks, and a profile of a JPEG has at most 255 segments.
MAX_PARTS: Final = 50_000
# The largest profile in bytes. The largest in use, of printing presses, have 2 to 3 MiB.
MAX_PROFILE: Final = 4 * 2**20

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
# The valid lengths of a tRNS chunk in bytes, by colour type; types with an alpha channel have none.
_PNG_TRANSPARENCY: Final = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}
_PNG_TEXT: Final = (b"tEXt", b"zTXt", b"iTXt")
_XMP_KEYWORD: Final = b"XML:com.adobe.xmp"
_EXIF_KEYWORD: Final = b"Raw profile type exif"
# The largest text chunk in bytes that is decompressed for its orientation.
_MAX_TEXT: Final = 2**20

_EXIF: Final = b"Exif\0\0"
_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_ICC: Final = b"ICC_PROFILE\0"
_ORIENTATION: Final = 0x0112
_XMP_ORIENTATION: Final = re.compile(rb"tiff:Orientation(=\"|>)([0-9])")
# The integer types of TIFF that fit into a directory entry.
_INTEGERS: Final = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L"}

# Start of frame: Huffman or arithmetic coding, sequential or progressive.
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SOS: Final = 0xDA
_EOI: Final = b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class Container:
    """The parsed header of a file.

    Attributes:
        kind: the format.
        width, height: of the stored picture, before orientation, in pixels.
        data: the file without the parts that affect no pixel.
        orientation: from EXIF or XMP, 1 to 8; None without a valid one.
        profile: the ICC profile as stored, at most `MAX_PROFILE` bytes.
        pixel_bytes: bytes that Pillow stores for a pixel.
        scans: an upper bound of the scans of a JPEG.
        buffered: bytes of coefficients that a JPEG decoder holds until the last scan.
        animated: whether a WebP has frames.
    """

    kind: Kind
    width: int
    height: int
    data: bytes
    orientation: int | None = None
    profile: bytes | None = None
    pixel_bytes: int = 4
    scans: int = 1
    buffered: int = 0
    animated: bool = False


def parse(data: bytes) -> Container | None:
    """Returns the header of a JPEG, PNG or WebP file; None for other files and for anything unusual."""
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(_PNG_SIGNATURE):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        # The file ends within its header, or has too many parts.
        return None
    return None


def exif_orientation(exif: bytes) -> int | None:
    """Returns the orientation in the first directory of EXIF data, with or without the leading `Exif`."""
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    found = None
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for number in range(entries):
            tag, kind, count = struct.unpack_from(f"{order}HHL", exif, start + 2 + 12 * number)
            if tag == _ORIENTATION and count == 1 and kind in _INTEGERS:
                (found,) = struct.unpack_from(order + _INTEGERS[kind], exif, start + 10 + 12 * number)
    except struct.error:
        pass  # the directory is truncated: the entries before the end count
    return found


def _orientation(exif: bytes | None, xmp: bytes | None) -> int | None:
    found = None if exif is None else exif_orientation(exif)
    if found is None and xmp is not None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[2])
    return found if found is not None and 1 <= found <= 8 else None


# JPEG


@dataclass(slots=True)
class _JpegMetadata:
    exif: bytes | None = None
    xmp: bytes | None = None
    icc: list[bytes] = field(default_factory=list)

    def take(self, marker: int, body: bytes) -> bool:
        """Reads a segment; returns whether a decoder does not need it."""
        if marker == 0xE0:
            # JFIF defines the colour space, but libjpeg uses it only if the segment is long enough.
            return not body.startswith(b"JFIF\0") or len(body) < 14
        if marker == 0xE1 and body.startswith(_EXIF):
            self.exif = body if self.exif is None else self.exif + body[len(_EXIF) :]
        elif marker == 0xE1 and body.startswith(_XMP):
            self.xmp = body[len(_XMP) :]
        elif marker == 0xE2 and body.startswith(_ICC) and len(body) >= 14:
            self.icc.append(body)
        if marker == 0xEE:
            # Adobe's segment defines the colour space; libjpeg ignores a truncated one.
            return not body.startswith(b"Adobe") or len(body) < 12
        return 0xE1 <= marker <= 0xEF or marker == 0xFE

    def profile(self) -> bytes | None:
        parts = sorted(self.icc)
        if not parts or parts[0][13] != len(parts):
            return None
        found = b"".join(part[14:] for part in parts)
        return found if len(found) <= MAX_PROFILE else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment up to the first scan; stops at fill bytes between them."""
    start = 2
    for _ in range(MAX_PARTS):
        marker = data[start + 1]
        if data[start] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return
        (length,) = struct.unpack_from(">H", data, start + 2)
        end = start + 2 + length
        if length < 2 or end > len(data):
            return
        yield marker, start, end
        if marker == _SOS:
            return
        start = end


def _jpeg(data: bytes) -> Container | None:
    kept: list[bytes] = [data[:2]]
    metadata = _JpegMetadata()
    frame: bytes | None = None
    progressive = False
    for marker, start, end in _segments(data):
        if marker == _SOS:
            break
        if marker in _FRAMES:
            frame, progressive = data[start + 4 : end], marker in _PROGRESSIVE
        if not metadata.take(marker, data[start + 4 : end]):
            kept.append(data[start:end])
    else:
        return None
    if frame is None:
        return None
    height, width, layers = struct.unpack_from(">HHB", frame, 1)
    if layers not in (1, 3, 4) or not width or not height or len(frame) < 6 + 3 * layers:
        return None
    in_one_scan = data[start + 4] == layers
    return Container(
        "JPEG",
        width,
        height,
        data if sum(map(len, kept)) == start else b"".join([*kept, data[start:]]),
        orientation=_orientation(metadata.exif, metadata.xmp),
        profile=metadata.profile(),
        pixel_bytes=1 if layers == 1 else 4,
        # The data of a scan never contain these bytes.
        scans=data.count(b"\xff\xda", start),
        buffered=0 if in_one_scan and not progressive else _coefficients(frame, width, height),
    )


def _coefficients(frame: bytes, width: int, height: int) -> int:
    """Returns the bytes of the coefficients of all components, two bytes each."""
    sampling = [(frame[at] >> 4, frame[at] & 15) for at in range(7, 6 + 3 * frame[5], 3)]
    across, down = (max(1, *(pair[axis] for pair in sampling)) for axis in (0, 1))
    return sum(
        2 * (-(-width // (8 * across)) * 8 * h) * (-(-height // (8 * down)) * 8 * v) for h, v in sampling
    )


def completed_jpeg(data: bytes) -> tuple[bytes, ...] | None:
    """Returns three completions of a JPEG without its end mark; None if it has one or lacks a whole scan.

    The end mark follows the last byte directly, so that the decoder reads zeros, or follows one of two bit
    patterns. If all three decode to the same pixels, none of these bits was used: every pixel is present.
    """
    body = data[:-1] if data.endswith(b"\xff") else data
    last = body.rfind(b"\xff\xda")
    if last < 0 or body.find(_EOI, last) >= 0 or not _all_scans(body):
        return None
    noise = (b"", b"\xa5\x3c\x96\x5a\x69\xc3" * 20, b"\x5a\xc3\x29\x95\x16\x3c" * 20)
    return tuple(body + bits + _EOI for bits in noise)


def _all_scans(data: bytes) -> bool:
    """Returns whether the scans give each coefficient of each component to its last bit."""
    frame: bytes | None = None
    missing: dict[tuple[int, int], int] = {}
    for marker, body in _all_segments(data):
        if marker in _FRAMES:
            frame = body
            last = 64 if marker in _PROGRESSIVE else 1
            missing = {(body[at], k): -1 for at in range(6, 6 + 3 * body[5], 3) for k in range(last)}
        elif marker == _SOS and frame is not None:
            count = body[0]
            first, end, bits = body[1 + 2 * count : 4 + 2 * count]
            for at in range(1, 1 + 2 * count, 2):
                for k in range(first, end + 1):
                    if (body[at], k) in missing:
                        missing[body[at], k] = bits & 15
    return frame is not None and not any(missing.values())


def _all_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields marker and body of each segment of a JPEG, including those after scans."""
    start, parts = 2, 0
    try:
        while parts < MAX_PARTS and (start := data.find(b"\xff", start)) >= 0:
            marker = data[start + 1]
            if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:
                start += 1 if marker == 0xFF else 2
                parts += marker not in (0x00, 0xFF)
                continue
            (length,) = struct.unpack_from(">H", data, start + 2)
            yield marker, data[start + 4 : start + 2 + length]
            start += 2 + max(2, length)
            parts += 1
    except (struct.error, IndexError):
        return


# PNG


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, start and end of each complete chunk; stops after IEND, and before a truncated chunk.

    Raises:
        IndexError: there are too many chunks.
    """
    start = len(_PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        if start + 12 > len(data):
            return
        (length,) = struct.unpack_from(">L", data, start)
        name, end = data[start + 4 : start + 8], start + 12 + length
        if end > len(data) or not name.isalpha():
            return
        yield name, start, end
        if name == b"IEND":
            return
        start = end
    raise IndexError("too many chunks")


def _png(data: bytes) -> Container | None:
    if data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, depth, colour = struct.unpack_from(">LLBB", data, 16)
    if not width or not height:
        return None
    kept, metadata, left_out, done = [data[: len(_PNG_SIGNATURE)]], _PngMetadata(), 0, len(_PNG_SIGNATURE)
    for name, start, end in _chunks(data):
        # Bit 5 of the name marks a chunk as ancillary: the picture can be shown without it.
        if name[0] & 0x20 and not _affects_pixels(name, end - start - 12, colour):
            metadata.take(name, data, start, end)
            left_out += end - start
        else:
            kept.append(data[start:end])
        done = end
    kept.append(data[done:])
    return Container(
        "PNG",
        width,
        height,
        b"".join(kept) if left_out else data,
        orientation=_orientation(metadata.exif or metadata.raw_exif, metadata.xmp),
        profile=metadata.profile,
        pixel_bytes=4 if colour in (2, 4, 6) else 2 if depth == 16 else 1,
    )


def _affects_pixels(name: bytes, length: int, colour: int) -> bool:
    """Returns whether an ancillary chunk affects pixels; libpng ignores a tRNS chunk of another length."""
    return name == b"tRNS" and length in _PNG_TRANSPARENCY.get(colour, ())


@dataclass(slots=True)
class _PngMetadata:
    exif: bytes | None = None
    raw_exif: bytes | None = None
    xmp: bytes | None = None
    profile: bytes | None = None

    def take(self, name: bytes, data: bytes, start: int, end: int) -> None:
        """Reads a chunk of a known kind with a valid checksum; ignores others."""
        if name not in (b"eXIf", b"iCCP", *_PNG_TEXT) or end - start > MAX_PROFILE:
            return
        body = data[start + 8 : end - 4]
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return
        if name == b"eXIf":
            self.exif = body
        elif name == b"iCCP":
            self.profile = _decompress(body.partition(b"\0")[2], MAX_PROFILE)
        elif body.startswith((_XMP_KEYWORD + b"\0", _EXIF_KEYWORD + b"\0")):
            self._take_text(name, body)

    def _take_text(self, name: bytes, body: bytes) -> None:
        keyword, _, text = body.partition(b"\0")
        if name == b"iTXt":
            compressed, text = text[:1] == b"\1", text[1:]
            method, rest = text[:1], text[1:].split(b"\0", 2)[-1]
            text = (_decompress(method + rest, _MAX_TEXT) or b"") if compressed else rest
        elif name == b"zTXt":
            text = _decompress(text, _MAX_TEXT) or b""
        if keyword == _XMP_KEYWORD:
            self.xmp = text
        else:
            try:
                self.raw_exif = bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
            except ValueError:
                self.raw_exif = None


def _decompress(packed: bytes, most: int) -> bytes | None:
    """Decompresses zlib data after a method byte, which must be 0; None if damaged or over `most` bytes."""
    if packed[:1] != b"\0":
        return None
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(packed[1:], most + 1)
    except zlib.error:
        return None
    return found if found and len(found) <= most and unpacker.eof else None


# WebP


def _webp(data: bytes) -> Container | None:
    size = _webp_size(data)
    if size is None:
        return None
    exif = xmp = profile = None
    extended = data[12:16] == b"VP8X"
    if extended:
        start = 12
        for _ in range(MAX_PARTS):
            if start + 8 > len(data):
                break
            name, (length,) = data[start : start + 4], struct.unpack_from("<L", data, start + 4)
            body = slice(start + 8, start + 8 + length)
            if name == b"EXIF" and exif is None:
                exif = data[body]
            elif name == b"XMP " and xmp is None:
                xmp = data[body]
            elif name == b"ICCP" and profile is None and length <= MAX_PROFILE:
                profile = data[body]
            start += 8 + length + length % 2
    return Container(
        "WEBP",
        *size,
        data,
        orientation=_orientation(exif, xmp),
        profile=profile,
        animated=extended and bool(data[20] & 2),
    )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<L", data, 21)
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    return None
