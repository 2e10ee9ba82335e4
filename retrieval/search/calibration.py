"""Calibration: finds the distance threshold of a gallery from distances of non-mated searches.

A stranger's search names somebody as soon as the nearest of all enrolled faces is near enough, so the
threshold belongs to the gallery at its size and not to the model: the more faces, the nearer the nearest.
It is set by searches of people who are not enrolled. Without such photos the gallery answers for itself: each
enrolled face is searched for among the faces of everybody else. What the threshold costs is measured by
searching for each enrolled face among all others (leave one out).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval import rates
from retrieval.database.reader import Reader
from retrieval.database.records import Calibration, Generation, OperatingPoint, utc_now
from retrieval.errors import InputError, Interrupted, ModelMismatch
from retrieval.index.knn import Ids, Neighbours
from retrieval.index.segments import Vectors
from retrieval.models.bundle import FORGOTTEN
from retrieval.search.decisions import Nearest, check_fpir, two_nearest
from retrieval.storage.vault import State, Vault

# The rates at which thresholds are kept beside the one that was asked for, as far as searches are enough.
USUAL: Final = (0.1, 0.03, 0.01, 0.003, 0.001)

# How many enrolled faces are searched for, unless it is said.
SAMPLE: Final = 10_000

# How many searches share a snapshot: nobody who erases has to wait for longer.
_TOGETHER: Final = 256

# Below how many strangers a bootstrap over them is no good measure.
_FEW_PEOPLE: Final = 30

PHOTOS: Final = "photos"
GALLERY: Final = "gallery"

# Photos of strangers: vectors (n, d), and whose each is, None where nobody said.
Strangers: TypeAlias = Iterable[tuple[NDArray[Any], Sequence[str | None]]]


@dataclass(frozen=True, slots=True)
class _Searches:
    """Searches of strangers.

    Attributes:
        distances: (n,) float64, to the nearest face of anybody who is enrolled.
        people: (n,) int64, who was searched for; each photo by itself where nobody said.
        named: the names of those of whom somebody said it.
    """

    distances: NDArray[np.float64]
    people: NDArray[np.int64]
    named: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Enrolled:
    """Searches of enrolled faces among all others.

    Attributes:
        own: (n,) int64, whose they are.
        nearest: the two nearest people to each.
        mated: (n,) whether their person has another face.
    """

    own: NDArray[np.int64]
    nearest: Nearest
    mated: NDArray[np.bool_]

    def among_others(self) -> NDArray[np.float64]:
        """(n,) distances to the nearest face of somebody else, as if their person were not enrolled."""
        people, distances = self.nearest.people, self.nearest.distances
        return np.where(people[:, 0] == self.own, distances[:, 1], distances[:, 0])


@dataclass(frozen=True, slots=True)
class _Gallery:
    """A gallery as it is when its calibration begins; `owners` are (n, 2): faces and their people."""

    generation: Generation
    faces: int
    owners: NDArray[np.int64]


def calibrate(
    vault: Vault,
    fpir: float,
    *,
    strangers: Strangers | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Calibration:
    """Finds the thresholds of a gallery and stores them; from then on its searches decide by them.

    Args:
        vault: the gallery's; others may enroll, forget and search meanwhile.
        fpir: the share of strangers' searches that may name somebody.
        strangers: embeddings of people who are not enrolled; None lets the gallery answer for itself.
        sample: how many enrolled faces are searched for at most.
        seed: of the sample and of the intervals.
        on_progress: called with the enrolled faces that were searched for and all that will be.
        should_stop: asked between searches.

    Raises:
        InputError: too few searches for this rate, or fewer than two people are enrolled.
        Interrupted: it was stopped; nothing was stored.
        ModelMismatch: the gallery went over to another model meanwhile; nothing was stored.
        StorageError, GalleryBusy: nothing was stored.
    """
    check_fpir(fpir)
    if sample < 1:
        raise InputError(f"The sample must have at least 1 face, not {sample}.")
    gallery = vault.on_a_snapshot(lambda reader: _gallery(vault, reader))
    others = None if strangers is None else _of_strangers(vault, gallery, strangers)
    if others is not None:
        check_enough(fpir, len(others.distances))
    enrolled = _leave_one_out(vault, gallery, sample, seed, on_progress, should_stop)
    searches = _of_the_gallery(vault, enrolled) if others is None else others
    check_enough(fpir, len(searches.distances))
    found = Calibration(
        generation=gallery.generation.id,
        fingerprint=gallery.generation.fingerprint,
        found_at=utc_now(),
        strangers=GALLERY if strangers is None else PHOTOS,
        faces=gallery.faces,
        identities=len(np.unique(gallery.owners[:, 1])),
        searches=len(searches.distances),
        people=len(searches.named),
        trained=len(searches.named & _labels(vault, gallery.generation)),
        fpir=fpir,
        points=_points(fpir, searches, enrolled, seed),
    )
    store(vault, found)
    return found


def store(vault: Vault, found: Calibration) -> None:
    """Makes a gallery's searches decide by a calibration, in one transaction.

    Raises:
        ModelMismatch: the gallery went over to another model meanwhile.
        StorageError, GalleryBusy: nothing was stored.
    """
    with vault.writing() as writer:
        if vault.serving(writer).id != found.generation:
            raise _went_over(vault)
        writer.set_calibration(found)
        detail: dict[str, Any] = {"fpir": found.fpir, "strangers": found.strangers}
        vault.log(writer, "calibrate", faces=found.faces, searches=found.searches, **detail)


def check_enough(fpir: float, searches: int) -> None:
    """Checks that a rate can be measured by so many searches.

    Raises:
        InputError: not even one of them may name somebody.
    """
    if not searches:
        raise InputError("There is not one search of a stranger to calibrate by; name other photos.")
    if _is_enough(fpir, searches):
        return
    possible = [one for one in USUAL if _is_enough(one, searches)]
    instead = f", or ask for `fpir={possible[-1]:g}`" if possible else ""
    raise InputError(
        f"An FPIR of {fpir:g} needs {math.ceil(1 / fpir - 1e-9):,} searches of strangers or more, and there "
        f"are {searches:,}; name more photos with `strangers`{instead}."
    )


def _is_enough(fpir: float, searches: int) -> bool:
    return fpir * searches >= 1 - 1e-9


def _went_over(vault: Vault) -> ModelMismatch:
    return ModelMismatch(
        f"The gallery {vault.folder} went over to another model meanwhile; calibrate it again."
    )


def _gallery(vault: Vault, reader: Reader) -> _Gallery:
    state, owners = vault.state(reader), reader.identity_of_every_face()
    if len(np.unique(owners[:, 1])) < 2:
        raise InputError(
            f"{vault.folder} has faces of fewer than two people; enroll more before it is calibrated."
        )
    return _Gallery(state.generation, state.faces, owners)


def _labels(vault: Vault, generation: Generation) -> set[str]:
    """Whom the model was trained on, as far as they are known by name today."""
    with vault.store.read() as reader:
        return set(vault.bundle(reader, generation).labels) - {FORGOTTEN}


def _of_strangers(vault: Vault, gallery: _Gallery, strangers: Strangers) -> _Searches:
    distances: list[NDArray[np.float64]] = [np.empty(0)]
    names: list[str | None] = []
    for vectors, whose in strangers:
        if len(vectors) != len(whose):
            raise InputError(f"{len(whose):,} strangers came with {len(vectors):,} vectors.")
        for start in range(0, len(vectors), _TOGETHER):
            some = vectors[start : start + _TOGETHER]
            found = vault.on_a_snapshot(partial(_search, vault, gallery, some, None))
            distances.append(found.distances[:, 0])
        names += whose
    numbers = {name: number for number, name in enumerate(sorted({n for n in names if n is not None}))}
    people = [len(numbers) + row if name is None else numbers[name] for row, name in enumerate(names)]
    return _Searches(np.concatenate(distances), np.array(people, np.int64), frozenset(numbers))


def _of_the_gallery(vault: Vault, enrolled: _Enrolled) -> _Searches:
    with vault.store.read() as reader:
        names = reader.names_of_identities(set(enrolled.own.tolist()))
    return _Searches(enrolled.among_others(), enrolled.own, frozenset(names.values()))


def _leave_one_out(
    vault: Vault,
    gallery: _Gallery,
    sample: int,
    seed: int,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> _Enrolled:
    """Searches for enrolled faces among all others, some of them for each snapshot."""
    owners = gallery.owners
    rows = np.random.default_rng(seed).choice(len(owners), min(sample, len(owners)), replace=False)
    chosen = owners[np.sort(rows)]
    parts: list[tuple[NDArray[np.int64], Nearest]] = []
    for start in range(0, len(chosen), _TOGETHER):
        if should_stop():
            raise Interrupted("Stopped; the gallery's thresholds are what they were.")
        ids = chosen[start : start + _TOGETHER, 0]
        parts.append(vault.on_a_snapshot(partial(_search_again, vault, gallery, ids)))
        on_progress(min(start + _TOGETHER, len(chosen)), len(chosen))
    own = np.concatenate([people for people, _ in parts])
    people, counts = np.unique(owners[:, 1], return_counts=True)
    return _Enrolled(
        own,
        Nearest(
            np.concatenate([found.people for _, found in parts]),
            np.concatenate([found.distances for _, found in parts]),
        ),
        np.isin(own, people[counts > 1]),
    )


def _search_again(
    vault: Vault, gallery: _Gallery, ids: Ids, reader: Reader
) -> tuple[NDArray[np.int64], Nearest]:
    """Searches for those of some faces that are still there; whose they are, and who is nearest."""
    owners = reader.identities_of_faces(ids.tolist())
    state = _same(vault, gallery, reader)
    there, vectors = _vectors(vault, state, np.array(sorted(owners), np.int64))
    own = np.array([owners[number] for number in there.tolist()], np.int64)
    return own, _search(vault, gallery, vectors, there.tolist(), reader)


def _search(
    vault: Vault,
    gallery: _Gallery,
    vectors: NDArray[Any],
    exclude: Sequence[int | None] | None,
    reader: Reader,
) -> Nearest:
    """The two nearest people to each vector, of a snapshot."""
    state = _same(vault, gallery, reader)
    flat = vault.vectors(state.generation)
    queries = flat.checked(vectors)
    left_out = [None] * len(queries) if exclude is None else exclude

    def ask(places: Sequence[int], count: int, allowed: Ids | None) -> list[Neighbours]:
        return flat.search(
            state.segments,
            queries[list(places)],
            count,
            coded=state.coded,
            allowed=allowed,
            exclude=[left_out[place] for place in places],
        )

    nothing = (np.empty(0), np.empty(0, np.int64))
    return two_nearest(reader, ask, [nothing] * len(queries))


def _same(vault: Vault, gallery: _Gallery, reader: Reader) -> State:
    """What a snapshot is, of the same model.

    Raises:
        ModelMismatch: it is of another one.
    """
    state = vault.state(reader)
    if state.generation.id != gallery.generation.id:
        raise _went_over(vault)
    return state


def _vectors(vault: Vault, state: State, ids: Ids) -> tuple[Ids, Vectors]:
    """The vectors (n, d) of some faces, as they come, with their ids."""
    flat = vault.vectors(state.generation)
    found = [np.empty(0, np.int64)]
    vectors = [np.empty((0, state.generation.dimension), np.float32)]
    for segment in state.segments:
        stored, matrix = flat.rows(segment)
        rows = np.flatnonzero(np.isin(stored, ids))
        found.append(stored[rows])
        vectors.append(matrix[rows])
    return np.concatenate(found), np.concatenate(vectors)


def _points(fpir: float, searches: _Searches, enrolled: _Enrolled, seed: int) -> tuple[OperatingPoint, ...]:
    """The operating points that can be measured, by falling rate."""
    usual = (one for one in USUAL if not math.isclose(one, fpir) and _is_enough(one, len(searches.distances)))
    wanted = sorted([fpir, *usual], reverse=True)
    limits = np.array([rates.threshold(searches.distances, one) for one in wanted])
    seen = rates.by_identity(searches.distances[:, None] <= limits, searches.people, seed=seed)
    mated = enrolled.mated
    own, nearest = enrolled.own[mated], enrolled.nearest
    wrong = nearest.people[mated, 0] != own
    missed = wrong[:, None] | (nearest.distances[mated, 0][:, None] > limits)
    lost = rates.by_identity(missed, own, seed=seed)
    next_ones = rates.upcoming(searches.distances, searches.people, limits, seed=seed)
    return tuple(
        OperatingPoint(one, float(at), share, rate, upcoming)
        for one, at, share, rate, upcoming in zip(wanted, limits, seen, lost, next_ones, strict=True)
    )


def foretold(point: OperatingPoint) -> str:
    """In words, what an operating point makes one expect of the next searches of strangers."""
    if point.upcoming is None:
        return "how many of the next strangers' searches may be given a name is not known: calibrate again"
    return point.upcoming.in_words()


def remarks(found: Calibration, learned: int = 0) -> list[str]:
    """What a person should know before they trust a calibration, in sentences.

    Args:
        found: the calibration.
        learned: how many of the enrolled people the model was trained on.
    """
    return list(_remarks(found, learned))


def _remarks(found: Calibration, learned: int) -> Iterator[str]:
    if found.strangers == GALLERY:
        yield (
            f"Strangers were played by the gallery's own {found.people:,} people, each searched for among "
            "the others. Real ones may be nearer or farther: photos of other cameras and places are mostly "
            "farther, relatives and one person under two names nearer. Photos of strangers (--strangers) "
            "are surer."
        )
    if found.trained:
        yield (
            f"The model was trained on {found.trained:,} of the {found.people:,} people who were the "
            "strangers, and learned to hold them apart: the FPIRs are optimistic, for people whom it has "
            "never seen come nearer."
        )
    if learned:
        yield (
            f"The model was trained on {learned:,} of the enrolled people, maybe on these very photos, and "
            "finds those more easily than new ones: the FNIRs are optimistic. `faceprint evaluate --protocol "
            "open` measures it with photos that were held out."
        )
    if found.strangers == PHOTOS and not found.people:
        yield (
            "Nobody said who is on the strangers' photos, so each photo counts as a person of its own. Where "
            "there are several of one person the intervals are optimistic: they ought to be wider."
        )
    if 0 < found.people < _FEW_PEOPLE:
        yield f"Only {found.people:,} people were the strangers: the intervals themselves are uncertain."
