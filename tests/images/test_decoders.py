"""Processes that decode: the same pixels as `pixels.read`, in order; a bad file is an answer."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import InputError, RunError, UnreadableImage
from retrieval.images import decoders as decoding
from retrieval.images.decoders import SLOT, Decoded, Decoders, decode_here, processes_for
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from tests.broken import make_broken

READER = PhotoReader(Preprocessing(32, 1.0))
LARGER = PhotoReader(Preprocessing(48, 1.0))


@pytest.fixture(scope="module")
def files(faces: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(faces.glob("*/*.jpg"))]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("broken")
    make_broken(folder)
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with Decoders(2, reader=READER, ahead=3) as opened:
        yield opened


def as_facts(found: Sequence[Decoded]) -> list[object]:
    return [
        (one.reason, one.detail)
        if isinstance(one, UnreadableImage)
        else [(face.face, face.pixels.shape, face.pixels.tobytes()) for face in one]
        for one in found
    ]


@pytest.mark.parametrize("crop", [1.0, 0.6])
def test_processes_give_what_a_thread_gives_for_good_broken_and_decoded_pictures(
    crop: float, files: list[bytes], broken: list[bytes]
) -> None:
    assert (len(files), len(broken)) == (36, 18)
    array = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    mixed = [array, *files[:5], *broken, Image.fromarray(array), *files]
    reader = PhotoReader(Preprocessing(32, crop))
    with Decoders(2, reader=reader, ahead=3) as decoders:
        found = decoders(mixed, reader)
    assert as_facts(found) == as_facts(decode_here(mixed, reader))
    assert sum(isinstance(one, UnreadableImage) for one in found) == 18


def test_another_size_is_decoded_too_and_nothing_gives_nothing(
    decoders: Decoders, files: list[bytes]
) -> None:
    expected = as_facts(decode_here(files[:2], LARGER))
    assert as_facts(decoders(files[:2], LARGER)) == expected
    assert decoders([], READER) == []


def test_threads_never_wait_for_a_slot_however_many_pixels_are_kept(
    decoders: Decoders, files: list[bytes]
) -> None:
    """No slot is given to others while one photo of it is kept, and the memory does not grow."""
    expected = as_facts(decode_here(files[:4], READER))
    with ThreadPoolExecutor(4) as threads:
        pieces = list(threads.map(lambda _: decoders(files[:4], READER), range(20)))
    assert all(as_facts(piece) == expected for piece in pieces)
    assert decoders._lendable.qsize() == 0
    assert decoders._free.qsize() == 2
    kept = [piece[3] for piece in pieces]
    del pieces
    decoders(files, READER)
    assert all(as_facts([one]) == expected[3:] for one in kept)
    kept.clear()
    gc.collect()
    assert (decoders._lendable.qsize(), decoders._free.qsize()) == (3, 5)
    assert len(decoders._memory) == 5 * SLOT * 32 * 32 * 3


def test_pixels_outlive_the_processes(files: list[bytes]) -> None:
    with Decoders(1, reader=READER, ahead=1) as decoders:
        found = decoders(files[:3], READER)
        (process,) = decoders._processes
    assert process._popen is not None
    assert process._popen.returncode == 0
    assert as_facts(found) == as_facts(decode_here(files[:3], READER))


def test_no_process_starts_before_there_is_something_to_decode() -> None:
    with Decoders(2, reader=READER, ahead=1) as decoders:
        assert all(process._popen is None for process in decoders._processes)


def test_a_process_that_is_killed_is_one_sentence(files: list[bytes]) -> None:
    with Decoders(1, reader=READER, ahead=1) as decoders:
        decoders(files[:1], READER)
        process = decoders._processes[0]._popen
        assert process is not None
        process.send_signal(signal.SIGKILL)
        with pytest.raises(RunError, match="A process that decodes photos has ended; what was enrolled is"):
            decoders(files, READER)
        assert decoders._free.qsize() == 2


def test_processes_end_with_a_caller_that_is_killed_and_need_no_guard_in_its_program(
    faces: Path, tmp_path: Path
) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        "import os, signal, sys\n"
        "from retrieval.images.decoders import Decoders\n"
        "from retrieval.images.photo_reader import PhotoReader\n"
        "from retrieval.images.preprocessing import Preprocessing\n"
        "READER = PhotoReader(Preprocessing(32, 1.0))\n"
        "decoders = Decoders(1, reader=READER, ahead=1)\n"
        "decoders([open(sys.argv[1], 'rb').read()], READER)\n"
        "print(decoders._processes[0]._popen.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    photo = min(faces.glob("*/*.jpg"))
    done = subprocess.run([sys.executable, script, photo], stdout=subprocess.PIPE, text=True)
    (process,) = done.stdout.split()
    while _runs(process):
        time.sleep(0.05)


def _runs(process: str) -> bool:
    status = Path("/proc") / process / "stat"
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_process_is_out_of_reach_of_the_terminals_ctrl_c(files: list[bytes]) -> None:
    """The terminal interrupts its foreground group of processes."""
    with Decoders(1, reader=READER, ahead=1) as decoders:
        decoders(files[:1], READER)
        process = decoders._processes[0]._popen
        assert process is not None
        assert os.getpgid(process.pid) != os.getpgid(0)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_told_to_stop_goes_on_until_its_caller_has_done(
    stop: signal.Signals, files: list[bytes]
) -> None:
    """As a service manager does that stops every process of a service."""
    with Decoders(1, reader=READER, ahead=1) as decoders:
        decoders(files[:1], READER)
        process = decoders._processes[0]._popen
        assert process is not None
        process.send_signal(stop)
        found = decoders(files[:2], READER)
    assert as_facts(found) == as_facts(decode_here(files[:2], READER))
    assert process.returncode == 0


def test_a_process_that_cannot_be_started_is_one_sentence(
    files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with (
        Decoders(1, reader=READER, ahead=1) as decoders,
        pytest.raises(RunError, match=r"cannot be started \(no such file or directory\); use `decoders=0`"),
    ):
        decoders(files[:1], READER)


def test_a_process_imports_nothing_heavy() -> None:
    code = "import json, sys, retrieval.images.decoders; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert {"numpy", "PIL.Image"} <= modules
    assert not modules & {"torch", "faiss", "sqlalchemy", "onnxruntime", "typer", "retrieval.gallery.gallery"}


@pytest.mark.parametrize(
    ("asked", "beside_gpu", "cores", "processes"),
    [
        (None, False, 16, 0),
        (None, True, 3, 0),
        (None, True, 4, 4),
        (None, True, 16, 16),
        (0, True, 16, 0),
        (2, False, 1, 2),
    ],
)
def test_processes_decode_beside_a_gpu_with_more_than_three_cores_or_when_asked_for(
    asked: int | None, beside_gpu: bool, cores: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "usable_cores", lambda: cores)
    assert processes_for(asked, beside_gpu=beside_gpu) == processes


def test_fewer_decoders_than_none_are_an_input_error() -> None:
    with pytest.raises(InputError, match="at least 0"):
        processes_for(-1, beside_gpu=False)
