"""The check of a data set: what is wrong with it, before a model is trained on it.

Findings come from what can be seen without a model (`photo_stats`): files that cannot be read, copies of
a photo, people with too few photos, odd pictures. A model adds labels in doubt (`quality.label_errors`).
Nothing here changes a photo; `Check.cleaned` says which of them are left when the worst is left out.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np

from retrieval.bulk.embed import embed_photos
from retrieval.embedding.outcome import Outcome
from retrieval.errors import DataError, InputError, Interrupted
from retrieval.models.bundle import ModelBundle, Preprocessing
from retrieval.models.embedder import Embedder
from retrieval.quality.label_errors import mislabels
from retrieval.quality.near_duplicates import FLAT, SIDE, Grey, copies
from retrieval.quality.photo_stats import Look, look_at
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.holdout import held_out
from retrieval.sources.photos import Photo
from retrieval.system.files import temporary_folder
from retrieval.system.paths import is_url

DARK: Final = 30.0
BRIGHT: Final = 225.0
# A longer side of more than so many shorter ones is an odd shape: the network sees the middle square.
STRETCHED: Final = 2.0
# Up to this difference between channels a picture is grey; JPEG leaves grey ones a little coloured.
GREY: Final = 12.0
# Largest people of more than so many times the smallest's photos are worth a look.
_UNEVEN: Final = 10


class Level(StrEnum):
    """How serious a finding is."""

    HARMS = "harms"
    LOOK = "look"
    NOTE = "note"


class Kind(StrEnum):
    """What was found. The values are stable, and in the order of their seriousness."""

    TOO_FEW_PEOPLE = "too-few-people"
    TWO_NAMES = "two-names"
    TWO_NAMES_NEAR = "two-names-near"
    SINGLE_PHOTO = "single-photo"
    ACROSS_SPLIT = "across-split"
    UNREADABLE = "unreadable"
    WRONG_LABEL = "wrong-label"
    ACROSS_SPLIT_NEAR = "across-split-near"
    COPY = "copy"
    NEAR_COPY = "near-copy"
    TOO_FEW_PHOTOS = "too-few-photos"
    FLAT = "flat"
    DARK = "dark"
    BRIGHT = "bright"
    STRETCHED = "stretched"
    TINY = "tiny"
    GREY_AMONG_COLOUR = "grey-among-colour"
    COLOUR_AMONG_GREY = "colour-among-grey"
    UNEVEN = "uneven"
    NO_IDENTITY = "no-identity"


@dataclass(frozen=True, slots=True)
class Shown:
    """A photo of a finding; `half` is "training", "validation", or None where it is in neither."""

    path: str | None
    identity: str | None
    half: str | None


@dataclass(frozen=True, slots=True)
class Item:
    """One case of a finding: the photos that belong together, and what is to be said of them."""

    photos: tuple[Shown, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind, level: what, and how serious.
        count: how many, of `unit`: "photo" or "identity".
        says: what it is and why it matters.
        advice: what to do.
        items: every case, the worst first.
    """

    kind: Kind
    level: Level
    count: int
    unit: str
    says: str
    advice: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Person:
    """An identity: its readable photos, and how `train` would split them; 0 and 0 where it would not."""

    name: str
    photos: int
    training: int
    validation: int


@dataclass(frozen=True, slots=True)
class Options:
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


@dataclass(frozen=True)
class Check:
    """What a data set is worth.

    Attributes:
        data: what was checked.
        options: for which training.
        photos, readable: how many files were found, and can be read.
        people: every identity, by name.
        effective_people: as many people of equally many photos would be as varied: the exponential of the
            entropy of the shares of those that can be split; 0 where there is none.
        findings: the most serious first.
        judged: how many photos a model's doubts are about; None without a model.
        cleaned: (path, identity) of the photos that are left without what should go.
        left_out: (path, identity, kind) of the others.
        passed_over: files and folders that were not looked at.
    """

    data: str
    options: Options
    photos: int
    readable: int
    people: tuple[Person, ...]
    effective_people: float
    findings: tuple[Finding, ...]
    judged: int | None
    cleaned: tuple[tuple[str, str | None], ...]
    left_out: tuple[tuple[str | None, str | None, Kind], ...]
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def harms(self) -> bool:
        """Whether anything was found that harms."""
        return any(finding.level is Level.HARMS for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can say it."""
        return {
            "data": self.data,
            "options": {
                "seed": self.options.seed,
                "validation_fraction": self.options.validation_fraction,
                "min_images": self.options.min_images,
                "image_size": self.options.preprocessing.size,
                "crop": self.options.preprocessing.crop,
            },
            "photos": self.photos,
            "readable": self.readable,
            "passed_over": self.passed_over.as_json(),
            "identities": [asdict(person) for person in self.people],
            "effective_identities": round(self.effective_people, 2),
            "judged": self.judged,
            "harms": self.harms,
            "findings": [asdict(finding) for finding in self.findings],
            "cleaned": len(self.cleaned),
            "left_out": [
                {"path": path, "identity": name, "kind": kind} for path, name, kind in self.left_out
            ],
        }


def check(
    data: str,
    *,
    model: ModelBundle | Embedder | None = None,
    options: Options = Options(),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    on_photo: Callable[[str, Outcome | Look], None] = lambda stage, one: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Check:
    """Says what a data set is worth.

    Args:
        data: identity folders, or any other source of `photos.scan` that can be read twice.
        model: to find labels that are in doubt.
        options: how `train` will be asked for.
        exclude: patterns of files and folders that are passed over, as of `photos.scan`.
        workers: threads that read and decode; None is one per processor.
        on_photo: called for every photo, in order, at each stage: "looking", then with a model "embedding".
        should_stop: asked between some photos.

    Raises:
        DataError: there is nothing at `data`, or no file in it.
        InputError: standard input or an address.
        Interrupted: `should_stop` said so.
    """
    if data == photos.STANDARD_INPUT or is_url(data):
        raise InputError(f"A check reads its data twice, which {data} does not allow; name a folder.")
    passed_over = PassedOver()
    scan = partial(photos.scan, [data], exclude=exclude)
    looks = look_at(
        scan(passed_over=passed_over),
        workers=workers,
        on_look=partial(on_photo, "looking"),
        should_stop=should_stop,
    )
    if looks is None:
        raise Interrupted("Stopped; nothing was written.")
    if not looks:
        raise DataError(
            f"{data} has no photos{passed_over.aside()}; it must hold one subfolder of photos per identity."
        )
    seen = _Seen(looks, options)
    kept = _Kept(seen)
    found = list(_findings(seen, kept))
    judged = None
    if model is not None:
        rows = kept.to_judge()
        embed = partial(_embedded, data, scan, model, workers, partial(on_photo, "embedding"), should_stop)
        found += _doubtful(seen, rows, embed)
        judged = len(rows)
    order = list(Kind)
    return Check(
        data=data,
        options=options,
        photos=len(looks),
        readable=len(seen.readable),
        people=seen.people,
        effective_people=seen.effective_people,
        findings=tuple(sorted(found, key=lambda one: (list(Level).index(one.level), order.index(one.kind)))),
        judged=judged,
        cleaned=tuple((looks[row].path or "", looks[row].identity) for row in kept.rows),
        left_out=tuple((looks[row].path, looks[row].identity, kind) for row, kind in kept.out.items()),
        passed_over=passed_over,
    )


_Rows: TypeAlias = list[int]


class _Seen:
    """The looks, by identity and by content, split as training would split them. Rows are of the looks."""

    def __init__(self, looks: Sequence[Look], options: Options) -> None:
        self.looks = looks
        self.options = options
        self.readable = [row for row, look in enumerate(looks) if look.reason is None]
        self.of_person = _grouped(self.readable, lambda row: looks[row].identity)
        self.loose = self.of_person.pop(None, [])
        for name in {look.identity for look in looks} - {None}:
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

    def identity(self, row: int) -> str | None:
        return self.looks[row].identity

    def names(self, rows: Iterable[int]) -> set[str]:
        """Who is said to be on them."""
        return {name for row in rows if (name := self.identity(row)) is not None}

    def across(self, rows: Iterable[int]) -> bool:
        """Whether some are learned from and others held out."""
        return {"training", "validation"} <= {self.halves.get(row) for row in rows}

    def shown(self, row: int) -> Shown:
        look = self.looks[row]
        return Shown(look.path, look.identity, self.halves.get(row))

    def item(self, rows: Iterable[int], detail: str) -> Item:
        return Item(tuple(self.shown(row) for row in rows), detail)


def _grouped(rows: Iterable[int], key: Callable[[int], Any]) -> dict[Any, _Rows]:
    groups: dict[Any, _Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


@dataclass
class _Copies:
    """Groups of copies.

    Attributes:
        exact: rows with the same bytes, two or more each.
        near: for the first of some photos that look alike, each of the others and the correlation with it.
        two_names: photos under different names that look alike, and their correlation; each such photo is in
            one pair at least.
    """

    exact: list[_Rows]
    near: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    two_names: list[tuple[int, int, float]] = field(default_factory=list)


def _copies(seen: _Seen) -> _Copies:
    """Each photo stands for itself or is a copy of one that does, so memory is by photos, not by pairs."""
    # Whoever has a name comes first, so that of copies a photo with a name stays.
    order = sorted(seen.readable, key=lambda row: seen.identity(row) is None)
    groups = list(_grouped(order, lambda row: seen.looks[row].sha256).values())
    found = _Copies([rows for rows in groups if len(rows) > 1])
    firsts = [rows[0] for rows in groups]
    grey = np.zeros((len(firsts), SIDE, SIDE), np.uint8)
    for place, row in enumerate(firsts):
        grey[place] = cast(Grey, seen.looks[row].grey)
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


class _Kept:
    """Which photos should go, and why: `out`, by row; and those that stay: `rows`."""

    def __init__(self, seen: _Seen) -> None:
        self.seen = seen
        self.copies = _copies(seen)
        self.out: dict[int, Kind] = {}
        for row, look in enumerate(seen.looks):
            if look.reason is not None:
                self.out[row] = Kind.UNREADABLE
        self._leave_out_two_names()
        self._leave_out_copies()
        # Last, because copies do not count.
        unique = [row for row in seen.readable if row not in self.out]
        self._leave_out_small(unique)
        self.rows = [row for row in unique if row not in self.out]

    def _leave_out_two_names(self) -> None:
        """All copies of what is under two names, and copies of those, until there are no more."""
        seen, found = self.seen, self.copies
        clusters = [[first, *(row for row, _ in others)] for first, others in found.near.items()]
        bad = {rows[0]: Kind.TWO_NAMES for rows in found.exact if len(seen.names(rows)) > 1}
        for one, other, _ in found.two_names:
            bad.setdefault(one, Kind.TWO_NAMES_NEAR)
            bad.setdefault(other, Kind.TWO_NAMES_NEAR)
        for rows in clusters:
            if not bad.keys().isdisjoint(rows):
                for row in rows:
                    bad.setdefault(row, Kind.TWO_NAMES_NEAR)
        self.out.update(bad)
        for rows in found.exact:
            if rows[0] in bad:
                self.out.update(dict.fromkeys(rows, bad[rows[0]]))

    def _leave_out_copies(self) -> None:
        for rows in self.copies.exact:
            for row in rows[1:]:
                self.out.setdefault(row, Kind.COPY)
        for others in self.copies.near.values():
            for row, _ in others:
                self.out.setdefault(row, Kind.NEAR_COPY)

    def _leave_out_small(self, unique: _Rows) -> None:
        groups = _grouped(unique, self.seen.identity)
        for name, rows in groups.items():
            if name is not None and len(rows) < self.seen.options.lowest:
                kind = Kind.SINGLE_PHOTO if len(rows) < 2 else Kind.TOO_FEW_PHOTOS
                self.out.update(dict.fromkeys(rows, kind))

    def to_judge(self) -> _Rows:
        """What would be trained on, without copies: a copy would vouch for its original."""
        return [row for row in self.rows if self.seen.identity(row) is not None]


def _findings(seen: _Seen, kept: _Kept) -> Iterator[Finding]:
    yield from _about_people(seen)
    yield from _about_copies(seen, kept.copies)
    yield from _about_files(seen)
    yield from _about_pictures(seen)


def _about_people(seen: _Seen) -> Iterator[Finding]:
    options, usable = seen.options, seen.usable
    if len(usable) < 2:
        few = tuple(seen.item(seen.of_person[one.name][:1], f"{one.name}: {one.photos}") for one in usable)
        yield Finding(
            Kind.TOO_FEW_PEOPLE, Level.HARMS, len(usable), "identity",
            "Telling people apart takes two identities at least that can be split.",
            f"Add subfolders with {options.lowest} photos or more each.", few,
        )  # fmt: skip
    small = [person for person in seen.people if not person.training]
    items = tuple(
        seen.item(seen.of_person[one.name][:1], f"{one.name}: {_counted(one.photos)}") for one in small
    )
    if small and options.min_images is None:
        yield Finding(
            Kind.SINGLE_PHOTO, Level.HARMS, len(small), "identity",
            "They have fewer than 2 readable photos, and cannot be split into training and validation: "
            "train refuses.",
            "Add photos, or train with --min-images 2 or more, or on the list of --fix.", items,
        )  # fmt: skip
    elif small:
        yield Finding(
            Kind.TOO_FEW_PHOTOS, Level.LOOK, len(small), "identity",
            f"They have fewer than {options.lowest} readable photos; train leaves them out.",
            "Add photos, or lower --min-images.", items,
        )  # fmt: skip
    sizes = sorted(usable, key=lambda one: (-one.photos, one.name))
    if len(sizes) > 1 and sizes[0].photos > sizes[-1].photos * _UNEVEN:
        yield Finding(
            Kind.UNEVEN, Level.LOOK, len(sizes), "identity",
            f"The largest has {sizes[0].photos:,} photos ({sizes[0].name}) and the smallest "
            f"{sizes[-1].photos:,}: as varied as {seen.effective_people:,.0f} of equal size.",
            "Raise --min-images, or add photos of the small ones; read accuracy by identity.",
            tuple(seen.item(seen.of_person[one.name][:1], f"{one.name}: {one.photos:,}") for one in sizes),
        )  # fmt: skip
    if seen.loose:
        yield Finding(
            Kind.NO_IDENTITY, Level.NOTE, len(seen.loose), "photo",
            "They lie in no identity's folder; train leaves them out.",
            "Move them into folders, if they matter.", tuple(seen.item([row], "") for row in seen.loose),
        )  # fmt: skip


def _about_copies(seen: _Seen, found: _Copies) -> Iterator[Finding]:
    bad = [rows for rows in found.exact if len(seen.names(rows)) > 1]
    yield from _copied(
        seen, Kind.TWO_NAMES, Level.HARMS, [(rows, "the same bytes") for rows in bad],
        "One file under two names: one of them is wrong, and both are learned.",
        "Look, and keep the right one; --fix leaves all of them out.",
    )  # fmt: skip
    alike = sorted(found.two_names, key=lambda one: -one[2])
    yield from _copied(
        seen, Kind.TWO_NAMES_NEAR, Level.HARMS,
        [([one, other], _alike(likeness)) for one, other, likeness in alike],
        "One photograph, saved twice, under two names: one of them is wrong.",
        "Look, and keep the right one; --fix leaves all of them out.",
    )  # fmt: skip
    same = [rows for rows in found.exact if len(seen.names(rows)) < 2]
    near = sorted(
        (([first, *(row for row, _ in others)], min(c for _, c in others))
         for first, others in found.near.items()),
        key=lambda one: -one[1],
    )  # fmt: skip
    near_across = [(rows, _alike(c)) for rows, c in near if seen.across(rows)]
    yield from _copied(
        seen, Kind.ACROSS_SPLIT, Level.HARMS,
        [(rows, "the same bytes") for rows in same if seen.across(rows)],
        "Held-out photos are among the training photos too: validation figures are too good.",
        "Keep one of each; --fix does.",
    )  # fmt: skip
    yield from _copied(
        seen, Kind.ACROSS_SPLIT_NEAR, Level.LOOK, near_across,
        "Held-out photos look like training photos of the same shot: validation figures are flattered.",
        "Keep one of each; --fix does.",
    )  # fmt: skip
    yield from _copied(
        seen, Kind.COPY, Level.LOOK, [(rows, "the same bytes") for rows in same if not seen.across(rows)],
        "Copies of a file of the same person add nothing and count twice.",
        "Keep one of each; --fix does.",
    )  # fmt: skip
    yield from _copied(
        seen, Kind.NEAR_COPY, Level.LOOK, [(rows, _alike(c)) for rows, c in near if not seen.across(rows)],
        "Near copies of a photo of the same person add little and count twice.",
        "Keep one of each; --fix does.",
    )  # fmt: skip


def _copied(
    seen: _Seen, kind: Kind, level: Level, groups: Sequence[tuple[_Rows, str]], says: str, advice: str
) -> Iterator[Finding]:
    if groups:
        count = len({row for rows, _ in groups for row in rows})
        items = tuple(seen.item(rows, detail) for rows, detail in groups)
        yield Finding(kind, level, count, "photo", says, advice, items)


def _alike(correlation: float) -> str:
    return f"correlation {correlation:.3f}"


def _about_files(seen: _Seen) -> Iterator[Finding]:
    rows = [row for row, look in enumerate(seen.looks) if look.reason is not None]
    if not rows:
        return
    counts = Counter(str(seen.looks[row].reason) for row in rows)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.most_common())
    yield Finding(
        Kind.UNREADABLE, Level.HARMS, len(rows), "photo", f"They cannot be read: {reasons}.",
        "Mend or remove them; train and ingest pass over them, --fix leaves them out.",
        tuple(seen.item([row], f"{seen.looks[row].reason}: {seen.looks[row].detail}") for row in rows),
    )  # fmt: skip


def _about_pictures(seen: _Seen) -> Iterator[Finding]:
    looks, size, crop = seen.looks, seen.options.preprocessing.size, seen.options.preprocessing.crop
    flat = {row for row in seen.readable if looks[row].contrast < FLAT}
    visible = [row for row in seen.readable if row not in flat]

    def side(row: int) -> float:
        return crop * min(looks[row].width, looks[row].height)

    def about(kind: Kind, rows: Iterable[int], key: Callable[[int], float], detail: Callable[[int], str],
              says: str, advice: str) -> Iterator[Finding]:  # fmt: skip
        worst = sorted(rows, key=key)
        if worst:
            items = tuple(seen.item([row], detail(row)) for row in worst)
            yield Finding(kind, Level.LOOK, len(worst), "photo", says, advice, items)

    look = "Look at them, and remove those that show nobody."
    yield from about(
        Kind.FLAT, flat, lambda row: looks[row].contrast, lambda row: f"contrast {looks[row].contrast:.1f}",
        f"They are nearly of one brightness (deviation below {FLAT:g} of 255).", look,
    )  # fmt: skip

    def mean(row: int) -> str:
        return f"brightness {looks[row].brightness:.0f}"

    yield from about(
        Kind.DARK, (row for row in visible if looks[row].brightness < DARK),
        lambda row: looks[row].brightness, mean, f"They are very dark (mean below {DARK:g} of 255).", look,
    )  # fmt: skip
    yield from about(
        Kind.BRIGHT, (row for row in visible if looks[row].brightness > BRIGHT),
        lambda row: -looks[row].brightness, mean,
        f"They are very bright (mean above {BRIGHT:g} of 255).", look,
    )  # fmt: skip
    yield from about(
        Kind.STRETCHED, (row for row in seen.readable if _stretch(looks[row]) > STRETCHED),
        lambda row: -_stretch(looks[row]), lambda row: f"{looks[row].width} x {looks[row].height}",
        f"One side is more than {STRETCHED:g} times the other; the network sees the central square alone.",
        "Cut them to the face.",
    )  # fmt: skip
    yield from about(
        Kind.TINY, (row for row in seen.readable if side(row) < size), side,
        lambda row: f"{looks[row].width} x {looks[row].height}",
        f"What is kept of them is smaller than the network's input of {size} pixels and gets enlarged.",
        _size_advice([side(row) for row in seen.readable]),
    )  # fmt: skip
    yield from _about_colour(seen)


def _size_advice(sides: Sequence[float]) -> str:
    """95% of the photos reach the size that is recommended."""
    fits = math.floor(float(np.percentile(sides, 5, method="lower"))) if sides else 0
    if fits < 32:
        return "Find larger originals."
    return f"Find larger originals, or train with --image-size {min(fits, 1024)}: 95% of them have that."


def _stretch(look: Look) -> float:
    return max(look.width, look.height) / max(1, min(look.width, look.height))


def _about_colour(seen: _Seen) -> Iterator[Finding]:
    """The fewer of grey and coloured pictures, when there are both."""
    grey = [row for row in seen.readable if seen.looks[row].colour <= GREY]
    coloured = [row for row in seen.readable if seen.looks[row].colour > GREY]
    if not grey or not coloured:
        return
    less = len(grey) <= len(coloured)
    rows = grey if less else coloured
    few, many = ("grey", "coloured") if less else ("coloured", "grey")
    yield Finding(
        Kind.GREY_AMONG_COLOUR if less else Kind.COLOUR_AMONG_GREY, Level.LOOK, len(rows), "photo",
        f"They are {few} among {many} ones, and what is {few} may be learned in place of who it is.",
        "Harmless when spread over many people; else find others, or make all of them grey.",
        tuple(seen.item([row], "") for row in rows),
    )  # fmt: skip


_Vectors: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"


def _doubtful(
    seen: _Seen, rows: _Rows, embed: Callable[[_Rows, Sequence[Look], Path], tuple[_Rows, _Vectors]]
) -> Iterator[Finding]:
    """Labels in doubt; vectors lie in a file meanwhile."""
    if len(seen.names(rows)) < 2:
        return
    with temporary_folder(Path(tempfile.gettempdir()), "faceprint-check-") as folder:
        rows, vectors = embed(rows, seen.looks, folder / "vectors.npy")
        names = {name: number for number, name in enumerate(sorted(seen.names(rows)))}
        labels = np.array([names[seen.identity(row) or ""] for row in rows], np.int64)
        found = mislabels(vectors, labels)
        del vectors
    if not found:
        return
    items = tuple(
        seen.item(
            [rows[one.row], rows[one.other], rows[one.own]],
            f"{one.other_distance:.2f} to {seen.identity(rows[one.other])}, {one.own_distance:.2f} to "
            f"{seen.identity(rows[one.row])}; doubt {one.strength:.2f}",
        )
        for one in found
    )
    yield Finding(
        Kind.WRONG_LABEL, Level.LOOK, len(items), "photo",
        "They lie nearer to another person, by nearest photo and by mean, than to their own.",
        "Look at the first ones beside the nearest of each; move what is wrong. --fix leaves them in.",
        items,
    )  # fmt: skip


def _embedded(
    data: str, scan: Callable[[], Iterator[Photo]],
    model: ModelBundle | Embedder, workers: int | None, on_photo: Callable[[Outcome], None],
    should_stop: Callable[[], bool], rows: _Rows, looks: Sequence[Look], target: Path,
) -> tuple[_Rows, _Vectors]:  # fmt: skip
    """Embeds some rows into a file; those that could be, and their vectors (n, d) float32, mapped."""
    wanted, embedded = set(rows), list[int]()
    photos_again = enumerate(scan())
    order: list[int] = []

    def chosen() -> Iterator[Photo]:
        for row, photo in photos_again:
            # A folder that changes meanwhile must not shift what belongs to what.
            if row in wanted and photo.path == looks[row].path:
                order.append(row)
                yield photo

    done = 0

    def note(outcome: Outcome) -> None:
        nonlocal done
        if outcome.reason is None:
            embedded.append(order[done])
        done += 1
        on_photo(outcome)

    report = embed_photos(model, chosen(), target, workers=workers, on_outcome=note, should_stop=should_stop)
    if report.interrupted:
        raise Interrupted("Stopped; nothing was written.")
    if not report.embedded:
        raise DataError(f"Not one photo of {data} could be read again; did it change meanwhile?")
    return embedded, np.load(target, mmap_mode="r")


def _counted(number: int) -> str:
    return f"{number:,} photo{'' if number == 1 else 's'}"
