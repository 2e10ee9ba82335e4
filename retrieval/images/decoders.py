"""Decoders: threads, or processes that write pixels into shared memory.

Processes are for machines whose GPU is quicker than threads decode: a thread holds the interpreter's lock
for 0.4 of the time that a small JPEG takes (`benchmarks/decoding.py`): more than three wait for each other.

A process is a program of its own, not one of `multiprocessing`: it imports numpy and Pillow and never the
caller's main module, and it is in a session of its own, so that Ctrl-C in a terminal does not reach it. It
ends when its pipe does, which the caller's death sees to, however the caller dies. The memory has no name, so
nothing of it can be left behind.
"""

import mmap
import os
import signal
import socket
import subprocess
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import Empty, LifoQueue, SimpleQueue
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from retrieval.errors import InputError, Interrupted, Reason, RunError, UnreadableImage
from retrieval.images import pixels
from retrieval.images.pixels import MAX_SECONDS, Colour, Pixels
from retrieval.system import cancellation, isolation
from retrieval.system.cpu import usable_cores
from retrieval.system.files import why

Content: TypeAlias = bytes | Image | NDArray[np.uint8]

# Photos that a slot of the shared memory has room for.
SLOT: Final = 32

# With fewer cores, threads decode as quickly as processes.
_MIN_CORES: Final = 4

# How long a process may take to end once its pipe is closed: it finishes what it decodes.
_CLOSE_SECONDS: Final = 10.0

_PROGRAM: Final = "import sys; from retrieval.images.decoders import serve; serve(*map(int, sys.argv[1:]))"

# What is said of a photo whose decoding may take long: it is left to `pixels.read` in the thread that asked,
# which shares one budget of memory with the others, and has a process of its own that can be killed.
_HEAVY: Final = "heavy"

# How often a process that decodes is left for a look at whether the run is to stop, in seconds.
_POLL_SECONDS: Final = 0.1

# For each photo why it has no pixels: a reason and its detail, or that it is heavy; None where it has.
_Reply: TypeAlias = list[tuple[Reason, str] | str | None]


class Decode(Protocol):
    """Decodes photos: for each its pixels, uint8 (size, size, 3), or why it has none.

    Raises:
        Interrupted: Ctrl-C has asked the run to stop.
    """

    def __call__(
        self, contents: Sequence[Content], *, size: int, crop: float, colour: Colour = "ignore"
    ) -> list[Pixels | UnreadableImage]: ...


def decode_here(
    contents: Sequence[Content],
    *,
    size: int,
    crop: float,
    colour: Colour = "ignore",
    seconds: float = MAX_SECONDS,
) -> list[Pixels | UnreadableImage]:
    """See `Decode`; in the caller's thread, or for as many seconds as `pixels.read` says."""
    return [_decoded(content, size, crop, colour, seconds) for content in contents]


def _decoded(
    content: Content, size: int, crop: float, colour: Colour, seconds: float
) -> Pixels | UnreadableImage:
    cancellation.check_cancelled()
    try:
        return pixels.read(content, size=size, crop=crop, colour=colour, seconds=seconds)
    except UnreadableImage as error:
        return error


def processes_for(asked: int | None, *, beside_gpu: bool) -> int:
    """How many processes decode; 0 is none, threads do.

    Args:
        asked: how many, or None: one for each core beside a GPU when there are more than 3 cores, else none.
        beside_gpu: whether photos are embedded on a GPU.

    Raises:
        InputError: a negative number.
    """
    if asked is not None:
        if asked < 0:
            raise InputError("The number of decoders must be at least 0; 0 decodes in threads.")
        return asked
    cores = usable_cores()
    return cores if beside_gpu and cores >= _MIN_CORES else 0


class Decoders:
    """Processes that decode. See `Decode`; may be called by several threads at once. A context manager.

    A process starts when it is needed first. There are `processes + ahead` slots of 32 photos, of
    32 x size x size x 3 bytes each. Pixels that are returned lie in a slot as long as somebody has one of
    them, or, when `ahead` slots are lent already, in memory of their own: nobody ever waits for a slot.

    Photos that may take long or much memory are decoded as `decode_here` does.
    """

    def __init__(self, processes: int, *, size: int, ahead: int, seconds: float = MAX_SECONDS) -> None:
        """Makes room, and starts nothing yet.

        Args:
            processes: how many, at least 1.
            size: side of the pictures; those of another size are decoded in the caller's thread.
            ahead: slots that may be lent.
            seconds: as of `pixels.read`.
        """
        self._size = size
        self._seconds = seconds
        self._slots = processes + ahead
        self._file = isolation.nameless_file(self._slots * SLOT * size * size * 3)
        self._memory = mmap.mmap(self._file, 0)
        self._free: SimpleQueue[int] = SimpleQueue()
        self._lendable: SimpleQueue[None] = SimpleQueue()
        self._idle: LifoQueue[_Process] = LifoQueue()
        for slot in range(self._slots):
            self._free.put(slot)
        for _ in range(ahead):
            self._lendable.put(None)
        self._processes = [_Process() for _ in range(processes)]
        for process in reversed(self._processes):
            self._idle.put(process)

    def __call__(
        self, contents: Sequence[Content], *, size: int, crop: float, colour: Colour = "ignore"
    ) -> list[Pixels | UnreadableImage]:
        """See `Decode`.

        Raises:
            RunError: a process was killed, or its decoder crashed.
        """
        found = [
            _decoded(one, size, crop, colour, self._seconds) if self._is_for_here(one, size) else None
            for one in contents
        ]
        files = [one for one in contents if isinstance(one, bytes) and not self._is_for_here(one, size)]
        there = (
            one
            for start in range(0, len(files), SLOT)
            for one in self._decode_slot(files[start : start + SLOT], crop, colour)
        )
        return [next(there) if one is None else one for one in found]

    def close(self) -> None:
        """Ends the processes. Pixels that somebody has stay good."""
        for process in self._processes:
            process.close()
        os.close(self._file)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_for_here(self, content: Content, size: int) -> bool:
        return not isinstance(content, bytes) or size != self._size

    def _decode_slot(
        self, files: Sequence[bytes], crop: float, colour: Colour
    ) -> list[Pixels | UnreadableImage]:
        with self._process() as process:
            slot = self._free.get()
            try:
                reply = process.ask((slot, crop, colour, files))
            except BaseException:
                self._free.put(slot)
                raise
            squares = self._taken(slot, len(files))
        return [
            square
            if bad is None
            else _decoded(file, self._size, crop, colour, self._seconds)
            if isinstance(bad, str)
            else UnreadableImage(*bad)
            for file, square, bad in zip(files, squares, reply, strict=True)
        ]

    @contextmanager
    def _process(self) -> "Iterator[_Process]":
        process = self._idle.get()
        try:
            process.start(self._file, self._slots, self._size)
            yield process
        except Interrupted:
            # It is in the middle of something; nobody asks it again.
            process.kill()
            raise
        finally:
            self._idle.put(process)

    def _taken(self, slot: int, count: int) -> Pixels:
        """The pixels in a slot, which is free again when nobody has any of them."""
        squares = _place(self._memory, slot, self._size)
        try:
            self._lendable.get_nowait()
        except Empty:
            copied = squares[:count].copy()
            self._free.put(slot)
            return copied
        # Every view of it, such as one photo of a batch, keeps this array.
        weakref.finalize(squares, self._give_back, slot).atexit = False
        return squares[:count]

    def _give_back(self, slot: int) -> None:
        # Runs wherever the last of the pixels goes; a SimpleQueue bears that.
        self._free.put(slot)
        self._lendable.put(None)


class _Process:
    """One process, and this side of its pipe."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None

    def start(self, file: int, slots: int, size: int) -> None:
        """Starts it; a second time does nothing.

        Raises:
            RunError: the system refused.
        """
        if self._popen is not None:
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pipe = theirs.fileno()
            try:
                self._popen = isolation.start(_PROGRAM, pipe, file, slots, size, descriptors=(pipe, file))
            except OSError as error:
                raise RunError(
                    f"A process that decodes photos cannot be started ({why(error)}); use `decoders=0`."
                ) from error
            self._pipe = Connection(ours.detach())

    def ask(self, question: object) -> _Reply:
        assert self._pipe is not None  # it was started
        try:
            self._pipe.send(question)
            while not self._pipe.poll(_POLL_SECONDS):
                cancellation.check_cancelled()
            reply: _Reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RunError(
                "A process that decodes photos has ended; what was enrolled is kept, run the command again, "
                "or with `decoders=0` if it happens again."
            ) from error
        return reply

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._popen is not None:
            isolation.end(self._popen, _CLOSE_SECONDS)


def _place(memory: mmap.mmap, slot: int, size: int) -> Pixels:
    shape = (SLOT, size, size, 3)
    return np.ndarray(shape, np.uint8, memory, offset=slot * SLOT * size * size * 3)


def serve(pipe: int, file: int, slots: int, size: int) -> None:
    """The program of a process: decodes what it is sent until the other side has gone.

    Args:
        pipe, file: file descriptors, of the pipe and of the memory.
        slots, size: how many slots the memory has, and the side of the pictures in it.
    """
    # A service manager stops every process of a service at once, and the batch underway is to be finished.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    # As in the command: what matters of an odd file is in the answer.
    warnings.filterwarnings("ignore", module="PIL")
    memory = mmap.mmap(file, slots * SLOT * size * size * 3)
    questions: Connection[Any, Any] = Connection(pipe)
    with suppress(EOFError, OSError):
        while True:
            slot, crop, colour, files = questions.recv()
            questions.send(_decode_into(_place(memory, slot, size), files, crop, colour))
            del files  # or they would be kept until there are others


def _decode_into(place: Pixels, files: Sequence[bytes], crop: float, colour: Colour) -> _Reply:
    reply: _Reply = []
    for row, content in enumerate(files):
        try:
            if not pixels.is_light(content, size=place.shape[1], crop=crop):
                reply.append(_HEAVY)
                continue
            place[row] = pixels.read(content, size=place.shape[1], crop=crop, colour=colour)
            reply.append(None)
        except UnreadableImage as error:
            reply.append((error.reason, error.detail))
    return reply
