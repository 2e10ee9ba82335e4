"""Decoders for bulk embedding: threads, or processes that write pixels into shared memory.

Processes serve machines with a GPU that is faster than decoding threads. A thread holds the interpreter lock
(GIL) for 0.4 of the decoding time of a small JPEG (`benchmarks/decoding.py`), so that more than three threads
wait for each other.

A process is a separate program, not one of `multiprocessing`: it imports numpy and Pillow and never the
caller's main module. It has its own session, so that Ctrl-C in a terminal does not reach it. It ends when its
pipe closes, which happens however the caller ends. The shared memory is unnamed, so no leftover can remain.
"""

import dataclasses
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
from retrieval.images.photo_reader import DetectionClock, FaceImage, FaceSelection, PhotoReader
from retrieval.images.picture import Pixels
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

# Stands for pixels that are in the slot.
_IN_SLOT: Final[Pixels] = np.empty((0, 0, 3), np.uint8)

# The interval at which a wait for a reply checks for cancellation, in seconds.
_POLL_SECONDS: Final = 0.1

# The faces of a photo, one or more, or the error.
Decoded: TypeAlias = list[FaceImage] | UnreadableImage

# For each photo its faces, the first of them with its pixels in the slot, or the reason and its detail, or
# `_HEAVY`; and the seconds that face detection took.
_Reply: TypeAlias = tuple[list[list[FaceImage] | tuple[Reason, str] | str], float]


class Decode(Protocol):
    """Decodes photos: returns the selected faces of each, or the error.

    Raises:
        Interrupted: the run was cancelled by Ctrl-C.
    """

    def __call__(
        self,
        contents: Sequence[Content],
        reader: PhotoReader,
        selection: FaceSelection = FaceSelection(),
        *,
        clock: DetectionClock | None = None,
    ) -> list[Decoded]: ...


def decode_here(
    contents: Sequence[Content],
    reader: PhotoReader,
    selection: FaceSelection = FaceSelection(),
    *,
    clock: DetectionClock | None = None,
    seconds: float = MAX_SECONDS,
) -> list[Decoded]:
    """Decodes photos in the caller's thread; see `Decode`. `seconds` is the limit of `pixels.read`."""
    return [_decoded(content, reader, selection, clock, seconds) for content in contents]


def _decoded(
    content: Content,
    reader: PhotoReader,
    selection: FaceSelection,
    clock: DetectionClock | None,
    seconds: float,
) -> Decoded:
    cancellation.check_cancelled()
    try:
        return reader.read(content, selection, seconds=seconds, clock=clock)
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

    def __init__(
        self, processes: int, *, reader: PhotoReader, ahead: int, seconds: float = MAX_SECONDS
    ) -> None:
        """Allocates the shared memory; starts no process yet.

        Args:
            processes: the number of processes, at least 1.
            reader: reads the photos; for another one the caller's thread decodes.
            ahead: the number of slots that may be lent.
            seconds: as in `pixels.read`.
        """
        self._reader = reader
        self._size = size = reader.preprocessing.size
        self._seconds = seconds
        self._slots = processes + ahead
        self._file = isolation.nameless_file(self._slots * SLOT * size * size * 3)
        self._memory = mmap.mmap(self._file, 0)
        self._free: SimpleQueue[int] = SimpleQueue()
        # A semaphore. One of `threading` could deadlock in `_release_lent_slot`, which may run at any moment.
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
        self,
        contents: Sequence[Content],
        reader: PhotoReader,
        selection: FaceSelection = FaceSelection(),
        *,
        clock: DetectionClock | None = None,
    ) -> list[Decoded]:
        """Decodes photos; see `Decode`.

        Raises:
            RunError: a process was killed, or its decoder crashed.
        """
        clock = DetectionClock() if clock is None else clock
        if reader.preprocessing != self._reader.preprocessing:
            return decode_here(contents, reader, selection, clock=clock, seconds=self._seconds)
        found = [
            None if isinstance(one, bytes) else _decoded(one, reader, selection, clock, self._seconds)
            for one in contents
        ]
        files = [one for one in contents if isinstance(one, bytes)]
        decoded = (
            one
            for start in range(0, len(files), SLOT)
            for one in self._decode_slot(files[start : start + SLOT], selection, clock)
        )
        return [next(decoded) if one is None else one for one in found]

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

    def _decode_slot(
        self, files: Sequence[bytes], selection: FaceSelection, clock: DetectionClock
    ) -> list[Decoded]:
        with self._process() as process:
            slot = self._free.get()
            try:
                reply, seconds = process.ask((slot, selection, files))
            except BaseException:
                self._free.put(slot)
                raise
            firsts = self._lend_slot(slot, len(files))
        clock.seconds += seconds
        found: list[Decoded] = []
        for file, pixels, answer in zip(files, firsts, reply, strict=True):
            if answer == _HEAVY:
                found.append(_decoded(file, self._reader, selection, clock, self._seconds))
            elif isinstance(answer, list):
                found.append([dataclasses.replace(answer[0], pixels=pixels), *answer[1:]])
            else:
                found.append(UnreadableImage(*answer))
        return found

    @contextmanager
    def _process(self) -> "Iterator[_Process]":
        process = self._idle.get()
        try:
            process.start(self._file, self._slots, self._reader)
            yield process
        except Interrupted:
            # It is in the middle of a batch and cannot be used again.
            process.kill()
            raise
        finally:
            self._idle.put(process)

    def _lend_slot(self, slot: int, count: int) -> Pixels:
        """Returns the pixels in a slot; the slot is free again once none of them is referenced."""
        pixels = _slot_pixels(self._memory, slot, self._size)
        try:
            self._lendable.get_nowait()
        except Empty:
            copied = pixels[:count].copy()
            self._free.put(slot)
            return copied
        # Every view, such as one photo of a batch, keeps this array alive. No slot has to be free when the
        # program exits.
        weakref.finalize(pixels, self._release_lent_slot, slot).atexit = False
        return pixels[:count]

    def _release_lent_slot(self, slot: int) -> None:
        # The garbage collector may run this anywhere; a SimpleQueue is reentrant.
        self._free.put(slot)
        self._lendable.put(None)


class _Process:
    """A decoding process, and the caller's end of its pipe."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None

    def start(self, file: int, slots: int, reader: PhotoReader) -> None:
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
                self._popen = isolation.start(_PROGRAM, pipe, file, slots, descriptors=(pipe, file))
            except OSError as error:
                raise RunError(
                    f"A process that decodes photos cannot be started ({why(error)}); use `decoders=0`."
                ) from error
            self._pipe = Connection(ours.detach())
        # A process that has ended is noticed by the first question.
        with suppress(OSError):
            self._pipe.send(reader)

    def ask(self, question: object) -> _Reply:
        """Sends a slot, a selection and files, and returns the reply; see `serve`.

        Raises:
            RunError: the process has ended.
            Interrupted: the run was cancelled by Ctrl-C.
        """
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
    """Returns the pixels of a slot, (32, size, size, 3), as a view of the shared memory."""
    shape = (SLOT, size, size, 3)
    return np.ndarray(shape, np.uint8, memory, offset=slot * SLOT * size * size * 3)


def serve(pipe: int, file: int, slots: int) -> None:
    """Runs a decoding process: decodes what it receives until the caller has ended.

    Args:
        pipe, file: the file descriptors of the pipe and of the shared memory.
        slots: the number of slots in the memory.
    """
    # A service manager stops all processes of a service at once; the current batch must be finished.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    # As in the command line: the reply says what is wrong with a file.
    warnings.filterwarnings("ignore", module="PIL")
    questions: Connection[Any, Any] = Connection(pipe)
    with suppress(EOFError, OSError):
        reader: PhotoReader = questions.recv()
        size = reader.preprocessing.size
        memory = mmap.mmap(file, slots * SLOT * size * size * 3)
        while True:
            slot, selection, files = questions.recv()
            questions.send(_decode_into(_slot_pixels(memory, slot, size), files, reader, selection))
            del files  # else they would stay in memory until the next batch


def _decode_into(
    place: Pixels, files: Sequence[bytes], reader: PhotoReader, selection: FaceSelection
) -> _Reply:
    """Decodes files in a decoding process; the pixels of the first face of each go to its row of `place`."""
    reply: list[list[FaceImage] | tuple[Reason, str] | str] = []
    clock = DetectionClock()
    for row, content in enumerate(files):
        try:
            if not reader.is_light(content, selection):
                reply.append(_HEAVY)
                continue
            first, *others = reader.read(content, selection, clock=clock)
            place[row] = first.pixels
            reply.append([dataclasses.replace(first, pixels=_IN_SLOT), *others])
        except UnreadableImage as error:
            reply.append((error.reason, error.detail))
    return reply, clock.seconds
