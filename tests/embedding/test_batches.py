"""Batches: a number that was asked for is kept; a GPU's is found once, and order and rows stay what they are.

There is no GPU here. What stands for one is an embedder that says so, over torch's engine on the CPU.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval.bulk.embed import embed
from retrieval.bulk.ingest import ingest
from retrieval.bulk.reports import IngestReport
from retrieval.database.records import NewFace
from retrieval.embedding import batches as batching
from retrieval.embedding.batches import Batches
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.reading import Prepared
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network
from retrieval.models.torch_engine import TorchEngine


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for 36 photos: the first batch of 8 is worth finding a size, with passes of up to 8."""
    monkeypatch.setattr(batching, "DEFAULT_BATCH_SIZE", 4)
    monkeypatch.setattr(batching, "_MIN_PHOTOS_TO_TUNE", 8)
    monkeypatch.setattr(batching, "_MAX_PASS_SIZE", 8)


def embedder_of(network: Network, bundle: ModelBundle, device: str = "cuda:0") -> Embedder:
    """An embedder that says where it is, and computes on the CPU."""
    engine = TorchEngine(copy.deepcopy(network), torch.device("cpu"), pass_size=2)
    return Embedder(bundle, device, "torch", engine)


@pytest.fixture
def on_gpu(network: Network, bundle: ModelBundle) -> Embedder:
    return embedder_of(network, bundle)


def gallery_of(folder: Path, bundle: ModelBundle, embedder: Embedder) -> Gallery:
    """A gallery that was asked to use a GPU."""
    gallery = Gallery.create(folder, bundle, device="cuda")
    gallery._model._embedder = embedder
    return gallery


def ingested(gallery: Gallery, source: Path, **options: Any) -> tuple[IngestReport, list[Outcome]]:
    outcomes: list[Outcome] = []
    report = ingest(gallery, [source], decoders=0, on_outcome=outcomes.append, **options)
    return report, outcomes


def rows_of(gallery: Gallery) -> list[tuple[int, str | None, np.ndarray[Any, Any]]]:
    """Every face's id, path and vector."""
    with gallery.vault.store.read() as reader:
        generation = gallery.vault.serving(reader)
        faces = reader.faces(range(1, reader.gallery().next_face_id))
        found = [
            (face.id, face.path, gallery.vault.vector(reader, generation, face.id)) for face in faces.values()
        ]
    return [(number, path, vector) for number, path, vector in found if vector is not None]


def photo(number: int, *, new: bool) -> Prepared | Outcome:
    if not new:
        return Outcome(f"/{number}.jpg", None, Status.KNOWN, number)
    return Prepared(
        (NewFace(None, f"/{number}.jpg", "0" * 64),), (np.full((32, 32, 3), number % 256, np.uint8),), 1
    )


def pieces_of(photos: list[Prepared | Outcome], size: int = 5) -> Iterator[list[Prepared | Outcome]]:
    return (photos[start : start + size] for start in range(0, len(photos), size))


def never() -> Embedder:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("asked", [1, 7, 64, None])
@pytest.mark.parametrize("beside_gpu", [False, True])
def test_a_number_that_is_asked_for_is_kept_and_a_cpu_takes_64_without_loading_a_model(
    asked: int | None, beside_gpu: bool
) -> None:
    batches = Batches(asked, never, beside_gpu=beside_gpu and asked is not None)
    photos = [photo(number, new=True) for number in range(150)]
    made = list(batches.gather(pieces_of(photos)))
    size = asked or 64
    assert batches.size == batches.largest == size
    assert [len(batch) for batch in made] == [min(size, 150 - start) for start in range(0, 150, size)]
    assert [one for batch in made for one in batch] == photos


def test_photos_that_are_not_embedded_do_not_count_up_to_512(on_gpu: Embedder) -> None:
    photos = [photo(number, new=number % 100 == 0) for number in range(1200)]
    made = list(Batches(4, never, beside_gpu=False).gather(pieces_of(photos)))
    assert [len(batch) for batch in made] == [301, 400, 400, 99]
    made = list(Batches(64, never, beside_gpu=False).gather(pieces_of(photos)))
    assert [len(batch) for batch in made] == [512, 512, 176]


def test_a_gpus_size_is_found_at_the_first_photos_that_are_enough_and_once(
    small: None, on_gpu: Embedder
) -> None:
    photos = [photo(number, new=True) for number in range(60)]
    batches = Batches(None, lambda: on_gpu, beside_gpu=True)
    stream = batches.gather(pieces_of(photos))
    assert (batches.size, on_gpu.tuned) == (4, False)
    first = next(stream)
    assert on_gpu.tuned
    # Passes of 2, 4 or 8, whichever is fastest here, for two lanes.
    assert batches.size == on_gpu.batch_size
    assert on_gpu.batch_size in (4, 8, 16)
    assert len(first) == max(8, on_gpu.batch_size)
    rest = list(stream)
    assert [one for batch in [first, *rest] for one in batch] == photos
    assert {len(batch) for batch in rest[:-1]} == {on_gpu.batch_size}
    on_gpu.tune = never  # type: ignore[method-assign, assignment]
    again = Batches(None, lambda: on_gpu, beside_gpu=True)
    assert len(next(again.gather(pieces_of(photos[:36])))) == on_gpu.batch_size


def test_where_a_gpus_memory_ended_batches_become_smaller_too(small: None, on_gpu: Embedder) -> None:
    batches = Batches(None, lambda: on_gpu, beside_gpu=True)
    stream = batches.gather(pieces_of([photo(number, new=True) for number in range(60)]))
    next(stream)
    on_gpu._run.pass_size = 1  # type: ignore[attr-defined]
    assert [len(next(stream)) for _ in range(3)] == [2, 2, 2]
    assert batches.size == 2


def test_fewer_photos_than_are_worth_it_are_embedded_without_the_seconds(
    small: None, on_gpu: Embedder
) -> None:
    batches = Batches(None, lambda: on_gpu, beside_gpu=True)
    made = list(batches.gather(pieces_of([photo(number, new=True) for number in range(7)])))
    assert ([len(batch) for batch in made], on_gpu.tuned) == ([7], False)


def test_a_machine_that_only_looks_like_one_with_a_gpu_takes_64(
    small: None, network: Network, bundle: ModelBundle
) -> None:
    embedder = embedder_of(network, bundle, "cpu")
    batches = Batches(None, lambda: embedder, beside_gpu=True)
    made = list(batches.gather(pieces_of([photo(number, new=True) for number in range(10)])))
    assert ([len(batch) for batch in made], batches.size, embedder.tuned) == ([4, 4, 2], 4, False)


def test_an_ingest_on_a_gpu_gives_the_rows_of_one_on_a_cpu_in_the_same_order(
    small: None, on_gpu: Embedder, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    with (
        Gallery.create(tmp_path / "cpu", bundle, device="cpu", engine="torch") as plain,
        gallery_of(tmp_path / "gpu", bundle, on_gpu) as quick,
    ):
        expected, outcomes = ingested(plain, faces, batch_size=5)
        report, found = ingested(quick, faces)
        assert found == outcomes
        for one, other in zip(rows_of(quick), rows_of(plain), strict=True):
            assert one[:2] == other[:2]
            np.testing.assert_allclose(one[2], other[2], rtol=1e-4, atol=1e-5)
        again, _ = ingested(quick, faces)
    assert (report.enrolled, again.known) == (36, 36)
    assert report.batch_size == report.summary()["batch_size"] == on_gpu.batch_size
    assert (expected.batch_size, expected.summary()["batch_size"]) == (5, 5)
    assert {stage.name: stage.workers for stage in report.stages}["embed"] == 2
    assert {stage.name: stage.workers for stage in expected.stages}["embed"] == 1


def test_a_run_over_what_is_known_loads_no_model_to_find_a_size(
    small: None, on_gpu: Embedder, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    with gallery_of(tmp_path / "gallery", bundle, on_gpu) as gallery:
        ingested(gallery, faces)
        gallery._model._embedder = None  # loading it would fail: there is no cuda
        for rehash in (False, True):
            report, _ = ingested(gallery, faces, rehash=rehash)
            assert (report.known, report.batch_size) == (36, 4)


def meeting(embedder: Embedder, calls: int) -> Callable[[np.ndarray[Any, Any]], Any]:
    """The embedder's method, in which the first calls wait for each other: one alone would time out."""
    together, embed, seen = threading.Barrier(calls, timeout=600), embedder.embed, iter(range(calls))

    def met(pixels: np.ndarray[Any, Any]) -> Any:
        if next(seen, None) is not None:
            together.wait()
        return embed(pixels)

    return met


def test_two_batches_are_embedded_at_a_time_beside_a_gpu(
    on_gpu: Embedder, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    on_gpu.embed = meeting(on_gpu, 2)  # type: ignore[method-assign]
    with gallery_of(tmp_path / "gallery", bundle, on_gpu) as gallery:
        report, outcomes = ingested(gallery, faces, batch_size=6)
    assert (report.enrolled, report.batch_size) == (36, 6)
    assert [one.path for one in outcomes] == sorted(str(path) for path in faces.glob("*/*.jpg"))


@pytest.mark.parametrize("batch_size", [None, 6])
def test_embedding_to_a_file_on_a_gpu_finds_its_size_too_and_keeps_two_in_flight(
    small: None,
    batch_size: int | None,
    on_gpu: Embedder,
    bundle: ModelBundle,
    faces: Path,
    tmp_path: Path,
) -> None:
    on_gpu.embed = meeting(on_gpu, 2)  # type: ignore[method-assign]
    report = embed(on_gpu, [faces], tmp_path / "out.npy", decoders=0, batch_size=batch_size)
    expected = embed(embedder_of_cpu(bundle), [faces], tmp_path / "cpu.npy")
    assert report.batch_size == (batch_size or on_gpu.batch_size)
    assert (report.embedded, expected.batch_size) == (36, 4)
    assert on_gpu.tuned == (batch_size is None)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "cpu.csv").read_bytes()
    one, other = np.load(tmp_path / "out.npy"), np.load(tmp_path / "cpu.npy")
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def embedder_of_cpu(bundle: ModelBundle) -> Embedder:
    return Embedder.open(bundle, device="cpu", engine="torch")


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="batch size must be at least 1"):
        Batches(0, never, beside_gpu=False)
