"""Small real things: drawn faces, a narrow network exported as a bundle, a gallery on disk."""

import os

# Threads of OpenMP that wait take no core from the other tests; read when FAISS and torch are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.models.bundle import ModelBundle, Preprocessing
from retrieval.models.network import Network
from training.fitting.export import export
from training.reports import model_card
from training.synthetic_faces import draw_faces

# A shell starts its background jobs with SIGINT ignored, and some of the tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small training runs many times faster on one thread, and does not starve what runs beside it.
torch.set_num_threads(1)

# The same examples in every run: what failed once fails again, and nothing else fails on another day.
# `pytest --hypothesis-profile=explore` draws others.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("suite")

IDENTITIES = 6
PHOTOS = 6

# Where temporary folders lie in memory, and how much room the tests want there.
_MEMORY = Path("/dev/shm")
_ROOM = 4 * 2**30

_SHARED = Path(__file__).parent.parent.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Puts temporary folders into memory where there is room, unless it is said where they go.

    Galleries sync each of their files, which takes a disk some milliseconds; that they sync when they must is
    tested above the disk (`tests/faults.py`).
    """
    if config.option.basetemp is None and _has_room(_MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


def _has_room(folder: Path) -> bool:
    if not os.access(folder, os.W_OK):
        return False
    # Environments that the tests make are run from where they lie.
    runs = not os.statvfs(folder).f_flag & os.ST_NOEXEC
    return runs and shutil.disk_usage(folder).free >= _ROOM


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered about files goes into a folder of the test run, also from other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photographs and weights; a test that asks for it skips where it is absent."""
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
    """The narrowest network of the family, with the same random weights every time."""
    torch.manual_seed(0)
    return Network(IDENTITIES, architecture="resnet14-narrow").eval()


@pytest.fixture(scope="session")
def bundle(network: Network, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """That network as a bundle for 32 x 32 pixels; its labels are the drawn people."""
    sample = np.stack([pixels.read(path, size=32) for path in sorted(faces.glob("*/*_0001.jpg"))])
    return export(
        network,
        tmp_path_factory.mktemp("models") / "narrow",
        labels=tuple(sorted(path.name for path in faces.iterdir())),
        preprocessing=Preprocessing(size=32, crop=1.0),
        recipe={"epochs": 0},
        split={"train": [], "validation": []},
        figures={"validation_accuracy": 0.5},
        sample=sample,
        describe=model_card.describe,
    )


@pytest.fixture(scope="session")
def empty_gallery(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty gallery that nobody opens: a copy of it costs a third of what making one does."""
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
    """The test runs on one core, as under `taskset`, and so do the threads and processes that it starts."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    yield
    os.sched_setaffinity(0, every)
