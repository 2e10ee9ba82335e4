"""The worker makes batches of what waits, and the engine answers each query of a batch for itself."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrieval import FaceSelection, Gallery, UnreadableImage
from retrieval.errors import InputError, NotFound
from retrieval.service.batching import BatchWorker, reject, resolve
from retrieval.service.engine import Answered, Asked, Query, SearchEngine
from retrieval.service.settings import Limits


class Batches:
    """Collects batches; the first one goes on only when `go` is set."""

    def __init__(self, most: int) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.done: list[list[int]] = []
        self.failed: list[tuple[list[int], BaseException]] = []
        self.worker = BatchWorker("test", self.work, max_items=most, on_error=self.fail)

    def work(self, batch: list[int]) -> None:
        self.begun.set()
        self.go.wait()
        if -1 in batch:
            raise ValueError("bad")
        self.done.append(batch)

    def fail(self, batch: list[int], error: BaseException) -> None:
        self.failed.append((batch, error))


def test_an_item_is_worked_on_alone_at_once_and_those_that_come_meanwhile_together() -> None:
    batches = Batches(most=3)
    batches.worker.put(0)
    batches.begun.wait()
    for number in range(1, 6):
        batches.worker.put(number)
    batches.go.set()
    batches.worker.close()
    assert batches.done == [[0], [1, 2, 3], [4, 5]]


def test_an_error_fails_its_batch_alone() -> None:
    batches = Batches(most=2)
    batches.worker.put(0)
    batches.begun.wait()
    for number in (1, -1, 2, 3):
        batches.worker.put(number)
    batches.go.set()
    batches.worker.close()
    assert batches.done == [[0], [2, 3]]
    [(batch, error)] = batches.failed
    assert batch == [1, -1]
    assert str(error) == "bad"


def test_a_result_for_one_who_has_gone_is_dropped() -> None:
    future: Future[int] = Future()
    future.cancel()
    resolve(future, 1)
    reject(future, ValueError())
    assert future.cancelled()


@pytest.fixture
def engine(enrolled: Path) -> Iterator[SearchEngine]:
    with Gallery.open(enrolled) as gallery:
        made = SearchEngine(gallery, Limits(pixels=100_000))
        yield made
        made.close()


def asked_together(engine: SearchEngine, *queries: Query) -> list[Any]:
    """The result or the error of each query; all are submitted before the first answer is taken."""
    futures = [engine.submit(query) for query in queries]
    return [future.exception(60) or future.result(60) for future in futures]


def test_wrong_queries_fail_alone(engine: SearchEngine, faces: Path) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0].read_bytes()
    good, cut, missing, short, infinite, stored = asked_together(
        engine,
        Query("a", photo),
        Query("b", photo[:200]),
        Query("c", 4711),
        Query("d", np.ones(5, np.float32)),
        Query("e", np.full(2048, np.inf, np.float32)),
        Query("f", 1),
    )
    assert isinstance(good, Answered)
    assert isinstance(stored, Answered)
    assert [type(one) for one in (cut, missing, short, infinite)] == [
        UnreadableImage,
        NotFound,
        InputError,
        InputError,
    ]


def test_a_photo_with_too_many_pixels_is_refused_by_its_header(engine: SearchEngine, tmp_path: Path) -> None:
    Image.new("L", (400, 300)).save(tmp_path / "large.png")
    [error] = asked_together(engine, Query("large", (tmp_path / "large.png").read_bytes()))
    assert isinstance(error, UnreadableImage)
    assert (error.reason, "120,000 pixels, and 100,000 is the limit" in str(error)) == (
        "too-many-pixels",
        True,
    )


def test_options_that_cannot_be_are_refused_at_once(engine: SearchEngine) -> None:
    for asked in (Asked(k=0), Asked(fpir=0.7), Asked(by_person=True, mean_of=0)):
        with pytest.raises(InputError):
            engine.submit(Query("face 1", 1, asked))
    with pytest.raises(InputError, match="has no face detector"):
        engine.submit(Query("photo", b"", selection=FaceSelection("all", min_side=50)))


def test_a_switch_of_the_model_between_the_stages_reads_the_photo_again(
    own_gallery: Path, faces: Path, imported: Any
) -> None:
    """Queries that are asked while the gallery switches models are all answered, by the one or the other."""
    photo = sorted(faces.glob("*/*.jpg"))[0].read_bytes()
    with Gallery.open(own_gallery) as gallery, Gallery.open(own_gallery) as other:
        engine = SearchEngine(gallery, Limits())
        before = engine.submit(Query("image", photo)).result(60).answers[0]
        switching = threading.Thread(target=other.reembed, args=(imported,))
        switching.start()
        meanwhile = []
        while switching.is_alive():
            meanwhile.append(engine.submit(Query("image", photo)).result(60).answers[0])
        switching.join()
        after = engine.submit(Query("image", photo)).result(60).answers[0]
        engine.close()
    assert before.prediction is not None
    assert after.prediction is None
    assert all(one in (before, after) for one in meanwhile)
    assert [answer.matches[0].distance for answer in (before, after)] == [0.0, 0.0]  # type: ignore[index]
