"""The `SearchEngine`: answers single queries of many callers in batches, exactly as `Gallery` answers them.

A photo passes three stages: threads read and decode photos side by side, one thread embeds all that are
decoded in one pass, and one thread searches for all that are embedded in one pass over the vectors. A batch
is whatever waits when a stage becomes free, so no query waits for another one to come. Embeddings and stored
faces go straight to the search.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.database.filters import Where
from retrieval.errors import GalleryDamaged, ModelMismatch, NotFound
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.image_search import ids_of_same_bytes, with_prediction
from retrieval.images.photo_reader import FaceImage, FaceSelection
from retrieval.index.knn import Explanation
from retrieval.index.searched import checked_vectors
from retrieval.search.answers import Answer, answer_of_found, answers_of_image
from retrieval.search.nearest import (
    Found,
    PeopleResult,
    SearchResult,
    faces_near_vectors,
    people_near_vectors,
    vector_of,
)
from retrieval.search.people import Rule
from retrieval.search.question import PeopleQuestion, PhotoQuestion
from retrieval.service.batching import BatchWorker, reject, resolve
from retrieval.service.photos import check_pixels, require_detector
from retrieval.service.settings import Limits
from retrieval.system.cpu import reading_threads
from retrieval.system.paths import readable

# The most photos that are embedded in one call, and the most queries that are searched for in one call.
_EMBED_BATCH: Final = 32
_SEARCH_BATCH: Final = 128

# Names that an unknown name is compared with: comparing many takes seconds, in which others wait.
_MAX_COMPARED_NAMES: Final = 1000

# How often a photo is read while the gallery switches models.
_ATTEMPTS: Final = 5

_ALL_FACES: Final = FaceSelection("all")

# Called with the name of a stage, the number of queries in a batch, and its seconds.
Observe: TypeAlias = Callable[[str, int, float], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a search; queries with equal ones are searched for together.

    Attributes:
        by_person: find people instead of photos.
        k, within, where, fpir, max_distance: see `PhotoSearchOptions`.
        rule, mean_of, photos: see `PeopleSearchOptions`.
    """

    by_person: bool = False
    k: int | None = 5
    within: float | None = None
    where: Where | None = None
    fpir: float | None = None
    max_distance: float | None = None
    rule: str = Rule.NEAREST
    mean_of: int = 3
    photos: int = 3

    def of_photos(self, explanation: Explanation) -> PhotoQuestion:
        """Returns the checked options of a search for photos; InputError where one is invalid."""
        return PhotoQuestion(
            self.k,
            within=self.within,
            where=self.where,
            explanation=explanation,
            fpir=self.fpir,
            max_distance=self.max_distance,
        )

    def of_people(self, explanation: Explanation) -> PeopleQuestion:
        """Returns the checked options of a search for people; InputError where one is invalid."""
        return PeopleQuestion(
            self.k or 1,
            rule=self.rule,
            mean_of=self.mean_of,
            photos=self.photos,
            where=self.where,
            explanation=explanation,
            fpir=self.fpir,
            max_distance=self.max_distance,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One query.

    Attributes:
        name: what its answers call it.
        content: the bytes of a photo, the id of a stored face, or an embedding (d,).
        asked: the options of the search.
        selection: which faces of a photo, for a model with a face detector.
        exclude_self: leave out the stored face with exactly the bytes of the photo.
        explain: measure what answering takes; the query is then searched for alone.
        bulk: let queries go first that are not.
    """

    name: str
    content: bytes | int | NDArray[np.float32]
    asked: Asked = Asked()
    selection: FaceSelection = _ALL_FACES
    exclude_self: bool = False
    explain: bool = False
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers to a query, one for each face of a photo, and what they took."""

    answers: tuple[Answer, ...]
    explanation: Explanation


@dataclass(slots=True, eq=False)
class _Task:
    """A query on its way through the stages.

    Attributes:
        generation: the number of the model's generation that the faces were read for.
        faces: of a photo.
        vectors: (n, d) float32, one for each face of a photo, or one.
        probabilities: (n, c) float32, of a photo.
        exclude: the ids of stored faces to leave out.
    """

    query: Query
    future: "Future[Answered]" = field(default_factory=Future)
    explanation: Explanation = field(default_factory=Explanation)
    attempts: int = 0
    generation: int | None = None
    faces: Sequence[FaceImage] = ()
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    probabilities: NDArray[np.float32] | None = None
    exclude: tuple[int, ...] = ()


class SearchEngine:
    """Answers queries of an open gallery, from any thread."""

    def __init__(
        self,
        gallery: Gallery,
        limits: Limits,
        *,
        observe: Observe = lambda stage, items, seconds: None,
    ) -> None:
        """Starts the threads.

        Args:
            gallery: the gallery; it outlives the engine.
            limits: of requests.
            observe: is told of each batch.
        """
        self._gallery = gallery
        self._model = gallery.model
        self._vault = gallery.vault
        self._limits = limits
        self._observe = observe
        self._readers = ThreadPoolExecutor(reading_threads(), thread_name_prefix="faceprint-read")
        self._embedding = BatchWorker("faceprint-embed", self._embed, max_items=_EMBED_BATCH, on_error=_fail)
        self._searching = BatchWorker(
            "faceprint-answer", self._search, max_items=_SEARCH_BATCH, on_error=_fail
        )

    def submit(self, query: Query) -> "Future[Answered]":
        """Returns the future answers to a query; cancelling it drops the query.

        The future raises what the search of `Gallery` for the same query raises.

        Raises:
            InputError: an option is invalid, or of no use with the gallery's model.
        """
        question = query.asked.of_people if query.asked.by_person else query.asked.of_photos
        question(Explanation())
        if isinstance(query.content, bytes):
            require_detector(self._gallery, query.selection)
        task = _Task(query)
        self._start(task)
        return task.future

    def close(self) -> None:
        """Answers what was submitted, and ends the threads."""
        self._readers.shutdown()
        self._embedding.close()
        self._searching.close()

    def _start(self, task: _Task) -> None:
        self._readers.submit(self._begin, task)

    def _begin(self, task: _Task) -> None:
        """Stage 1, in one of several threads: reads a photo, or finds the vector of another query."""
        if task.future.cancelled():
            return
        began = time.perf_counter()
        try:
            where = task.query.asked.where
            if where is not None and where.identities:
                self._require_identities(where.identities)
            if isinstance(task.query.content, bytes):
                self._read(task, task.query.content)
                self._embedding.put(task, bulk=task.query.bulk)
                self._observe("read", 1, time.perf_counter() - began)
            else:
                self._find_vector(task, task.query.content)
                self._searching.put(task, bulk=task.query.bulk)
        except BaseException as error:  # the caller waits for an answer, whatever happened
            reject(task.future, error)

    def _require_identities(self, names: tuple[str, ...]) -> None:
        """Checks that an identity has each of some names, current or former.

        Raises:
            NotFound: no identity has one of them; it states similar names where finding these takes little.
        """
        with self._vault.store.read() as reader:
            known = reader.identities_named(names)
            if all(name in known for name in names):
                return
            few = len(reader.people(limit=_MAX_COMPARED_NAMES + 1)) <= _MAX_COMPARED_NAMES
        if few:
            self._gallery.require_identities(names)
        unknown = next(name for name in names if name not in known)
        raise NotFound(f"There is no identity {readable(unknown)} in {self._vault.name}.")

    def _read(self, task: _Task, content: bytes) -> None:
        with task.explanation.timed("load"):
            self._model.current()
            task.generation, embedder = self._model.loaded()
        with task.explanation.timed("read"):
            check_pixels(content, self._limits)
            task.faces = embedder.photo_reader.read(
                content, task.query.selection, seconds=self._limits.photo_seconds
            )
        if task.query.exclude_self:
            [task.exclude] = ids_of_same_bytes(self._vault, [content])

    def _find_vector(self, task: _Task, content: "int | NDArray[np.float32]") -> None:
        if isinstance(content, int):
            task.vectors, task.exclude = vector_of(self._vault, content)[None], (content,)
            return
        # Checked alone: in a batch one wrong vector would fail the others.
        generation = self._model.current()
        task.vectors = checked_vectors(content[None], generation.dimension)

    def _embed(self, tasks: list[_Task]) -> None:
        """Stage 2, in one thread: embeds the faces of all photos of a batch in one call."""
        began = time.perf_counter()
        generation, embedder = self._model.loaded()
        tasks = list(self._ready(tasks, lambda task: task.generation == generation))
        if not tasks:
            return
        embedded = embedder.embed(np.stack([face.pixels for task in tasks for face in task.faces]))
        start = 0
        for task in tasks:
            rows = slice(start, start := start + len(task.faces))
            task.vectors, task.probabilities = embedded.vectors[rows], embedded.probabilities[rows]
            task.explanation.seconds["embed"] = time.perf_counter() - began
            self._searching.put(task, bulk=task.query.bulk)
        self._observe("embed", len(tasks), time.perf_counter() - began)

    def _ready(self, tasks: Sequence[_Task], is_current: Callable[[_Task], bool]) -> Iterator[_Task]:
        """Yields the tasks to go on with; those of a former model are read again."""
        for task in tasks:
            if task.future.cancelled():
                continue
            if is_current(task):
                yield task
            else:
                self._start_again(task)

    def _start_again(self, task: _Task) -> None:
        task.attempts += 1
        if task.attempts < _ATTEMPTS:
            self._start(task)
        else:
            folder = self._vault.name
            reject(task.future, GalleryDamaged(f"The model of {folder} changes faster than it can be asked."))

    def _search(self, tasks: list[_Task]) -> None:
        """Stage 3, in one thread: one search for all queries with equal options."""
        began = time.perf_counter()
        groups: dict[Any, list[_Task]] = {}
        for task in tasks:
            if not task.future.cancelled():
                alone = id(task) if task.query.explain else None
                groups.setdefault((task.query.asked, task.generation, alone), []).append(task)
        for group in groups.values():
            try:
                self._search_for_group(group)
            except ModelMismatch:
                for task in group:
                    self._start_again(task)
            except BaseException as error:  # the other groups must get their answers
                _fail(group, error)
        self._observe("search", len(tasks), time.perf_counter() - began)

    def _search_for_group(self, group: list[_Task]) -> None:
        """Searches for queries of one generation with equal options.

        Raises:
            ModelMismatch: the gallery switched models meanwhile.
        """
        asked, generation = group[0].query.asked, group[0].generation
        vectors = np.concatenate([task.vectors for task in group])
        exclude = [task.exclude for task in group for _ in task.vectors]
        some = exclude if any(exclude) else None
        explanation = group[0].explanation
        found: Sequence[Found[Any]]
        if asked.by_person:
            people = asked.of_people(explanation)
            found = people_near_vectors(self._vault, vectors, some, asked=people, generation=generation)
        else:
            photos = asked.of_photos(explanation)
            found = faces_near_vectors(self._vault, vectors, some, asked=photos, generation=generation)
        labels = self._model.bundle.labels
        following: Iterator[Found[Any]] = iter(found)
        for task in group:
            answers = tuple(_answers(task, [next(following) for _ in task.vectors], labels))
            resolve(task.future, Answered(answers, task.explanation))


def _answers(task: _Task, found: Sequence[Found[Any]], labels: Sequence[str]) -> Iterator[Answer]:
    query = task.query
    if task.probabilities is None:
        yield from (answer_of_found(query.name, one, query.asked.by_person) for one in found)
        return
    kind: Any = PeopleResult if query.asked.by_person else SearchResult
    predicted = map(partial(with_prediction, labels), found, task.probabilities)
    results = [kind(*one, face.face) for one, face in zip(predicted, task.faces, strict=True)]
    yield from answers_of_image(query.name, None, results)


def _fail(tasks: Sequence[_Task], error: BaseException) -> None:
    for task in tasks:
        reject(task.future, error)
