"""Calibration, for `Gallery.calibrate`: finds a gallery's distance threshold from non-mated searches.

A non-mated search returns an identity as soon as the nearest of all enrolled faces is near enough. The more
faces are enrolled, the nearer is the nearest. A threshold is therefore valid for a gallery at its size, not
for a model. It is derived from searches for people who are not enrolled (strangers). Without photos of
strangers, each enrolled face is searched for among the faces of other identities instead. The FNIR of the
threshold is measured by searching for each enrolled face among all other faces (leave one out).
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
from retrieval.index.segments import Exclude
from retrieval.models.bundle import FORGOTTEN
from retrieval.search.decisions import Nearest, check_fpir, two_nearest
from retrieval.storage.any_vault import AnyVault, State

# The FPIRs for which thresholds are stored beside the requested one, if there are enough searches.
USUAL: Final = (0.1, 0.03, 0.01, 0.003, 0.001)

# The default number of enrolled faces that are searched for.
SAMPLE: Final = 10_000

# Searches per snapshot. An erasure waits until the snapshot ends, so this bounds its wait.
_SEARCH_BATCH: Final = 256

# With fewer strangers, a bootstrap over them is unreliable.
_MIN_BOOTSTRAP_PEOPLE: Final = 30

# The least FPIR for which an error counts the searches that it needs.
_LEAST_COUNTED: Final = 1e-12

PHOTOS: Final = "photos"
GALLERY: Final = "gallery"

# Batches of photos of strangers: vectors (n, d), and the name of the person of each; None if it is unknown.
Strangers: TypeAlias = Iterable[tuple[NDArray[Any], Sequence[str | None]]]


@dataclass(frozen=True, slots=True)
class _NonMatedSearches:
    """The results of non-mated searches.

    Attributes:
        distances: (n,) float64, to the nearest enrolled face with an identity.
        people: (n,) int64, the number of the person of each probe; a number of its own if the person is
            unknown.
        named: the names of the known persons.
    """

    distances: NDArray[np.float64]
    people: NDArray[np.int64]
    named: frozenset[str]


@dataclass(frozen=True, slots=True)
class _EnrolledSearches:
    """The results of searches for enrolled faces among all other faces.

    Attributes:
        own: (n,) int64, the number of each face's identity.
        nearest: the two nearest identities to each face.
        mated: (n,) whether the identity has another face.
    """

    own: NDArray[np.int64]
    nearest: Nearest
    mated: NDArray[np.bool_]

    def among_others(self) -> NDArray[np.float64]:
        """(n,) distances to the nearest face of another identity, as if its own were not enrolled."""
        people, distances = self.nearest.people, self.nearest.distances
        return np.where(people[:, 0] == self.own, distances[:, 1], distances[:, 0])


@dataclass(frozen=True, slots=True)
class _GalleryState:
    """The state of a gallery at the start of its calibration.

    Attributes:
        generation: the active model's.
        faces: number of faces.
        owners: (n, 2) face ids and identity numbers of all faces with an identity.
    """

    generation: Generation
    faces: int
    owners: NDArray[np.int64]


def calibrate(
    vault: AnyVault,
    fpir: float,
    *,
    strangers: Strangers | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Calibration:
    """Finds the thresholds of a gallery, stores them for its searches, and returns the calibration.

    Args:
        vault: the gallery's; other threads and processes may enroll, forget and search meanwhile.
        fpir: the share of non-mated searches that may return an identity, above 0 and at most 0.5.
        strangers: batches of embeddings (n, d) of people who are not enrolled, with a name or None for each;
            None uses the enrolled faces instead.
        sample: greatest number of enrolled faces that are searched for, at least 1.
        seed: random seed of the sample and of the intervals.
        on_progress: called with the number of enrolled faces searched for so far, and of all in the sample.
        should_stop: called between batches of searches; a true result interrupts the calibration.

    Raises:
        InputError: there are too few searches for this rate, or fewer than two identities are enrolled.
        Interrupted: `should_stop` returned true; nothing was stored.
        ModelMismatch: the gallery switched models meanwhile; nothing was stored.
        StorageError, GalleryBusy: nothing was stored.
    """
    check_fpir(fpir)
    if sample < 1:
        raise InputError(f"The sample must have at least 1 face, not {sample}.")
    gallery = vault.on_a_snapshot(lambda reader: _gallery_state(vault, reader))
    others = None if strangers is None else _search_strangers(vault, gallery, strangers)
    if others is not None:
        check_enough(fpir, len(others.distances))
    enrolled = _leave_one_out(vault, gallery, sample, seed, on_progress, should_stop)
    searches = _non_mated_of_enrolled(vault, enrolled) if others is None else others
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


def store(vault: AnyVault, found: Calibration) -> None:
    """Stores a calibration in one transaction; searches of the gallery decide by it from then on.

    Raises:
        ModelMismatch: the gallery switched models meanwhile.
        StorageError, GalleryBusy: nothing was stored.
    """
    with vault.writing() as writer:
        if vault.serving(writer).id != found.generation:
            raise _model_switched(vault)
        writer.set_calibration(found)
        detail: dict[str, Any] = {"fpir": found.fpir, "strangers": found.strangers}
        vault.log(writer, "calibrate", faces=found.faces, searches=found.searches, **detail)


def check_enough(fpir: float, searches: int) -> None:
    """Checks that an FPIR can be measured with a number of non-mated searches.

    Raises:
        InputError: at this rate, less than one of the searches may return an identity.
    """
    if not searches:
        raise InputError("There is not one search of a stranger to calibrate by; name other photos.")
    if _is_enough(fpir, searches):
        return
    possible = [one for one in USUAL if _is_enough(one, searches)]
    instead = f", or ask for `fpir={possible[-1]:g}`" if possible else ""
    raise InputError(
        f"An FPIR of {fpir:g} needs {_needed(fpir)} searches of strangers or more, and there are "
        f"{searches:,}; name more photos with `strangers`{instead}."
    )


def _needed(fpir: float) -> str:
    """Returns how many searches an FPIR needs, in words; the reciprocal of the least numbers is infinite."""
    return f"{math.ceil(1 / fpir - 1e-9):,}" if fpir > _LEAST_COUNTED else "more than a trillion"


def _is_enough(fpir: float, searches: int) -> bool:
    return fpir * searches >= 1 - 1e-9


def _model_switched(vault: AnyVault) -> ModelMismatch:
    return ModelMismatch(f"The gallery {vault.name} switched models meanwhile; calibrate it again.")


def _gallery_state(vault: AnyVault, reader: Reader) -> _GalleryState:
    state, owners = vault.state(reader), reader.identity_of_every_face()
    if len(np.unique(owners[:, 1])) < 2:
        raise InputError(
            f"{vault.name} has faces of fewer than two people; enroll more before it is calibrated."
        )
    return _GalleryState(state.generation, state.faces, owners)


def _labels(vault: AnyVault, generation: Generation) -> set[str]:
    """The names of the people that the model was trained on, except forgotten ones."""
    with vault.store.read() as reader:
        return set(vault.bundle(reader, generation).labels) - {FORGOTTEN}


def _search_strangers(vault: AnyVault, gallery: _GalleryState, strangers: Strangers) -> _NonMatedSearches:
    distances: list[NDArray[np.float64]] = [np.empty(0)]
    names: list[str | None] = []
    for vectors, batch_names in strangers:
        if len(vectors) != len(batch_names):
            raise InputError(f"{len(batch_names):,} strangers came with {len(vectors):,} vectors.")
        for start in range(0, len(vectors), _SEARCH_BATCH):
            some = vectors[start : start + _SEARCH_BATCH]
            found = vault.on_a_snapshot(partial(_search_two_nearest, vault, gallery, some, None))
            distances.append(found.distances[:, 0])
        names += batch_names
    numbers = {name: number for number, name in enumerate(sorted({n for n in names if n is not None}))}
    people = [len(numbers) + row if name is None else numbers[name] for row, name in enumerate(names)]
    return _NonMatedSearches(np.concatenate(distances), np.array(people, np.int64), frozenset(numbers))


def _non_mated_of_enrolled(vault: AnyVault, enrolled: _EnrolledSearches) -> _NonMatedSearches:
    with vault.store.read() as reader:
        names = reader.names_of_identities(set(enrolled.own.tolist()))
    return _NonMatedSearches(enrolled.among_others(), enrolled.own, frozenset(names.values()))


def _leave_one_out(
    vault: AnyVault,
    gallery: _GalleryState,
    sample: int,
    seed: int,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> _EnrolledSearches:
    """Searches for a sample of enrolled faces among all other faces, in one snapshot per batch."""
    owners = gallery.owners
    rows = np.random.default_rng(seed).choice(len(owners), min(sample, len(owners)), replace=False)
    chosen = owners[np.sort(rows)]
    parts: list[tuple[NDArray[np.int64], Nearest]] = []
    for start in range(0, len(chosen), _SEARCH_BATCH):
        if should_stop():
            raise Interrupted("Stopped; the gallery's thresholds are what they were.")
        ids = chosen[start : start + _SEARCH_BATCH, 0]
        parts.append(vault.on_a_snapshot(partial(_search_stored, vault, gallery, ids)))
        on_progress(min(start + _SEARCH_BATCH, len(chosen)), len(chosen))
    own = np.concatenate([people for people, _ in parts])
    people, counts = np.unique(owners[:, 1], return_counts=True)
    return _EnrolledSearches(
        own,
        Nearest(
            np.concatenate([found.people for _, found in parts]),
            np.concatenate([found.distances for _, found in parts]),
        ),
        np.isin(own, people[counts > 1]),
    )


def _search_stored(
    vault: AnyVault, gallery: _GalleryState, ids: Ids, reader: Reader
) -> tuple[NDArray[np.int64], Nearest]:
    """Searches for stored faces by id, except removed ones; returns their identities and the two nearest."""
    owners = reader.identities_of_faces(ids.tolist())
    state = _state_of_same_model(vault, gallery, reader)
    there, vectors = state.vectors.some(np.array(sorted(owners), np.int64))
    own = np.array([owners[number] for number in there.tolist()], np.int64)
    return own, _search_two_nearest(vault, gallery, vectors, [(number,) for number in there.tolist()], reader)


def _search_two_nearest(
    vault: AnyVault,
    gallery: _GalleryState,
    vectors: NDArray[Any],
    exclude: Exclude,
    reader: Reader,
) -> Nearest:
    """The two nearest identities to each vector, in a snapshot.

    Raises:
        ModelMismatch: the snapshot is of another model.
    """
    state = _state_of_same_model(vault, gallery, reader)
    queries = state.vectors.checked(vectors)
    left_out = [()] * len(queries) if exclude is None else exclude

    def ask(places: Sequence[int], count: int, allowed: Ids | None) -> list[Neighbours]:
        some = [left_out[place] for place in places]
        return state.vectors.nearest(queries[list(places)], count, allowed=allowed, exclude=some)

    nothing = (np.empty(0), np.empty(0, np.int64))
    return two_nearest(reader, ask, [nothing] * len(queries))


def _state_of_same_model(vault: AnyVault, gallery: _GalleryState, reader: Reader) -> State:
    """The state of a snapshot, which must be of the calibrated model.

    Raises:
        ModelMismatch: the snapshot is of another model.
    """
    state = vault.state(reader)
    if state.generation.id != gallery.generation.id:
        raise _model_switched(vault)
    return state


def _points(
    fpir: float, searches: _NonMatedSearches, enrolled: _EnrolledSearches, seed: int
) -> tuple[OperatingPoint, ...]:
    """The operating points that can be measured, by descending FPIR."""
    usual = (one for one in USUAL if not math.isclose(one, fpir) and _is_enough(one, len(searches.distances)))
    wanted = sorted([fpir, *usual], reverse=True)
    limits = np.array([rates.threshold(searches.distances, one) for one in wanted])
    measured = rates.by_identity(searches.distances[:, None] <= limits, searches.people, seed=seed)
    mated = enrolled.mated
    own, nearest = enrolled.own[mated], enrolled.nearest
    wrong = nearest.people[mated, 0] != own
    missed = wrong[:, None] | (nearest.distances[mated, 0][:, None] > limits)
    fnirs = rates.by_identity(missed, own, seed=seed)
    expected = rates.upcoming(searches.distances, searches.people, limits, seed=seed)
    return tuple(
        OperatingPoint(one, float(at), share, rate, upcoming)
        for one, at, share, rate, upcoming in zip(wanted, limits, measured, fnirs, expected, strict=True)
    )


def foretold(point: OperatingPoint) -> str:
    """Returns a sentence part: the expected result of the next non-mated searches at an operating point."""
    if point.upcoming is None:
        return "how many of the next strangers' searches may be given a name is not known: calibrate again"
    return point.upcoming.in_words()


def remarks(found: Calibration, learned: int = 0) -> list[str]:
    """Returns sentences that state the limits of a calibration, for users.

    Args:
        found: the calibration.
        learned: number of enrolled identities that the model was trained on.
    """
    return list(_remarks(found, learned))


def _remarks(found: Calibration, learned: int) -> Iterator[str]:
    if found.strangers == GALLERY:
        yield (
            f"Strangers were played by the gallery's own {found.people:,} people, each searched for among "
            "the others. Real ones may be nearer or farther: photos of other cameras and places are mostly "
            "farther, relatives and one person under two names nearer. Photos of strangers (`strangers`) "
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
            "The strangers' photos have no identities, so each photo counts as a person of its own. If there "
            "are several of one person, the intervals are too narrow."
        )
    if 0 < found.people < _MIN_BOOTSTRAP_PEOPLE:
        yield f"Only {found.people:,} people were the strangers: the intervals themselves are uncertain."
