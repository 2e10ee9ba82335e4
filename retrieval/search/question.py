"""What a search can be asked for: as keyword arguments of a gallery's methods, and checked, as a question.

Each `TypedDict` here names, types and documents the keyword arguments of some searches; the question of
the same kind has their defaults and refuses what cannot be answered.
"""

from typing import TypedDict, Unpack

from retrieval.database.filters import Where
from retrieval.errors import InputError
from retrieval.index.knn import Explanation
from retrieval.search.decisions import check_wanted
from retrieval.search.people import Rule, checked_rule


class SearchOptions(TypedDict, total=False):
    """Keyword arguments that every search takes. Each may be left out, which is the same as None.

    The last two choose the threshold of the decisions that come with the answers. They exclude each other
    (InputError) and never change which faces or people are found.

    Attributes:
        where: the only faces that may be an answer. This is decided before any is ranked, so as many come
            back as were asked for. None is all of them.
        explanation: what answering took is added to it: rows compared, bytes read, seconds of each stage.
        fpir: decide by the threshold for this share of strangers' searches, above 0 and at most 0.5, which
            the gallery was calibrated for (InputError otherwise). None is the share that `Gallery.calibrate`
            was asked for.
        max_distance: decide by this Euclidean distance instead: who is farther is nobody the gallery knows.
            At least 0 (InputError otherwise).
    """

    where: Where | None
    explanation: Explanation | None
    fpir: float | None
    max_distance: float | None


class PhotoSearchOptions(SearchOptions, total=False):
    """Keyword arguments of searches for stored photos: those of `SearchOptions`, and how far they may be.

    Attributes:
        within: the greatest Euclidean distance of an answer, at least 0 and finite (InputError otherwise).
            With `k=None` all faces that are so near come back. None is any distance.
    """

    within: float | None


class PeopleSearchOptions(SearchOptions, total=False):
    """Keyword arguments of searches for people: those of `SearchOptions`, and how far a person is.

    Attributes:
        rule: how far a person is. "nearest", the default: as their nearest photo. "mean": the mean distance
            of their nearest `mean_of` photos, or of all where there are fewer. "centroid": as the mean of
            their vectors, rounded to float32. Equal people are ordered by when they became known. Another
            word is an InputError.
        mean_of: of how many photos the rule "mean" takes the mean; 3 by default, at least 1 (InputError
            otherwise).
        photos: how many photos of each person come back at most; 3 by default, at least 0 (InputError
            otherwise).
    """

    rule: str
    mean_of: int
    photos: int


class Question:
    """What every search is asked: how many answers, of which faces, and how it is to be decided.

    Args:
        k: how many; None is all of them, where a distance limits these.
        where, explanation, fpir, max_distance: see `SearchOptions`.

    Raises:
        InputError: k below 1, or None although no distance is given; or as `SearchOptions`.
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
    """What a search for stored photos is asked; see `PhotoSearchOptions`."""

    def __init__(
        self, k: int | None, *, within: float | None = None, **options: Unpack[SearchOptions]
    ) -> None:
        self.within = within
        super().__init__(k, **options)


class PeopleQuestion(Question):
    """What a search for people is asked; see `PeopleSearchOptions`."""

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
