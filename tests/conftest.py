"""Fixtures for all tests: drawn faces, a narrow network exported as a bundle, a gallery on disk."""

import os

# Waiting OpenMP threads must not occupy a core. The variable is read when FAISS and torch are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.importing import import_model
from retrieval.models.network import Network
from retrieval.system.garbage import collection_paused
from tests.onnx_networks import network as network_file
from tests.onnx_networks import saved
from training.fitting.export import export
from training.reports import model_card
from training.synthetic_faces import draw_faces

# A shell starts background jobs with SIGINT ignored, and some tests need SIGINT (Ctrl-C).
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small training runs are many times faster on one thread, and leave cores to other processes.
torch.set_num_threads(1)

# The same examples in every run, so that failures are reproducible.
# `pytest --hypothesis-profile=explore` draws other examples.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("suite")

IDENTITIES = 6
PHOTOS = 6

# A file system in memory for temporary folders, and the free bytes that the tests need there.
_MEMORY = Path("/dev/shm")
_MIN_FREE_BYTES = 4 * 2**30

_SHARED = Path(__file__).parent.parent.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Puts temporary folders into memory if it has enough space, unless --basetemp is given.

    Galleries sync each of their files, which takes some milliseconds on a disk. That they sync when they must
    is tested above the disk (`tests/faults.py`).
    """
    if config.option.basetemp is None and _has_room(_MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects the tests with the garbage collector off: it would look at them all again and again."""
    with collection_paused():
        return (yield)


def _has_room(folder: Path) -> bool:
    if not os.access(folder, os.W_OK):
        return False
    # Tests create virtual environments in temporary folders and run them.
    executable = not os.statvfs(folder).f_flag & os.ST_NOEXEC
    return executable and shutil.disk_usage(folder).free >= _MIN_FREE_BYTES


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Puts faceprint's cache into a folder of the test run, also for child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photographs and weights; tests that use it are skipped if it is absent."""
    folder = Path(os.environ.get("FACEPRINT_SHARED", _SHARED))
    if not (folder / "data").is_dir():
        pytest.skip(f"the real photographs are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An identity folder: 6 drawn people with 6 photos each, 96 x 96 pixels."""
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=IDENTITIES, photos=PHOTOS, size=96)


@pytest.fixture(scope="session")
def network() -> Network:
    """The narrowest architecture, with the same random weights every time."""
    torch.manual_seed(0)
    return Network(IDENTITIES, architecture="resnet14-narrow").eval()


@pytest.fixture(scope="session")
def bundle(network: Network, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The bundle of `network` for 32 x 32 pixels; its labels are the drawn people."""
    sample = np.stack([pixels.read(path, size=32) for path in sorted(faces.glob("*/*_0001.jpg"))])
    return export(
        network,
        tmp_path_factory.mktemp("models") / "narrow",
        labels=tuple(sorted(path.name for path in faces.iterdir())),
        reader=PhotoReader(Preprocessing(size=32, crop=1.0)),
        recipe={"epochs": 0},
        split={"train": [], "validation": []},
        figures={"validation_accuracy": 0.5},
        sample=sample,
        describe=model_card.describe,
    )


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A model that was imported from a tiny network in an ONNX file."""
    folder = tmp_path_factory.mktemp("imported")
    file = saved(network_file(), folder / "network.onnx")
    return import_model(file, folder / "model", colour="rgb", mean=127.5, std=128)


@pytest.fixture(scope="session")
def empty_gallery(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an empty gallery, to be copied, not opened: a copy takes 1/3 of the time of `create`."""
    folder = tmp_path_factory.mktemp("galleries") / "empty.gallery"
    Gallery.create(folder, bundle).close()
    return folder


@pytest.fixture
def gallery(empty_gallery: Path, tmp_path: Path) -> Iterator[Gallery]:
    """An empty gallery."""
    with Gallery.open(shutil.copytree(empty_gallery, tmp_path / "people.gallery")) as opened:
        yield opened


@pytest.fixture
def one_core() -> Iterator[None]:
    """Runs the test on one core, as under `taskset`, with all threads and processes that it starts."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    yield
    os.sched_setaffinity(0, every)
