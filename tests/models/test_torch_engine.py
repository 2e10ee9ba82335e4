"""The torch engine: passes, memory that ends, fewer bits. On the CPU, with the narrow network."""

import copy
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval.errors import InputError, RunError
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.engine import drift_between
from retrieval.models.network import Network
from retrieval.models.torch_engine import TorchEngine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(faces: Any) -> NDArray[np.uint8]:
    """The drawn faces, (36, 32, 32, 3)."""
    return np.stack([pixels.read(path, size=32) for path in sorted(faces.glob("*/*.jpg"))])


class Memory:
    """A device's memory, which holds passes of up to so many pictures: a hook before the network runs."""

    def __init__(self, network: Network, holds: int) -> None:
        self.holds = holds
        self.passes: list[int] = []
        network.register_forward_pre_hook(self)

    def __call__(self, _network: object, given: tuple[torch.Tensor]) -> None:
        if len(given[0]) > self.holds:
            # What torch itself raises where a GPU's memory ends.
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.passes.append(len(given[0]))

    def __deepcopy__(self, _memo: object) -> "Memory":
        """The engine computes with a copy of the network, in the same memory."""
        return self


@pytest.fixture
def own(network: Network) -> Network:
    """A network of this test's own."""
    return copy.deepcopy(network)


def alike(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-5))


def test_passes_are_of_the_size_asked_for_and_the_last_one_of_what_is_left(
    own: Network, photos: NDArray[np.uint8]
) -> None:
    memory = Memory(own, holds=1000)
    TorchEngine(own, CPU, pass_size=16)(photos)
    assert memory.passes == [16, 16, 4]


def test_where_memory_ends_passes_halve_and_every_photo_has_its_answer_in_order(
    own: Network, photos: NDArray[np.uint8]
) -> None:
    expected = TorchEngine(own, CPU)(photos)
    memory = Memory(own, holds=5)
    engine = TorchEngine(own, CPU, pass_size=32)
    vectors, probabilities = engine(photos)
    assert memory.passes == [4] * 9
    assert alike(vectors, expected[0])
    assert alike(probabilities, expected[1])
    assert engine.pass_size == 4


def test_memory_that_shrinks_in_the_middle_of_a_batch_loses_nothing(
    own: Network, photos: NDArray[np.uint8]
) -> None:
    expected = TorchEngine(own, CPU)(photos)
    memory = Memory(own, holds=8)
    engine = TorchEngine(own, CPU, pass_size=8)

    def shrink(_module: object, _given: object) -> None:
        memory.holds = 8 if len(memory.passes) < 2 else 3

    own.register_forward_pre_hook(shrink)
    engine = TorchEngine(own, CPU, pass_size=8)
    vectors, _ = engine(photos)
    assert sum(memory.passes) == len(photos)
    assert memory.passes[:2] == [8, 8]
    assert max(memory.passes[3:]) <= 3
    assert alike(vectors, expected[0])


def test_without_memory_for_one_picture_the_run_fails_with_a_sentence_and_the_next_call_answers(
    own: Network, photos: NDArray[np.uint8]
) -> None:
    memory = Memory(own, holds=0)
    engine = TorchEngine(own, CPU)
    for _ in range(3):  # more often than there are lanes
        with pytest.raises(RunError, match="no memory left for a single picture; end other programs"):
            engine(photos)
    memory.holds = 1000
    assert len(engine(photos)[0]) == len(photos)


def test_tuning_doubles_the_pass_until_memory_ends(own: Network, photos: NDArray[np.uint8]) -> None:
    memory = Memory(own, holds=16)
    engine = TorchEngine(own, CPU, pass_size=2)
    engine.tune(photos[:3], limit=64)
    # How much faster a doubling makes it depends on the machine; the bounds do not.
    assert engine.pass_size in (2, 4, 8, 16)
    assert max(memory.passes) <= 16
    assert len(engine(photos)[0]) == len(photos)


def test_tuning_has_a_bound(own: Network, photos: NDArray[np.uint8]) -> None:
    memory = Memory(own, holds=1000)
    engine = TorchEngine(own, CPU, pass_size=2)
    engine.tune(photos[:1], limit=8)
    assert max(memory.passes) <= 8
    assert engine.pass_size in (2, 4, 8)


def test_an_embedder_that_tunes_says_how_many_pictures_keep_it_busy(
    bundle: ModelBundle, photos: NDArray[np.uint8]
) -> None:
    for name in ("onnxruntime", "torch"):
        embedder = Embedder.open(bundle, device="cpu", engine=name)
        assert embedder.tune(photos[:2], limit=32) == embedder.batch_size > 1
        with pytest.raises(InputError, match="at least one picture"):
            embedder.tune(photos[:0])


def test_callers_that_hold_lanes_never_wait_for_each_other(own: Network, photos: NDArray[np.uint8]) -> None:
    """Eight callers with nine passes each and two lanes: a deadlock would end in the timeout."""
    engine = TorchEngine(own, CPU, pass_size=4)
    expected, _ = engine(photos)
    start = threading.Barrier(8)

    def embed(_number: int) -> NDArray[np.float32]:
        start.wait()
        return engine(photos)[0]

    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(embed, range(8)):
            assert alike(found, expected)


@pytest.fixture(params=["bf16", "fp16"])
def fewer_bits(request: pytest.FixtureRequest, bundle: ModelBundle) -> Iterator[Embedder]:
    with Embedder.open(bundle, device="cpu", precision=request.param) as embedder:
        yield embedder


def test_fewer_bits_take_the_torch_engine_and_answer_in_float32(
    fewer_bits: Embedder, photos: NDArray[np.uint8]
) -> None:
    assert fewer_bits.engine == "torch"
    answer = fewer_bits.embed(photos)
    assert answer.vectors.dtype == answer.probabilities.dtype == np.float32
    np.testing.assert_allclose(answer.probabilities.sum(1), 1, atol=1e-5)


def test_the_drift_of_fewer_bits_is_that_of_the_first_batchs_distances(
    fewer_bits: Embedder, bundle: ModelBundle, photos: NDArray[np.uint8]
) -> None:
    assert fewer_bits.drift is None
    found = fewer_bits.embed(photos).vectors
    exact = Embedder.open(bundle, device="cpu", engine="torch").embed(photos).vectors
    expected = drift_between(fewer_bits.precision, found[:32], exact[:32])
    drift = fewer_bits.drift
    assert expected is not None
    assert drift is not None
    assert (drift.precision, drift.photos) == (fewer_bits.precision, 32)
    assert drift.largest == pytest.approx(expected.largest, rel=1e-3)
    assert drift.mean == pytest.approx(expected.mean, rel=1e-3)
    # bf16 keeps 8 bits and fp16 11: a change that can be seen, and a small one.
    assert 1e-6 < drift.mean <= drift.largest < 0.1
    before = fewer_bits.drift
    fewer_bits.embed(photos[::-1])
    assert fewer_bits.drift is before


def test_a_picture_alone_and_two_that_are_the_same_have_no_drift_yet(
    fewer_bits: Embedder, photos: NDArray[np.uint8]
) -> None:
    fewer_bits.embed(photos[:1])
    fewer_bits.embed(np.repeat(photos[:1], 2, axis=0))
    assert fewer_bits.drift is None
    fewer_bits.embed(photos[:4])
    assert fewer_bits.drift is not None
    assert fewer_bits.drift.photos == 4


def test_float32_has_no_drift(bundle: ModelBundle, photos: NDArray[np.uint8]) -> None:
    embedder = Embedder.open(bundle, device="cpu", engine="torch")
    embedder.embed(photos)
    assert embedder.drift is None


def test_numbers_that_do_not_fit_into_fp16_are_said_so(own: Network, photos: NDArray[np.uint8]) -> None:
    with torch.no_grad():
        own.bn1.weight.fill_(1e7)
    engine = TorchEngine(own, CPU, precision="fp16")
    with pytest.raises(RunError, match="do not fit into fp16; use `precision='bf16'`"):
        engine(photos)


def test_the_drift_is_the_change_of_each_distance_as_its_share() -> None:
    exact = np.array([[0, 0], [3, 4], [0, 10]], np.float32)
    found = np.array([[0, 0], [3, 4], [0, 11]], np.float32)
    drift = drift_between("bf16", found, exact)
    assert drift is not None
    # Distances 5, 10 and the root of 45 become 5, 11 and the root of 58.
    changes = [0, 0.1, (58**0.5 - 45**0.5) / 45**0.5]
    assert drift.largest == pytest.approx(max(changes))
    assert drift.mean == pytest.approx(sum(changes) / 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8"}, "There is no precision int8; choose one of float32, bf16, fp16."),
        ({"threads": 0}, "The number of threads must be at least 1."),
        (
            {"engine": "onnxruntime", "precision": "bf16"},
            "The onnxruntime engine computes in float32, not in bf16; use the torch engine.",
        ),
    ],
    ids=["precision", "threads", "onnxruntime-bf16"],
)
def test_what_an_engine_cannot_do_is_an_input_error(
    bundle: ModelBundle, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        Embedder.open(bundle, device="cpu", **options)
    assert str(caught.value) == said


def test_the_audit_log_says_how_far_fewer_bits_move_distances(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    photos = [(path, path.parent.name) for path in sorted(faces.glob("*/*.jpg"))]
    with Gallery.create(tmp_path / "gallery", bundle, device="cpu", precision="bf16") as gallery:
        gallery.enroll(photos[:1])
        gallery.enroll(photos[1:])
        drift = gallery.embedder.drift
        alone, together = [entry for entry in gallery.audit_log() if entry.action == "enroll"]
    assert drift is not None
    assert (alone.faces, alone.detail) == (1, {})
    assert (together.faces, together.detail) == (35, dataclasses.asdict(drift))
    assert together.detail["precision"] == "bf16"
    assert 0 < together.detail["mean"] < 0.05
