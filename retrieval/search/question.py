"""The options of searches: as keyword arguments of `Gallery` methods, and as checked question objects.

Each `TypedDict` declares and documents the keyword arguments of some searches. The question class of the same
kind has their defaults and rejects invalid values.
"""

from typing import TypedDict, Unpack

from retrieval.database.filters import Where
from retrieval.errors import InputError
from retrieval.index.knn import Explanation
from retrieval.search.decisions import check_wanted
from retrieval.search.people import Rule, checked_rule


class SearchOptions(TypedDict, total=False):
    """Keyword arguments of every search. Each is optional; None is the same as leaving it out.

    `fpir` and `max_distance` choose the threshold of the decisions. They exclude each other (InputError) and
    never change which faces or identities are found.

    Attributes:
        where: the condition that faces must meet. It is applied before ranking, so the requested number of
            results is returned if there are enough. None allows all faces.
        explanation: the cost of the search is added to it: rows compared, bytes read, seconds of each stage.
        fpir: use the threshold for this share of non-mated searches that may return an identity. It is above
            0 and at most 0.5, and the gallery must be calibrated for it (InputError otherwise). None uses the
            share that `Gallery.calibrate` was called with.
        max_distance: use this Euclidean distance as the threshold instead: if the nearest face is farther,
            the decision is UNKNOWN. At least 0 and finite (InputError otherwise).
    """

    where: Where | None
    explanation: Explanation | None
    fpir: float | None
    max_distance: float | None


class PhotoSearchOptions(SearchOptions, total=False):
    """Keyword arguments of searches for stored photos: those of `SearchOptions`, and a greatest distance.

    Attributes:
        within: the greatest Euclidean distance of a result, at least 0 and finite (InputError otherwise).
            With `k=None`, all faces within this distance are returned. None allows any distance.
    """

    within: float | None


class PeopleSearchOptions(SearchOptions, total=False):
    """Keyword arguments of searches for identities: those of `SearchOptions`, and the rule of distances.

    Attributes:
        rule: the distance of an identity. "nearest", the default: the distance of its nearest photo. "mean":
            the mean distance of its nearest `mean_of` photos, or of all if it has fewer. "centroid": the
            distance of the mean of its vectors, rounded to float32. Identities with equal distances are
            ordered by the time of their first enrollment. Another value is an InputError.
        mean_of: number of photos in the mean of the rule "mean"; 3 by default, at least 1 (InputError
            otherwise).
        photos: greatest number of photos to return for each identity; 3 by default, at least 0 (InputError
            otherwise).
    """

    rule: str
    mean_of: int
    photos: int


class Question:
    """The checked options of any search: number of results, allowed faces, and threshold.

    Args:
        k: number of results; None returns all results within a distance.
        where, explanation, fpir, max_distance: see `SearchOptions`.

    Raises:
        InputError: k is below 1, or None without a distance; or as `SearchOptions`.
    """

    within: float | None = None

    def __init__(
        self,
        k: int | None,
        *,
        where: Where | None = None,
        explanation: Explanation | None = None,
        fpir: float | None = None,
        max_distance: float | None = None,
    ) -> None:
        check_wanted(fpir, max_distance)
        if k is None and self.within is None:
            raise InputError("Say how many neighbours, or within which distance.")
        if k is not None and k < 1:
            raise InputError(f"The number of neighbours must be at least 1, not {k}.")
        self.k, self.where, self.fpir, self.max_distance = k, where, fpir, max_distance
        self.explanation = Explanation() if explanation is None else explanation


class PhotoQuestion(Question):
    """The checked options of a search for stored photos; see `PhotoSearchOptions`."""

    def __init__(
        self, k: int | None, *, within: float | None = None, **options: Unpack[SearchOptions]
    ) -> None:
        self.within = within
        super().__init__(k, **options)


class PeopleQuestion(Question):
    """The checked options of a search for identities; see `PeopleSearchOptions`."""

    def __init__(
        self,
        k: int,
        *,
        rule: str = Rule.NEAREST,
        mean_of: int = 3,
        photos: int = 3,
        **options: Unpack[SearchOptions],
    ) -> None:
        super().__init__(k, **options)
        self.rule, self.mean_of, self.photos = checked_rule(rule, mean_of, photos), mean_of, photos
