"""An inspected data set for the check: photos by identity and content, split as training splits them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np

from retrieval.images.preprocessing import Preprocessing
from retrieval.quality.findings import Item, Shown
from retrieval.quality.near_duplicates import SIDE, Grey, copies
from retrieval.quality.photo_stats import PhotoStats
from retrieval.sources.holdout import held_out

Rows: TypeAlias = list[int]


@dataclass(frozen=True, slots=True)
class Person:
    """An identity: its photos that `train` takes, and their split; 0 and 0 where it cannot be split."""

    name: str
    photos: int
    training: int
    validation: int


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """The options of the training that a data set is checked for.

    Attributes:
        seed, validation_fraction: the seed of the split, and the share of photos that is held out.
        min_images: identities with fewer photos are left out; with None, a single photo is an error.
        preprocessing: the size of the network's input, and the crop or the alignment of faces.
    """

    seed: int = 0
    validation_fraction: float = 0.3
    min_images: int | None = None
    preprocessing: Preprocessing = field(default=Preprocessing(size=224, crop=1.0))

    @property
    def lowest(self) -> int:
        """The least number of photos of an identity."""
        return max(2, self.min_images or 0)


@dataclass
class Copies:
    """Groups of copies.

    Attributes:
        exact: groups of two or more rows with the same bytes.
        near: for the first of a group of near copies, the other rows and their correlation with it.
        two_names: pairs of near copies under different names, and their correlation; each such photo is in
            at least one pair.
    """

    exact: list[Rows]
    near: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    two_names: list[tuple[int, int, float]] = field(default_factory=list)


class PhotoSet:
    """Photos by identity and by content, split as training splits them. A row is a position in `stats`.

    Photos that training leaves out for their faces are readable and belong to no half and no person.
    """

    def __init__(self, stats: Sequence[PhotoStats], options: CheckOptions) -> None:
        self.stats = stats
        self.options = options
        self.readable = [row for row, one in enumerate(stats) if one.reason is None]
        self.loose = [row for row in self.readable if stats[row].identity is None]
        taken = [row for row in self.readable if stats[row].trainable]
        self.of_person = grouped(taken, lambda row: stats[row].identity)
        self.of_person.pop(None, None)
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
        """The identities that can be split."""
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
        """The groups of copies."""
        return _copies(self)

    def identity(self, row: int) -> str | None:
        return self.stats[row].identity

    def names(self, rows: Iterable[int]) -> set[str]:
        """Returns the identities of rows."""
        return {name for row in rows if (name := self.identity(row)) is not None}

    def across(self, rows: Iterable[int]) -> bool:
        """Returns whether the rows are on both sides of the split."""
        return {"training", "validation"} <= {self.halves.get(row) for row in rows}

    def shown(self, row: int) -> Shown:
        one = self.stats[row]
        box = None
        if one.face is not None:
            left, top, width, height = (round(side, 1) for side in one.face.box)
            box = left, top, width, height
        return Shown(one.path, one.identity, self.halves.get(row), box)

    def item(self, rows: Iterable[int], detail: str) -> Item:
        return Item(tuple(self.shown(row) for row in rows), detail)


def grouped(rows: Iterable[int], key: Callable[[int], Any]) -> dict[Any, Rows]:
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _copies(seen: PhotoSet) -> Copies:
    """Returns the groups of copies. Each copy belongs to one representative: memory is linear in photos."""
    # Photos with an identity that are trained on come first, to be the representatives of their copies.
    order = sorted(seen.readable, key=lambda row: (seen.identity(row) is None, not seen.stats[row].trainable))
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
            # A pair is kept if a photo of it is in none yet: that covers all, with no more pairs than photos.
            if not named >= {one, other}:
                named |= {one, other}
                found.two_names.append((one, other, pair.correlation))
        elif one not in covered and other not in covered:
            covered.add(other)
            found.near.setdefault(one, []).append((other, pair.correlation))
    return found
