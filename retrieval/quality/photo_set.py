"""A data set as it was inspected: its photos by identity and content, split as training would split them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np

from retrieval.models.bundle import Preprocessing
from retrieval.quality.findings import Item, Shown
from retrieval.quality.near_duplicates import SIDE, Grey, copies
from retrieval.quality.photo_stats import PhotoStats
from retrieval.sources.holdout import held_out

Rows: TypeAlias = list[int]


@dataclass(frozen=True, slots=True)
class Person:
    """An identity: its readable photos, and how `train` would split them; 0 and 0 where it would not."""

    name: str
    photos: int
    training: int
    validation: int


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How `train` will be asked for, beside what is checked.

    Attributes:
        seed, validation_fraction: of the split.
        min_images: identities with fewer photos are left out; None: one photo is an error.
        preprocessing: the size of the network's input, and the crop.
    """

    seed: int = 0
    validation_fraction: float = 0.3
    min_images: int | None = None
    preprocessing: Preprocessing = field(default=Preprocessing(size=224, crop=1.0))

    @property
    def lowest(self) -> int:
        """How many photos an identity needs."""
        return max(2, self.min_images or 0)


@dataclass
class Copies:
    """Groups of copies.

    Attributes:
        exact: rows with the same bytes, two or more each.
        near: for the first of some photos that look alike, each of the others and the correlation with it.
        two_names: photos under different names that look alike, and their correlation; each such photo is in
            one pair at least.
    """

    exact: list[Rows]
    near: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    two_names: list[tuple[int, int, float]] = field(default_factory=list)


class PhotoSet:
    """The photos, by identity and by content, split as training would split them. Rows are of the photos."""

    def __init__(self, stats: Sequence[PhotoStats], options: CheckOptions) -> None:
        self.stats = stats
        self.options = options
        self.readable = [row for row, one in enumerate(stats) if one.reason is None]
        self.of_person = grouped(self.readable, lambda row: stats[row].identity)
        self.loose = self.of_person.pop(None, [])
        for name in {one.identity for one in stats} - {None}:
            self.of_person.setdefault(name, [])
        self.halves: dict[int, str] = {}
        self.people = tuple(self._person(name) for name in sorted(filter(None, self.of_person)))

    def _person(self, name: str) -> Person:
        rows = self.of_person[name]
        if len(rows) < self.options.lowest:
            return Person(name, len(rows), 0, 0)
        apart = held_out(name, len(rows), self.options.validation_fraction, self.options.seed)
        for index, row in enumerate(rows):
            self.halves[row] = "validation" if index in apart else "training"
        return Person(name, len(rows), len(rows) - len(apart), len(apart))

    @property
    def usable(self) -> list[Person]:
        """Those that can be split."""
        return [person for person in self.people if person.training]

    @property
    def effective_people(self) -> float:
        sizes = np.array([person.photos for person in self.usable], np.float64)
        if not len(sizes):
            return 0.0
        shares = sizes / sizes.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @cached_property
    def copies(self) -> Copies:
        """Its groups of copies."""
        return _copies(self)

    def identity(self, row: int) -> str | None:
        return self.stats[row].identity

    def names(self, rows: Iterable[int]) -> set[str]:
        """Who is said to be on them."""
        return {name for row in rows if (name := self.identity(row)) is not None}

    def across(self, rows: Iterable[int]) -> bool:
        """Whether some are learned from and others held out."""
        return {"training", "validation"} <= {self.halves.get(row) for row in rows}

    def shown(self, row: int) -> Shown:
        one = self.stats[row]
        return Shown(one.path, one.identity, self.halves.get(row))

    def item(self, rows: Iterable[int], detail: str) -> Item:
        return Item(tuple(self.shown(row) for row in rows), detail)


def grouped(rows: Iterable[int], key: Callable[[int], Any]) -> dict[Any, Rows]:
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _copies(seen: PhotoSet) -> Copies:
    """Each photo stands for itself or is a copy of one that does, so memory is by photos, not by pairs."""
    # Whoever has a name comes first, so that of copies a photo with a name stays.
    order = sorted(seen.readable, key=lambda row: seen.identity(row) is None)
    groups = list(grouped(order, lambda row: seen.stats[row].sha256).values())
    found = Copies([rows for rows in groups if len(rows) > 1])
    firsts = [rows[0] for rows in groups]
    grey = np.zeros((len(firsts), SIDE, SIDE), np.uint8)
    for place, row in enumerate(firsts):
        grey[place] = cast(Grey, seen.stats[row].grey)
    covered: set[int] = set()
    named: set[int] = set()
    for pair in copies(grey):
        one, other = firsts[pair.first], firsts[pair.second]
        if len(seen.names((one, other))) == 2:
            # A pair for each that is in none yet: that names all of them, and is no more than photos.
            if not named >= {one, other}:
                named |= {one, other}
                found.two_names.append((one, other, pair.correlation))
        elif one not in covered and other not in covered:
            covered.add(other)
            found.near.setdefault(one, []).append((other, pair.correlation))
    return found
