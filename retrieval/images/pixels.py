"""From an image file to pixels: decodes, rotates, crops, aligns and resizes.

The memory and the time of a photo are limited, whatever its file states. The memory is known from the header
before decoding, and all threads share one budget of it. The calling thread decodes JPEG, PNG and WebP files
with headers that bound the time as well. A separate process decodes all others, and is killed at the time
limit (`retrieval.system.isolation`).
"""

import dataclasses
import errno
import hashlib
import math
import os
import resource
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.errors import InputError, Reason, UnreadableImage
from retrieval.images import containers
from retrieval.images.alignment import composed, inverse, magnification, upright_to_stored, warped_part
from retrieval.images.containers import Container
from retrieval.images.detection import VIEW_PIXELS
from retrieval.images.formats import (
    MAX_MEMORY,
    MAX_PIXELS,
    TOO_LARGE,
    may_be_picture,
    open_untrusted,
    reason_not_opened,
)
from retrieval.images.picture import (
    DECODER_BYTES,
    SWAPS_SIDES,
    Colour,
    Conversion,
    Hold,
    Picture,
    Pixels,
    decoder_errors,
    draft,
    resized,
    resized_in_colour,
    upright,
)
from retrieval.system import isolation
from retrieval.system.files import Stamp
from retrieval.system.memory_budget import ByteBudget

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

MAX_BYTES: Final = 128 * 2**20
# Seconds for decoding a photo in a separate process. The slowest picture within the other limits, a JPEG 2000
# of 89 million pixels, takes 15 s.
MAX_SECONDS: Final = 60.0

# The memory for decoding and converting that all threads of this process share.
MEMORY: Final = ByteBudget(MAX_MEMORY)


# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if the reduced crop is still at least this many times
# the requested size. `tests/images/test_pixels.py` states the error.
_DRAFT_MARGIN: Final = 2

# The limits of files that a thread decodes itself: none within them takes longer than 1 s, or 80 MiB.
_LIGHT_BYTES: Final = 16 * 2**20
_LIGHT_PIXELS: Final = {"JPEG": 16_000_000, "PNG": 16_000_000, "WEBP": 4_000_000}
# The most pixels times scans of a JPEG: each scan passes over all pixels before the reduction.
_LIGHT_SCANNED_PIXELS: Final = 100_000_000


_PROGRAM: Final = "import sys; from retrieval.images.pixels import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True, slots=True)
class _Task:
    """The requested result: a square for a network, aligned faces, a thumbnail, or a glance.

    Attributes:
        locate: for aligned faces; a separate process asks its caller instead.
    """

    what: Literal["square", "aligned", "thumbnail", "glance"]
    size: int
    crop: float = 1.0
    colour: Colour = "ignore"
    locate: "Locate | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A picture for a face detector.

    Attributes:
        pixels: uint8 (h, w, 3), RGB, upright, with at most `VIEW_PIXELS`.
        width, height: of the whole picture, upright, in pixels.
    """

    pixels: Pixels
    width: int
    height: int

    @property
    def to_photo(self) -> NDArray[np.float64]:
        """The matrix (2, 3) from points of the view to points of the whole picture."""
        height, width = self.pixels.shape[:2]
        return np.array([[self.width / width, 0, 0], [0, self.height / height, 0]])


# Returns a matrix (2, 3) for each face to align, from points of the upright picture to points of the aligned
# face, in pixels.
Locate: TypeAlias = Callable[[View], Sequence[NDArray[np.float64]]]

# Pixels uint8 (H, W, 3), or (n, size, size, 3) of n aligned faces, and the upright width and height of the
# whole picture.
_Made: TypeAlias = tuple[Pixels, int, int]


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


def align(
    source: ImageSource, *, size: int, locate: Locate, colour: Colour = "ignore", seconds: float = MAX_SECONDS
) -> Pixels:
    """Returns the aligned faces of a picture.

    The picture is decoded once, or twice if it is a large JPEG with a face that is small in it: at 1/2, 1/4
    or 1/8 of its size for the detector, and again at the size that the face needs. A face that shrinks is
    resized with an antialiased filter before it is turned. Pixels beyond the border are black.

    Args:
        source: as in `read`.
        size: side of an aligned face in pixels.
        locate: finds the faces; an UnreadableImage that it raises is passed on.
        colour, seconds: as in `read`.

    Returns:
        uint8 (n, size, size, 3), RGB, in the order of the matrices of `locate`.

    Raises:
        UnreadableImage, InputError, RunError, Interrupted: as `read`.
    """
    return _made(source, _Task("aligned", size, colour=colour, locate=locate), seconds)[0]


def thumbnail(source: ImageSource, *, side: int, seconds: float = MAX_SECONDS) -> Image.Image:
    """Returns the whole picture for display, upright, at most `side` pixels wide and high.

    The result is RGB in sRGB; a damaged or unknown profile is ignored.

    Raises:
        UnreadableImage, RunError, Interrupted: as `read`.
    """
    return sized_thumbnail(source, side=side, seconds=seconds)[0]


def sized_thumbnail(
    source: ImageSource, *, side: int, seconds: float = MAX_SECONDS
) -> tuple[Image.Image, tuple[int, int]]:
    """Returns what `thumbnail` returns, and the width and height of the whole upright picture in pixels.

    Raises:
        UnreadableImage, RunError, Interrupted: as `read`.
    """
    small, width, height = _made(source, _Task("thumbnail", side), seconds)
    return Image.fromarray(small), (width, height)


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


def is_light(data: bytes, *, size: int, crop: float = 1.0, aligned: bool = False) -> bool:
    """Returns whether `read`, or `align`, certainly takes less than 1 s and 80 MiB for a file."""
    container = containers.parse(data)
    task = _Task("aligned" if aligned else "square", size, crop)
    return container is not None and _is_light(container, task)


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
    picture = Picture.of_image(_in_memory(source))
    with decoder_errors():
        # Palette, transparency and orientation all count, as they do in what `read` gives.
        image = upright(Conversion(picture)(picture.loaded()), picture.orientation)
    return hashlib.sha256(f"{image.width} {image.height}\n".encode() + image.tobytes()).hexdigest()


def _made(source: ImageSource, task: _Task, seconds: float) -> _Made:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    try:
        if isinstance(source, Image.Image | np.ndarray):
            return _work(Picture.of_image(_in_memory(source)), task, MEMORY.holding)
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
    if container is None and not may_be_picture(data):
        raise UnreadableImage(*reason_not_opened(data))
    return _in_process(data, task, seconds)


def _is_light(container: Container, task: _Task) -> bool:
    pixels = container.width * container.height
    scale = 1
    if container.kind == "JPEG" and task.what != "aligned":
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
    refused: UnreadableImage | None = None
    try:
        with isolation.process(_PROGRAM) as process:
            started = time.monotonic()
            process.send((dataclasses.replace(task, locate=None), data))
            reply = process.receive(seconds)
            while isinstance(reply, int):
                with MEMORY.holding(reply):
                    process.send(None)
                    reply = process.receive(seconds - (time.monotonic() - started))
                    if isinstance(reply, View):
                        refused, found = _located(task, reply)
                        process.send(found)
                        reply = process.receive(seconds - (time.monotonic() - started))
    except isolation.TooSlow as error:
        raise UnreadableImage(
            Reason.TOO_SLOW, f"decoding it takes longer than {seconds:g} seconds, which is the limit"
        ) from error
    except isolation.Crashed as error:
        raise UnreadableImage(Reason.DAMAGED, "its decoder crashes over it") from error
    # Raised only now: an error within the with statement would kill the process.
    if refused is not None:
        raise refused
    if isinstance(reply[0], Reason):
        raise UnreadableImage(*reply)
    return cast(_Made, reply)


def _located(task: _Task, view: View) -> tuple[UnreadableImage | None, list[NDArray[np.float64]]]:
    """Returns the matrices of the faces in a view, or the error of `locate`."""
    assert task.locate is not None  # only aligned faces take a view
    try:
        return None, list(task.locate(view))
    except UnreadableImage as error:
        return error, []


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

    def locate(view: View) -> list[NDArray[np.float64]]:
        caller.send(view)
        found: list[NDArray[np.float64]] = caller.receive()
        return found

    @contextmanager
    def asking(number: int) -> Iterator[None]:
        caller.send(number)
        caller.receive()
        yield

    task = dataclasses.replace(task, locate=locate)
    try:
        container = containers.parse(data)
        if container is not None:
            answer: object = _work_on_container(container, task, asking)
        else:
            answer = _work(Picture.of_file(open_untrusted(data)), task, asking)
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


def _work_on_container(container: Container, task: _Task, hold: Hold) -> _Made:
    if container.kind == "WEBP" and (
        container.width * container.height > MAX_PIXELS
        # The decoder of WebP allocates its memory on opening.
        or container.width * container.height * (4 + DECODER_BYTES["WEBP"]) > MAX_MEMORY
    ):
        raise UnreadableImage(*TOO_LARGE)
    try:
        return _work(Picture.of_container(container), task, hold)
    except UnreadableImage as error:
        if error.reason is not Reason.TRUNCATED or container.kind != "JPEG":
            raise
        made = _completed_jpeg_pixels(container, task, hold)
        if made is None:
            raise
        return made


def _completed_jpeg_pixels(container: Container, task: _Task, hold: Hold) -> _Made | None:
    """Returns the pixels of a JPEG that lacks only its end mark; None where more is missing."""
    found: list[_Made] = []
    for data in containers.completed_jpeg(container.data) or ():
        completed = dataclasses.replace(container, data=data)
        with suppress(UnreadableImage):
            found.append(_work(Picture.of_container(completed), task, hold))
    same = len(found) == _END_MARKS and all(np.array_equal(found[0][0], other[0]) for other in found)
    return found[0] if same else None


# The number of variants of `containers.completed_jpeg`.
_END_MARKS: Final = 3


def _work(picture: Picture, task: _Task, hold: Hold) -> _Made:
    with decoder_errors():
        make = {"square": _square, "aligned": _aligned, "thumbnail": _thumbnail, "glance": _glance}[task.what]
        return make(picture, task, hold)


def _square(picture: Picture, task: _Task, hold: Hold) -> _Made:
    width, height = picture.image.size
    side = max(1.0, task.crop * min(width, height))
    # Not the quotient of the sizes: 1597 pixels at 1/4 become 400, and 3/4 of the last one are padding.
    scale = draft(picture, _DRAFT_MARGIN * task.size / side)
    box = (
        (width - side) / 2 * scale,
        (height - side) / 2 * scale,
        (width + side) / 2 * scale,
        (height + side) / 2 * scale,
    )
    size, resampling = (task.size, task.size), Image.Resampling.BILINEAR
    square = resized_in_colour(picture, size, resampling, box, hold, colour=task.colour)
    # Rotation commutes with a central crop, and is cheaper on the small picture.
    return np.array(upright(square, picture.orientation)), width, height


def _aligned(picture: Picture, task: _Task, hold: Hold) -> _Made:
    assert task.locate is not None  # only a task of another kind has none
    stored = picture.image.size
    shrink = min(1.0, math.sqrt(VIEW_PIXELS / (stored[0] * stored[1])))
    scale = draft(picture, shrink) if picture.container is not None else 1.0
    size = max(1, round(stored[0] * shrink)), max(1, round(stored[1] * shrink))
    # One hold as long as the picture is decoded.
    with hold(picture.memory(max(size[0], task.size))):
        box = (0.0, 0.0, stored[0] * scale, stored[1] * scale)
        small = resized_in_colour(
            picture, size, Image.Resampling.BILINEAR, box, _without_hold, colour=task.colour
        )
        # Only now: Pillow turns a TIFF when it is decoded, and then states no orientation.
        width, height = stored[::-1] if picture.orientation in SWAPS_SIDES else stored
        view = View(np.array(upright(small, picture.orientation)), width, height)
        matrices = task.locate(view)
        # Pixels of the whole picture for each pixel of the face that needs most of them.
        step = min((1 / magnification(one) for one in matrices), default=math.inf)
        if scale == 1 or scale * step >= _DRAFT_MARGIN:
            return _warped(picture, matrices, scale, stored, task), width, height
    assert picture.container is not None  # only its pictures are drafted
    picture = Picture.of_container(picture.container)
    scale = draft(picture, min(_DRAFT_MARGIN / step, _largest_scale(stored)))
    with hold(picture.memory(task.size)):
        return _warped(picture, matrices, scale, stored, task), width, height


def _largest_scale(size: tuple[int, int]) -> float:
    """Returns the largest scale of a draft, 1 to 1/8, that has at most `MAX_PIXELS`."""
    scales = (1.0, 0.5, 0.25)
    return next((one for one in scales if one**2 * size[0] * size[1] <= MAX_PIXELS), 0.125)


def _warped(
    picture: Picture,
    matrices: Sequence[NDArray[np.float64]],
    scale: float,
    stored: tuple[int, int],
    task: _Task,
) -> Pixels:
    """Returns the aligned faces, uint8 (n, size, size, 3).

    Args:
        picture: may be drafted.
        matrices: from points of the upright picture to points of the faces.
        scale: of the draft.
        stored: width and height of the stored picture, without the draft.
        task: the size and the colours of the faces.
    """
    to_stored = upright_to_stored(picture.orientation, *stored)
    faces = np.empty((len(matrices), task.size, task.size, 3), np.uint8)
    for face, matrix in zip(faces, matrices, strict=True):
        face[:] = _warped_face(picture, scale * composed(to_stored, inverse(matrix)), task)
    return faces


@contextmanager
def _without_hold(_bytes: int) -> Iterator[None]:
    """Holds nothing: for steps of a task that holds the memory of all of them."""
    yield


def _warped_face(picture: Picture, back: NDArray[np.float64], task: _Task) -> Pixels:
    """Returns a face, uint8 (size, size, 3); `back` maps its points to points of the drafted picture."""
    part = warped_part(back, task.size, picture.image.size)
    if part is None:
        return np.zeros((task.size, task.size, 3), np.uint8)
    shrunk = resized_in_colour(
        picture, part.size, Image.Resampling.BILINEAR, part.box, _without_hold, colour=task.colour
    )
    return part.warped(shrunk)


def _thumbnail(picture: Picture, task: _Task, hold: Hold) -> _Made:
    width, height = picture.image.size
    draft(picture, _DRAFT_MARGIN * task.size / max(width, height))
    shrink = min(1.0, task.size / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    # HTML pages state no colour space, so a browser assumes sRGB.
    small = resized_in_colour(picture, size, Image.Resampling.LANCZOS, None, hold, colour="srgb")
    if picture.orientation in SWAPS_SIDES:
        width, height = height, width
    return np.array(upright(small, picture.orientation)), width, height


def _glance(picture: Picture, task: _Task, hold: Hold) -> _Made:
    width, height = picture.image.size
    draft(picture, _DRAFT_MARGIN * task.size / min(width, height))
    with hold(picture.memory(task.size)):
        small = resized(picture, (task.size, task.size), Image.Resampling.BILINEAR, None)
    if picture.orientation in SWAPS_SIDES:
        width, height = height, width
    return np.array(upright(small, picture.orientation)), width, height
