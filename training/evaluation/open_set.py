"""Open-set identification: enrolled people and strangers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval import rates
from retrieval.errors import DataError
from retrieval.gallery.gallery import Gallery
from retrieval.index import brute_force
from retrieval.search.nearest import PersonMatch
from training.evaluation import intervals
from training.evaluation.baselines import spaces
from training.evaluation.measurements import Curve, Identification, Mistake, Open, OpenBaseline, Ranking
from training.evaluation.observe import Observed
from training.evaluation.searches import PLACES, Rows, mistakes, with_right
from training.metrics import identification

# What is allowed of searches of strangers.
FPIR: Final = (0.1, 0.01, 0.003)
_POINTS: Final = 200
# Searches that a gallery is asked at a time.
_ASKED: Final = 256


@dataclass(frozen=True)
class SearchOutcomes:
    """What n searches found.

    Attributes:
        place: (n,) of the right person among the people, 1 the nearest; 0 for a stranger and beyond 20th.
        precision: (n,) average precision, NaN for a stranger; None where only the nearest were asked for.
        distance: (n,) to the nearest photo.
        nearest, who: of that photo, its path and its person.
        right: (path, distance) of the right person's nearest photo, of those whom a gallery was asked for.
    """

    place: NDArray[np.int64]
    precision: NDArray[np.float64] | None
    distance: NDArray[np.float64]
    nearest: Sequence[str]
    who: Sequence[str]
    right: Sequence[tuple[str, float] | None] = ()


def measure(
    observed: Observed,
    enrolled: NDArray[np.bool_],
    *,
    trained: frozenset[str],
    min_images: int,
    trained_photos: int,
    before: Observed | None,
    seed: int,
) -> tuple[Open, Rows]:
    """Measures a model and the baselines on photos that were divided.

    Args:
        observed: n photos with grey pictures.
        enrolled: (n,) which of them are searched in; the others are searched for.
        trained: people whom the model was trained on.
        min_images, trained_photos: see `Open`.
        before: the same photos before fine-tuning.
        seed: of resampling.
    """
    gallery, probes = np.flatnonzero(enrolled), np.flatnonzero(~enrolled)
    mated = np.isin(observed.identities[probes], observed.identities[gallery])
    identities = observed.identities[probes]
    found = _searched(observed, observed.vectors, gallery, probes, mated)
    measured = _identification(found, mated, identities, seed)
    rows = _rows(observed, probes, found, mated, measured)
    baselines = []
    for space in spaces(observed, gallery, before):
        other = _searched(observed, space.features, gallery, probes, mated)
        one = _identification(other, mated, identities, seed)
        baselines.append(OpenBaseline(space.name, space.says, one))
        for row, right in zip(rows, other.place == 1, strict=True):
            row[f"{space.name}_right"] = int(right)
    people = frozenset(observed.identities[gallery].tolist())
    return Open(
        min_images=min_images,
        enrolled=len(gallery),
        identities=len(people),
        trained_identities=len(people & trained),
        mated=int(mated.sum()),
        strangers=int((~mated).sum()),
        stranger_identities=len(np.unique(identities[~mated])),
        trained_photos=trained_photos,
        already_enrolled=0,
        identification=measured,
        mistakes=with_right(mistakes(rows), observed, gallery),
        baselines=tuple(baselines),
    ), rows


def measure_gallery(
    observed: Observed,
    gallery: Gallery,
    *,
    trained: frozenset[str],
    trained_photos: int,
    seed: int,
) -> tuple[Open, Rows]:
    """Measures searches in a gallery that exists; what is enrolled already is not searched for.

    Raises:
        DataError: nobody is enrolled.
        GalleryDamaged: as searches.
    """
    with gallery.vault.store.read() as reader:
        known = reader.faces_by_sha256(set(observed.digests))
        names = reader.current_names(set(observed.identities.tolist()))
        people = {name: number for name, number in reader.identities() if name is not None}
    if not people:
        raise DataError(f"Nobody is enrolled in {gallery.folder}; enroll people with `faceprint ingest`.")
    probes = np.array([row for row, sha in enumerate(observed.digests) if sha not in known], np.int64)
    identities = np.array([names.get(name, name) for name in observed.identities[probes].tolist()], np.str_)
    mated = np.isin(identities, list(people))
    found = _asked(gallery, observed.vectors[probes], identities, mated)
    measured = _identification(found, mated, identities, seed)
    rows = _rows(observed, probes, found, mated, measured)
    return Open(
        min_images=None,
        enrolled=sum(people.values()),
        identities=len(people),
        trained_identities=len(trained & people.keys()),
        mated=int(mated.sum()),
        strangers=int((~mated).sum()),
        stranger_identities=len(np.unique(identities[~mated])),
        trained_photos=trained_photos,
        already_enrolled=len(observed.digests) - len(probes),
        identification=measured,
        mistakes=_with_found(mistakes(rows), rows, found),
        baselines=(),
    ), rows


def _searched(
    observed: Observed,
    features: NDArray[np.float32],
    gallery: NDArray[np.int64],
    probes: NDArray[np.int64],
    mated: NDArray[np.bool_],
) -> SearchOutcomes:
    numbers = np.unique(observed.identities, return_inverse=True)[1]
    stored, labels = features[gallery], numbers[gallery]
    place = np.zeros(len(probes), np.int64)
    precision, distance = np.full(len(probes), np.nan), np.empty(len(probes))
    row = np.empty(len(probes), np.int64)
    ranked = identification.ranks(features[probes[mated]], numbers[probes[mated]], stored, labels)
    place[mated], precision[mated] = ranked.place, ranked.precision
    distance[mated], row[mated] = ranked.distance, ranked.row
    # Of strangers only the nearest counts, which spares the ranking.
    nearest, rows = brute_force.nearest(features[probes[~mated]], stored, 1)
    distance[~mated], row[~mated] = nearest[:, 0], rows[:, 0]
    photos = gallery[row].tolist()
    who = observed.identities[gallery[row]].tolist()
    return SearchOutcomes(place, precision, distance, [observed.paths[photo] for photo in photos], who)


def _asked(
    gallery: Gallery, vectors: NDArray[np.float32], identities: NDArray[np.str_], mated: NDArray[np.bool_]
) -> SearchOutcomes:
    answers: list[tuple[PersonMatch, ...]] = []
    for start in range(0, len(vectors), _ASKED):
        answers += gallery.search_people_by_vectors(vectors[start : start + _ASKED], PLACES, photos=1)
    place = [
        next((number for number, one in enumerate(people, 1) if one.identity == name), 0)
        for people, name in zip(answers, identities.tolist(), strict=True)
    ]
    return SearchOutcomes(
        np.where(mated, place, 0),
        None,
        np.array([people[0].distance for people in answers], np.float64),
        [_photo(people[0]) for people in answers],
        [people[0].identity for people in answers],
        [
            (_photo(people[number - 1]), people[number - 1].distance) if number else None
            for people, number in zip(answers, place, strict=True)
        ],
    )


def _photo(person: PersonMatch) -> str:
    face = person.matches[0].face
    return face.path or f"face {face.id}"


def _with_found(some: Sequence[Mistake], rows: Rows, found: SearchOutcomes) -> tuple[Mistake, ...]:
    """Mistakes, each with the right person's nearest photo where the gallery named it."""
    place = {row["path"]: index for index, row in enumerate(rows)}
    right = [found.right[place[one.path]] or (None, None) for one in some]
    return tuple(
        replace(one, right_path=path, right_distance=distance)
        for one, (path, distance) in zip(some, right, strict=True)
    )


def _identification(
    found: SearchOutcomes, mated: NDArray[np.bool_], identities: NDArray[np.str_], seed: int
) -> Identification:
    right = found.place[mated] == 1
    strangers, known = found.distance[~mated], found.distance[mated]
    points = intervals.operating_points(
        strangers,
        identities[~mated],
        np.where(right, known, np.inf),
        identities[mated],
        FPIR,
        seed=seed,
    )
    return Identification(points, _curve(strangers, known, right), _ranking(found, mated, identities, seed))


def _curve(strangers: NDArray[np.float64], known: NDArray[np.float64], right: NDArray[np.bool_]) -> Curve:
    if not len(strangers) or not len(known):
        return Curve((), (), ())
    # Half of the points where strangers begin to be named, which is where thresholds are chosen.
    shares = np.concatenate(
        [np.geomspace(1 / len(strangers), 1, _POINTS // 2), np.linspace(0, 1, _POINTS // 2)]
    )
    both = np.concatenate(
        [np.quantile(strangers, shares[: _POINTS // 2]), np.quantile(known, shares[_POINTS // 2 :])]
    )
    limits = np.unique(both)
    named, missed = rates.det(strangers, known, right, limits)
    return Curve(tuple(named.tolist()), tuple(missed.tolist()), tuple(limits.tolist()))


def _ranking(
    found: SearchOutcomes, mated: NDArray[np.bool_], identities: NDArray[np.str_], seed: int
) -> Ranking:
    place, people = found.place[mated], identities[mated]
    cmc = tuple(intervals.share((place > 0) & (place <= k), people, seed=seed) for k in range(1, PLACES + 1))
    precise = None if found.precision is None else intervals.share(found.precision[mated], people, seed=seed)
    return Ranking(cmc[0], cmc, precise)


def _rows(
    observed: Observed,
    probes: NDArray[np.int64],
    found: SearchOutcomes,
    mated: NDArray[np.bool_],
    measured: Identification,
) -> Rows:
    rows: Rows = []
    for index, probe in enumerate(probes.tolist()):
        right, distance = bool(found.place[index] == 1), float(found.distance[index])
        row: dict[str, Any] = {
            "path": observed.paths[probe],
            "identity": str(observed.identities[probe]),
            "mated": int(mated[index]),
            "nearest": found.nearest[index],
            "nearest_identity": found.who[index],
            "distance": distance,
            "closest_right": int(right),
            "place": int(found.place[index]),
            "average_precision": None if found.precision is None else float(found.precision[index]),
        }
        for point in measured.points:
            named = point.threshold is not None and distance <= point.threshold
            known = None if point.threshold is None else int(named and right if mated[index] else not named)
            row[f"right_at_{point.rate:g}"] = known
        rows.append(row)
    return rows
