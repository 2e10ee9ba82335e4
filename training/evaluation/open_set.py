"""Open-set identification: searches for enrolled people and for strangers."""

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

# The false positive identification rates at which FNIR is measured.
FPIR: Final = (0.1, 0.01, 0.003)
_CURVE_POINTS: Final = 200
# Number of probes in one batch of searches in a gallery.
_QUERY_BATCH: Final = 256


@dataclass(frozen=True)
class SearchOutcomes:
    """The answers to n searches.

    Attributes:
        place: (n,) rank of the right person among the people, 1 is the nearest; 0 for a stranger and, in an
            existing gallery, beyond the 20th.
        precision: (n,) average precision, NaN for a stranger; None if only the nearest were searched for.
        distance: (n,) Euclidean, to the nearest photo.
        nearest, who: path and identity of the nearest photo.
        right: (path, distance) of the right person's nearest photo, or None if that person is not among the
            answers; empty unless an existing gallery was searched.
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
    """Measures a model and the baselines in open-set identification, on photos divided into two parts.

    Args:
        observed: n photos with grey images.
        enrolled: (n,) True for enrolled photos; the others are probes.
        trained: people that the model was trained on.
        min_images, trained_photos: see `Open`.
        before: the same photos, embedded by the network before fine-tuning.
        seed: of resampling.

    Returns:
        The figures, and a row for each probe.
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
    """Measures searches in an existing gallery. Photos that are enrolled there are not searched for.

    Raises:
        DataError: the gallery has no identities.
        GalleryDamaged: as in `Gallery.search_people_by_vectors`.
    """
    with gallery.vault.store.read() as reader:
        known = reader.photos_by_sha256(set(observed.digests))
        names = reader.current_names(set(observed.identities.tolist()))
        people = {name: number for name, number in reader.identities() if name is not None}
    if not people:
        raise DataError(f"No identity is enrolled in {gallery.name}; enroll people with `faceprint ingest`.")
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
        mistakes=_with_right_photo(mistakes(rows), rows, found),
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
    # For strangers only the nearest photo counts, so they need no ranking.
    nearest, rows = brute_force.nearest(features[probes[~mated]], stored, 1)
    distance[~mated], row[~mated] = nearest[:, 0], rows[:, 0]
    photos = gallery[row].tolist()
    who = observed.identities[gallery[row]].tolist()
    return SearchOutcomes(place, precision, distance, [observed.paths[photo] for photo in photos], who)


def _asked(
    gallery: Gallery, vectors: NDArray[np.float32], identities: NDArray[np.str_], mated: NDArray[np.bool_]
) -> SearchOutcomes:
    answers: list[tuple[PersonMatch, ...]] = []
    for start in range(0, len(vectors), _QUERY_BATCH):
        answers += gallery.search_people_by_vectors(vectors[start : start + _QUERY_BATCH], PLACES, photos=1)
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


def _with_right_photo(some: Sequence[Mistake], rows: Rows, found: SearchOutcomes) -> tuple[Mistake, ...]:
    """Adds to each mistake the right person's nearest photo, if the gallery's answer has one."""
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
    # Half of the points are quantiles of the strangers, dense at low FPIR: thresholds are chosen there.
    half = _CURVE_POINTS // 2
    stranger_limits = np.quantile(strangers, np.geomspace(1 / len(strangers), 1, half))
    known_limits = np.quantile(known, np.linspace(0, 1, half))
    limits = np.unique(np.concatenate([stranger_limits, known_limits]))
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
