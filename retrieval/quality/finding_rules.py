"""The rules of a data set check: for each kind of finding its sentence, its advice and its detector."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from retrieval.images.photo_reader import MIN_FACE_SIDE
from retrieval.images.preprocessing import Preprocessing
from retrieval.quality.findings import DataFinding, Item, Kind, Level
from retrieval.quality.near_duplicates import FLAT
from retrieval.quality.photo_set import Person, PhotoSet, Rows
from retrieval.quality.photo_stats import PhotoStats

# Mean levels, 0 to 255, below and above which a picture is dark or bright.
DARK: Final = 30.0
BRIGHT: Final = 225.0
# An aspect ratio above this is an odd shape: the network sees only the central square.
STRETCHED: Final = 2.0
# A picture is grey up to this difference between channels, in levels; JPEG adds a little colour to grey.
GREY: Final = 12.0
# Identities are uneven where the largest has more than this many times the photos of the smallest.
UNEVEN: Final = 10
# The least sharpness of an aligned face, at an input of 112 pixels without a margin, and the largest yaw. Of
# 1,200 photos of LFW, drawn at random, 12 are less sharp (median 9.3) and 6 are turned further (median 0.17).
# They were looked at: the former are out of focus, blurred by motion or enlarged, the latter are profiles and
# faces turned halfway to one.
MIN_SHARPNESS: Final = 4.8
MAX_YAW: Final = 1.0
# The more pixels a face has, the less neighbours differ. On the same photos the sharpness that 1 % fall below
# is 9.2, 4.8, 3.2 and 2.0 at 64, 112, 160 and 224 pixels: within 5 % a power of the size with this exponent.
# With a margin of 0.2 it is 7.3 at 112 pixels, as at the 80 that the template then has.
_SHARPNESS_EXPONENT: Final = -1.25
# Input sizes of a network in pixels: the smallest worth training, and the largest that `train` accepts.
SMALLEST_INPUT: Final = 32
LARGEST_INPUT: Final = 1024


@dataclass(frozen=True)
class Evidence:
    """The input of the rules: the photos, and the label errors that a model found."""

    photos: PhotoSet
    doubts: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Cases:
    """The result of a rule: cases, worst first; the count of photos or identities; facts for sentences."""

    items: tuple[Item, ...]
    count: int
    facts: Mapping[str, object] = field(default_factory=dict)


Collect: TypeAlias = Callable[[Evidence], Cases | None]


@dataclass(frozen=True)
class Rule:
    """A rule: one row of the table `RULES`.

    Attributes:
        kind, level, unit: as in `DataFinding`.
        title: the heading on the page.
        says, advice: what it is and why it matters, and what to do; fields in braces are facts of its cases.
        collect: returns the cases; None where there are none.
    """

    kind: Kind
    level: Level
    unit: str
    title: str
    says: str
    advice: str
    collect: Collect

    def finding(self, evidence: Evidence) -> DataFinding | None:
        """Returns the finding of this rule; None without cases."""
        cases = self.collect(evidence)
        if cases is None:
            return None
        says, advice = self.says.format_map(cases.facts), self.advice.format_map(cases.facts)
        return DataFinding(self.kind, self.level, cases.count, self.unit, says, advice, cases.items)


def findings(evidence: Evidence) -> Iterator[DataFinding]:
    """Yields the findings of all rules by level, the most serious first, then in the order of `Kind`."""
    levels, kinds = list(Level), list(Kind)
    for rule in sorted(RULES, key=lambda one: (levels.index(one.level), kinds.index(one.kind))):
        found = rule.finding(evidence)
        if found is not None:
            yield found


def least_sharpness(preprocessing: Preprocessing) -> float:
    """Returns the sharpness below which a face is blurred at an input size, with one decimal."""
    margin = 0.0 if preprocessing.faces is None else preprocessing.faces.margin
    template = preprocessing.size / (1 + 2 * margin)
    return round(MIN_SHARPNESS * math.pow(template / 112, _SHARPNESS_EXPONENT), 1)


# Identities


def _too_few_people(evidence: Evidence) -> Cases | None:
    photos = evidence.photos
    if len(photos.usable) >= 2:
        return None
    items = _of_people(photos, photos.usable, lambda one: str(one.photos))
    return Cases(items, len(items), {"lowest": photos.options.lowest})


def _too_small(*, refused: bool) -> Collect:
    """Returns a detector of identities too small to split: that `train` refuses, or leaves out as told."""

    def collect(evidence: Evidence) -> Cases | None:
        photos = evidence.photos
        small = [person for person in photos.people if not person.training]
        if not small or refused != (photos.options.min_images is None):
            return None
        items = _of_people(photos, small, lambda one: _counted(one.photos))
        aligned = photos.options.preprocessing.faces is not None
        taken = "readable photos with a face" if aligned else "readable photos"
        return Cases(items, len(items), {"lowest": photos.options.lowest, "taken": taken})

    return collect


def _uneven(evidence: Evidence) -> Cases | None:
    photos = evidence.photos
    sizes = sorted(photos.usable, key=lambda one: (-one.photos, one.name))
    if len(sizes) < 2 or sizes[0].photos <= sizes[-1].photos * UNEVEN:
        return None
    most, fewest = sizes[0], sizes[-1]
    facts = {"most": most.photos, "name": most.name, "fewest": fewest.photos}
    facts |= {"effective": photos.effective_people}
    return Cases(_of_people(photos, sizes, lambda one: f"{one.photos:,}"), len(sizes), facts)


def _of_people(photos: PhotoSet, some: Iterable[Person], said: Callable[[Person], str]) -> tuple[Item, ...]:
    """Returns a case for each identity, with its first photo."""
    return tuple(photos.item(photos.of_person[one.name][:1], f"{one.name}: {said(one)}") for one in some)


def _counted(number: int) -> str:
    return f"{number:,} photo{'' if number == 1 else 's'}"


def _no_identity(evidence: Evidence) -> Cases | None:
    return _each(evidence.photos, evidence.photos.loose)


# Copies


def _copies(groups: Callable[[PhotoSet], Sequence[tuple[Rows, str]]]) -> Collect:
    """Returns a detector of copies: a case for each group of rows, with its detail."""

    def collect(evidence: Evidence) -> Cases | None:
        photos = evidence.photos
        found = groups(photos)
        if not found:
            return None
        items = tuple(photos.item(rows, detail) for rows, detail in found)
        return Cases(items, len({row for rows, _ in found for row in rows}))

    return collect


def _two_names(photos: PhotoSet) -> list[tuple[Rows, str]]:
    return [(rows, _SAME) for rows in photos.copies.exact if len(photos.names(rows)) > 1]


def _two_names_near(photos: PhotoSet) -> list[tuple[Rows, str]]:
    pairs = sorted(photos.copies.two_names, key=lambda one: -one[2])
    return [([one, other], _alike(correlation)) for one, other, correlation in pairs]


def _same_name(photos: PhotoSet, *, across: bool) -> list[tuple[Rows, str]]:
    """Returns exact copies within one identity, on both sides of the split or on one."""
    groups = (rows for rows in photos.copies.exact if len(photos.names(rows)) < 2)
    return [(rows, _SAME) for rows in groups if photos.across(rows) == across]


def _near(photos: PhotoSet, *, across: bool) -> list[tuple[Rows, str]]:
    """Returns near copies within one identity, on both sides of the split or on one, most similar first."""
    groups = [
        ([first, *(row for row, _ in others)], min(correlation for _, correlation in others))
        for first, others in photos.copies.near.items()
    ]
    groups.sort(key=lambda one: -one[1])
    return [(rows, _alike(correlation)) for rows, correlation in groups if photos.across(rows) == across]


_SAME: Final = "the same bytes"


def _alike(correlation: float) -> str:
    return f"correlation {correlation:.3f}"


# Photos


def _unreadable(evidence: Evidence) -> Cases | None:
    stats = evidence.photos.stats
    rows = [row for row, one in enumerate(stats) if one.reason is not None]
    counts = Counter(str(stats[row].reason) for row in rows)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.most_common())
    return _each(evidence.photos, rows, lambda one: f"{one.reason}: {one.detail}", {"reasons": reasons})


def _pictures(
    holds: Callable[[PhotoStats], bool],
    *,
    worst: Callable[[PhotoStats], float],
    detail: Callable[[PhotoStats], str],
) -> Collect:
    """Returns a detector of readable photos for which `holds` is True, in ascending order of `worst`."""

    def collect(evidence: Evidence) -> Cases | None:
        stats = evidence.photos.stats
        rows = [row for row in evidence.photos.readable if holds(stats[row])]
        return _each(evidence.photos, sorted(rows, key=lambda row: worst(stats[row])), detail)

    return collect


def _tiny(evidence: Evidence) -> Cases | None:
    photos, wanted = evidence.photos, evidence.photos.options.preprocessing
    sides = {row: _kept(photos.stats[row], wanted) for row in photos.readable if photos.stats[row].trainable}
    rows = sorted((row for row, side in sides.items() if side < wanted.size), key=sides.__getitem__)
    facts = {"size": wanted.size, "alternative": _alternative(list(sides.values()))}
    return _each(photos, rows, _measures, facts)


def _alternative(sides: Sequence[float]) -> str:
    """Returns advice with an input size that 95% of the photos reach; "" where that is too small to train."""
    fits = math.floor(float(np.percentile(sides, 5, method="lower"))) if sides else 0
    if fits < SMALLEST_INPUT:
        return ""
    return f", or train with `image_size={min(fits, LARGEST_INPUT)}`: 95% of them have that"


def _colour(*, fewer_are_grey: bool) -> Collect:
    """Returns a detector of the minority among grey and coloured photos; a tie counts the grey ones."""

    def collect(evidence: Evidence) -> Cases | None:
        photos = evidence.photos
        grey = [row for row in photos.readable if photos.stats[row].colour <= GREY]
        coloured = [row for row in photos.readable if photos.stats[row].colour > GREY]
        if not grey or not coloured or fewer_are_grey != (len(grey) <= len(coloured)):
            return None
        return _each(photos, grey if fewer_are_grey else coloured)

    return collect


def _each(
    photos: PhotoSet,
    rows: Sequence[int],
    detail: Callable[[PhotoStats], str] = lambda one: "",
    facts: Mapping[str, Any] | None = None,
) -> Cases | None:
    """Returns a case for each photo; None without photos."""
    items = tuple(photos.item([row], detail(photos.stats[row])) for row in rows)
    return Cases(items, len(items), facts or {}) if items else None


def _kept(one: PhotoStats, wanted: Preprocessing) -> float:
    """Returns the side of what the network sees of a photo, in pixels of the photo."""
    return wanted.crop * _shorter(one) if one.face is None else one.face.input_side


def _blurred(evidence: Evidence) -> Cases | None:
    photos = evidence.photos
    size = photos.options.preprocessing.size
    limit = least_sharpness(photos.options.preprocessing)
    sharpness = {
        row: one.face.sharpness
        for row, one in enumerate(photos.stats)
        if one.trainable and one.face is not None and one.face.sharpness < limit
    }
    rows = sorted(sharpness, key=sharpness.__getitem__)
    return _each(photos, rows, _sharpness, {"limit": limit, "size": size})


def _sharpness(one: PhotoStats) -> str:
    return "" if one.face is None else f"sharpness {one.face.sharpness:.1f}"


def _yaw(one: PhotoStats) -> float:
    return 0.0 if one.face is None or not one.trainable else abs(one.face.yaw)


def _face_side(one: PhotoStats) -> float:
    return math.inf if one.face is None else one.face.side


def _large_faces(one: PhotoStats) -> int:
    return one.faces or 0


def _flat(one: PhotoStats) -> bool:
    return one.contrast < FLAT


def _shorter(one: PhotoStats) -> int:
    return min(one.width, one.height)


def _stretch(one: PhotoStats) -> float:
    return max(one.width, one.height) / max(1, _shorter(one))


def _measures(one: PhotoStats) -> str:
    """Returns the size of a photo; of one with a face, the side of what the network sees too."""
    whole = f"{one.width} x {one.height}"
    return whole if one.face is None else f"{one.face.input_side:.0f} pixels of {whole}"


def _brightness(one: PhotoStats) -> str:
    return f"brightness {one.brightness:.0f}"


def _in_doubt(evidence: Evidence) -> Cases | None:
    return Cases(evidence.doubts, len(evidence.doubts)) if evidence.doubts else None


_KEEP_ONE: Final = "Keep one of each; the cleaned list (`fix`) does."
_KEEP_RIGHT: Final = "Look, and keep the right one; the cleaned list (`fix`) has none of them."
_LOOK: Final = "Look at them, and remove those that show no person."
_HARMLESS: Final = "Harmless when spread over many people; else find others, or make all of them grey."

RULES: Final = (
    Rule(
        Kind.TOO_FEW_PEOPLE, Level.HARMS, "identity", "Too few identities",
        "Telling people apart takes two identities at least that can be split.",
        "Add subfolders with {lowest} photos or more each.",
        _too_few_people,
    ),
    Rule(
        Kind.TWO_NAMES, Level.HARMS, "photo", "One file under two names",
        "One file under two names: one of them is wrong, and both are learned.",
        _KEEP_RIGHT,
        _copies(_two_names),
    ),
    Rule(
        Kind.TWO_NAMES_NEAR, Level.HARMS, "photo", "One photograph under two names",
        "One photograph, saved twice, under two names: one of them is wrong.",
        _KEEP_RIGHT,
        _copies(_two_names_near),
    ),
    Rule(
        Kind.SINGLE_PHOTO, Level.HARMS, "identity", "Identities that cannot be split",
        "They have fewer than 2 {taken}, and cannot be split into training and validation: "
        "train refuses.",
        "Add photos, or train with `min_images=2` or more, or on the cleaned list (`fix`).",
        _too_small(refused=True),
    ),
    Rule(
        Kind.ACROSS_SPLIT, Level.HARMS, "photo", "Copies across the split",
        "Held-out photos are among the training photos too: validation figures are too good.",
        _KEEP_ONE,
        _copies(lambda photos: _same_name(photos, across=True)),
    ),
    Rule(
        Kind.UNREADABLE, Level.HARMS, "photo", "Unreadable files",
        "They cannot be read: {reasons}.",
        "Replace or remove them; train and ingest skip them, the cleaned list (`fix`) has none.",
        _unreadable,
    ),
    Rule(
        Kind.WRONG_LABEL, Level.LOOK, "photo", "Labels in doubt",
        "They lie nearer to another person, by nearest photo and by mean, than to their own.",
        "Compare the first ones with their nearest; move what is wrong. The cleaned list (`fix`) has them.",
        _in_doubt,
    ),
    Rule(
        Kind.NO_FACE, Level.LOOK, "photo", "Photos without a face",
        "No face was found in them; train and ingest with this detector skip them.",
        "Remove them, or skip them with `exclude`; the cleaned list (`fix`) has none. Where most photos are "
        "listed, the detector does not suit them: train without one.",
        _pictures(
            lambda one: one.faces is not None and one.face is None, worst=lambda one: 0.0,
            detail=lambda one: "",
        ),
    ),
    Rule(
        Kind.FACE_TOO_SMALL, Level.LOOK, "photo", "Tiny faces",
        f"The shorter side of their face is below {MIN_FACE_SIDE} pixels, too few to tell people apart; "
        "train and ingest with this detector skip them.",
        "Find larger originals, or skip them with `exclude`; the cleaned list (`fix`) has none. "
        "ingest --min-face sets another limit.",
        _pictures(
            lambda one: _face_side(one) < MIN_FACE_SIDE, worst=_face_side,
            detail=lambda one: f"face of {_face_side(one):.0f} pixels",
        ),
    ),
    Rule(
        Kind.SEVERAL_FACES, Level.LOOK, "photo", "Several faces under one name",
        "They show several people under the name of one; train and ingest take the largest and most central "
        "face.",
        "Look whether that is the right person. Crop wrong ones to the face, or skip them with `exclude`; "
        "ingest --faces one rejects all of them.",
        _pictures(
            lambda one: one.identity is not None and _large_faces(one) > 1,
            worst=lambda one: -_large_faces(one), detail=lambda one: f"{_large_faces(one)} faces",
        ),
    ),
    Rule(
        Kind.FACE_BLURRED, Level.LOOK, "photo", "Blurred faces",
        "Their face is blurred: a sharpness below {limit:g}, at {size} pixels.",
        "Find sharper originals, or skip the worst with `exclude`; ingest --min-sharpness {limit:g} rejects "
        "them with a model of this input.",
        _blurred,
    ),
    Rule(
        Kind.FACE_TURNED, Level.LOOK, "photo", "Turned faces",
        f"Their face is turned far to a side: a yaw above {MAX_YAW:g}, where 0 is frontal.",
        "Harmless where each person has frontal photos too; else add some, or skip these with `exclude`. "
        f"ingest --max-yaw {MAX_YAW:g} rejects them.",
        _pictures(
            lambda one: _yaw(one) > MAX_YAW, worst=lambda one: -_yaw(one),
            detail=lambda one: f"yaw {_yaw(one):.2f}",
        ),
    ),
    Rule(
        Kind.ACROSS_SPLIT_NEAR, Level.LOOK, "photo", "Near copies across the split",
        "Held-out photos look like training photos of the same shot: validation figures are flattered.",
        _KEEP_ONE,
        _copies(lambda photos: _near(photos, across=True)),
    ),
    Rule(
        Kind.COPY, Level.LOOK, "photo", "Copies",
        "Copies of a file of the same person add nothing and count twice.",
        _KEEP_ONE,
        _copies(lambda photos: _same_name(photos, across=False)),
    ),
    Rule(
        Kind.NEAR_COPY, Level.LOOK, "photo", "Near copies",
        "Near copies of a photo of the same person add little and count twice.",
        _KEEP_ONE,
        _copies(lambda photos: _near(photos, across=False)),
    ),
    Rule(
        Kind.TOO_FEW_PHOTOS, Level.LOOK, "identity", "Identities with too few photos",
        "They have fewer than {lowest} {taken}; train leaves them out.",
        "Add photos, or lower `min_images`.",
        _too_small(refused=False),
    ),
    Rule(
        Kind.FLAT, Level.LOOK, "photo", "Nearly constant pictures",
        f"They are nearly of one brightness (deviation below {FLAT:g} of 255).",
        _LOOK,
        _pictures(
            _flat, worst=lambda one: one.contrast, detail=lambda one: f"contrast {one.contrast:.1f}"
        ),
    ),
    Rule(
        Kind.DARK, Level.LOOK, "photo", "Very dark pictures",
        f"They are very dark (mean below {DARK:g} of 255).",
        _LOOK,
        _pictures(
            lambda one: one.brightness < DARK and not _flat(one),
            worst=lambda one: one.brightness, detail=_brightness,
        ),
    ),
    Rule(
        Kind.BRIGHT, Level.LOOK, "photo", "Very bright pictures",
        f"They are very bright (mean above {BRIGHT:g} of 255).",
        _LOOK,
        _pictures(
            lambda one: one.brightness > BRIGHT and not _flat(one),
            worst=lambda one: -one.brightness, detail=_brightness,
        ),
    ),
    Rule(
        Kind.STRETCHED, Level.LOOK, "photo", "Odd shapes",
        f"One side is more than {STRETCHED:g} times the other; the network sees the central square alone.",
        "Cut them to the face.",
        _pictures(
            # Of a photo with a face, the network sees that.
            lambda one: _stretch(one) > STRETCHED and one.face is None,
            worst=lambda one: -_stretch(one), detail=_measures,
        ),
    ),
    Rule(
        Kind.TINY, Level.LOOK, "photo", "Smaller than the input",
        "What is kept of them is smaller than the network's input of {size} pixels and gets enlarged.",
        "Find larger originals{alternative}.",
        _tiny,
    ),
    Rule(
        Kind.GREY_AMONG_COLOUR, Level.LOOK, "photo", "Grey among coloured pictures",
        "They are grey among coloured ones, and what is grey may be learned in place of who it is.",
        _HARMLESS,
        _colour(fewer_are_grey=True),
    ),
    Rule(
        Kind.COLOUR_AMONG_GREY, Level.LOOK, "photo", "Coloured among grey pictures",
        "They are coloured among grey ones, and what is coloured may be learned in place of who it is.",
        _HARMLESS,
        _colour(fewer_are_grey=False),
    ),
    Rule(
        Kind.UNEVEN, Level.LOOK, "identity", "Uneven identities",
        "The largest has {most:,} photos ({name}) and the smallest {fewest:,}: as varied as "
        "{effective:,.0f} of equal size.",
        "Raise `min_images`, or add photos of the small ones; read accuracy by identity.",
        _uneven,
    ),
    Rule(
        Kind.NO_IDENTITY, Level.NOTE, "photo", "Photos without an identity",
        "They are in no identity's folder; train leaves them out.",
        "Move them into folders, if they matter.",
        _no_identity,
    ),
)  # fmt: skip
