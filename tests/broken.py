"""Twenty kinds of files that occur among photographs and cannot be read as one."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from retrieval.errors import Reason

_NOBODY_UID = 65534
# With the extra for HEIC, noise after the magic bytes is detected as damage.
_HEIC = Reason.DAMAGED if find_spec("pillow_heif") else Reason.UNSUPPORTED_FORMAT


def make_broken(folder: Path) -> dict[str, Reason]:
    """Writes the twenty files into a folder, which is created if needed.

    Returns:
        For each file name, the reason why it cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, (data, reason) in _files().items():
        (folder / name).write_bytes(data)
        expected[name] = reason
    (folder / "gone.jpg").symlink_to("moved to another disk.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return expected | {"gone.jpg": Reason.MISSING, "pipe.jpg": Reason.NOT_A_FILE}


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Denies access to `path` for the length of a with statement, also when run as the superuser."""
    mode = path.stat().st_mode
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY_UID)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


def _files() -> dict[str, tuple[bytes, Reason]]:
    noise = np.random.default_rng(20).bytes(3000)
    jpeg, png, webp, gif = (_picture(name) for name in ("JPEG", "PNG", "WEBP", "GIF"))
    return {
        "empty.jpg": (b"", Reason.EMPTY_FILE),
        "web page.jpg": (b"\n<!DOCTYPE html>\n<html><img src='face.jpg'></html>\n", Reason.NOT_AN_IMAGE),
        "notes.txt": ("Zoë stands on the left.\n".encode(), Reason.NOT_AN_IMAGE),
        "paper.pdf": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n", Reason.NOT_AN_IMAGE),
        "film.mp4": (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + noise, Reason.NOT_AN_IMAGE),
        "noise.jpg": (noise, Reason.NOT_AN_IMAGE),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + noise, _HEIC),
        "drawing.svg": (
            b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>\n',
            Reason.UNSUPPORTED_FORMAT,
        ),
        "half.jpg": (jpeg[: len(jpeg) // 2], Reason.TRUNCATED),
        "half.png": (png[: len(png) // 2], Reason.TRUNCATED),
        "half.webp": (webp[: len(webp) // 2], Reason.TRUNCATED),
        "half.gif": (gif[: len(gif) // 2], Reason.TRUNCATED),
        "header alone.bmp": (_picture("BMP")[:54], Reason.TRUNCATED),
        "marker alone.jpg": (b"\xff\xd8", Reason.DAMAGED),
        "header and noise.jpg": (jpeg[:20] + noise, Reason.DAMAGED),
        "spoiled.png": (_spoiled(png, png.index(b"IDAT") + 40), Reason.DAMAGED),
        # The directory of a TIFF may be anywhere in the file; this one is beyond the end.
        "spoiled.tiff": (b"II*\0" + struct.pack("<I", 5000) + noise, Reason.DAMAGED),
        "bomb.png": (_bomb(60_000, 60_000), Reason.TOO_MANY_PIXELS),
    }


def _picture(file_format: str) -> bytes:
    """Encodes a noise image: in every format, half of its bytes are about half of the image."""
    levels = np.random.default_rng(21).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, file_format)
    return file.getvalue()


def _spoiled(data: bytes, start: int) -> bytes:
    return data[:start] + bytes(byte ^ 0xFF for byte in data[start : start + 64]) + data[start + 64 :]


def _bomb(width: int, height: int) -> bytes:
    """Makes a PNG of a few hundred bytes with a header that declares more pixels than fit into memory."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
