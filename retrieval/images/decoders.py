"""Decoders for bulk embedding: threads, or processes that write pixels into shared memory.

Processes serve machines with a GPU that is faster than decoding threads. A thread holds the interpreter lock
(GIL) for 0.4 of the decoding time of a small JPEG (`benchmarks/decoding.py`), so that more than three threads
wait for each other.

A process is a separate program, not one of `multiprocessing`: it imports numpy and Pillow and never the
caller's main module. It has its own session, so that Ctrl-C in a terminal does not reach it. It ends when its
pipe closes, which happens however the caller ends. The shared memory is unnamed, so no leftover can remain.
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
from retrieval.images.picture import Colour, Pixels
from retrieval.images.pixels import MAX_SECONDS
from retrieval.system import cancellation, isolation
from retrieval.system.cpu import usable_cores
from retrieval.system.files import why

Content: TypeAlias = bytes | Image | NDArray[np.uint8]

# Photos in a slot of the shared memory.
SLOT: Final = 32

# With fewer cores, threads decode as fast as processes.
_MIN_CORES: Final = 4

# Seconds that a process may take to end after its pipe is closed: it finishes its batch.
_CLOSE_SECONDS: Final = 10.0

_PROGRAM: Final = "import sys; from retrieval.images.decoders import serve; serve(*map(int, sys.argv[1:]))"

# The reply for a photo that may take long to decode. `pixels.read` in the calling thread decodes it, within
# the memory budget of all threads, and in a separate process that can be killed.
_HEAVY: Final = "heavy"

# The interval at which a wait for a reply checks for cancellation, in seconds.
_POLL_SECONDS: Final = 0.1

# For each photo None if it has pixels, else the reason and its detail, or `_HEAVY`.
_Reply: TypeAlias = list[tuple[Reason, str] | str | None]


class Decode(Protocol):
    """Decodes photos: returns the pixels of each, uint8 (size, size, 3), or the error.

    Raises:
        Interrupted: the run was cancelled by Ctrl-C.
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
    """Decodes photos in the caller's thread; see `Decode`. `seconds` is the limit of `pixels.read`."""
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
    """Returns the number of decoding processes; 0 decodes in threads.

    Args:
        asked: the number; None is one for each usable core beside a GPU with at least 4 cores, else 0.
        beside_gpu: whether photos are embedded on a GPU.

    Raises:
        InputError: `asked` is negative.
    """
    if asked is not None:
        if asked < 0:
            raise InputError("The number of decoders must be at least 0; 0 decodes in threads.")
        return asked
    cores = usable_cores()
    return cores if beside_gpu and cores >= _MIN_CORES else 0


class Decoders:
    """Processes that decode; implements `Decode`. Safe to call from several threads. A context manager.

    A process starts on first use. There are `processes + ahead` slots of 32 photos, each of
    32 x size x size x 3 bytes. Returned pixels stay in their slot as long as one of them is referenced. Once
    `ahead` slots are lent, pixels are copied instead, so that no thread waits for a slot.

    Photos that may take long or much memory are decoded as by `decode_here`.
    """

    def __init__(self, processes: int, *, size: int, ahead: int, seconds: float = MAX_SECONDS) -> None:
        """Allocates the shared memory; starts no process yet.

        Args:
            processes: the number of processes, at least 1.
            size: side of the pictures in pixels; another size is decoded in the caller's thread.
            ahead: the number of slots that may be lent.
            seconds: as in `pixels.read`.
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
        """Decodes photos; see `Decode`.

        Raises:
            RunError: a process was killed, or its decoder crashed.
        """
        found = [
            _decoded(one, size, crop, colour, self._seconds) if self._decodes_in_thread(one, size) else None
            for one in contents
        ]
        files = [one for one in contents if isinstance(one, bytes) and not self._decodes_in_thread(one, size)]
        there = (
            one
            for start in range(0, len(files), SLOT)
            for one in self._decode_slot(files[start : start + SLOT], crop, colour)
        )
        return [next(there) if one is None else one for one in found]

    def close(self) -> None:
        """Ends the processes. Returned pixels stay valid."""
        for process in self._processes:
            process.close()
        os.close(self._file)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decodes_in_thread(self, content: Content, size: int) -> bool:
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
            squares = self._lend_slot(slot, len(files))
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
            # It is in the middle of a batch and cannot be used again.
            process.kill()
            raise
        finally:
            self._idle.put(process)

    def _lend_slot(self, slot: int, count: int) -> Pixels:
        """Returns the pixels in a slot; the slot is free again once none of them is referenced."""
        squares = _slot_pixels(self._memory, slot, self._size)
        try:
            self._lendable.get_nowait()
        except Empty:
            copied = squares[:count].copy()
            self._free.put(slot)
            return copied
        # Every view, such as one photo of a batch, keeps this array alive.
        weakref.finalize(squares, self._release_lent_slot, slot).atexit = False
        return squares[:count]

    def _release_lent_slot(self, slot: int) -> None:
        # The garbage collector may run this anywhere; a SimpleQueue is reentrant.
        self._free.put(slot)
        self._lendable.put(None)


class _Process:
    """A decoding process, and the caller's end of its pipe."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None

    def start(self, file: int, slots: int, size: int) -> None:
        """Starts the process; does nothing if it is started.

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


def _slot_pixels(memory: mmap.mmap, slot: int, size: int) -> Pixels:
    shape = (SLOT, size, size, 3)
    return np.ndarray(shape, np.uint8, memory, offset=slot * SLOT * size * size * 3)


def serve(pipe: int, file: int, slots: int, size: int) -> None:
    """Runs a decoding process: decodes what it receives until the caller has ended.

    Args:
        pipe, file: the file descriptors of the pipe and of the shared memory.
        slots, size: the number of slots in the memory, and the side of the pictures in pixels.
    """
    # A service manager stops all processes of a service at once; the current batch must be finished.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    # As in the command line: the reply says what is wrong with a file.
    warnings.filterwarnings("ignore", module="PIL")
    memory = mmap.mmap(file, slots * SLOT * size * size * 3)
    questions: Connection[Any, Any] = Connection(pipe)
    with suppress(EOFError, OSError):
        while True:
            slot, crop, colour, files = questions.recv()
            questions.send(_decode_into(_slot_pixels(memory, slot, size), files, crop, colour))
            del files  # else they would stay in memory until the next batch


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
