"""Findings of a data set check: their kinds, their levels, and the photos that show them."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """The severity of a finding."""

    HARMS = "harms"
    LOOK = "look"
    NOTE = "note"


class Kind(StrEnum):
    """The kind of a finding. The values are stable, and in descending order of severity."""

    TOO_FEW_PEOPLE = "too-few-people"
    TWO_NAMES = "two-names"
    TWO_NAMES_NEAR = "two-names-near"
    SINGLE_PHOTO = "single-photo"
    ACROSS_SPLIT = "across-split"
    UNREADABLE = "unreadable"
    WRONG_LABEL = "wrong-label"
    NO_FACE = "no-face"
    FACE_TOO_SMALL = "face-too-small"
    SEVERAL_FACES = "several-faces"
    ACROSS_SPLIT_NEAR = "across-split-near"
    COPY = "copy"
    NEAR_COPY = "near-copy"
    TOO_FEW_PHOTOS = "too-few-photos"
    FACE_BLURRED = "face-blurred"
    FACE_TURNED = "face-turned"
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
    """A photo of a finding.

    Attributes:
        path, identity: of the photo.
        half: "training", "validation", or None for a photo in neither.
        box: left, top, width and height of its face in pixels, with one decimal; None where none is known.
    """

    path: str | None
    identity: str | None
    half: str | None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One case of a finding: the photos that belong together, and a detail in words."""

    photos: tuple[Shown, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class DataFinding:
    """All cases of one kind of finding.

    Attributes:
        kind, level: the kind and the severity.
        count: the number of photos or identities, as `unit` says: "photo" or "identity".
        says: what it is and why it matters.
        advice: what to do.
        items: all cases, the worst first.
    """

    kind: Kind
    level: Level
    count: int
    unit: str
    says: str
    advice: str
    items: tuple[Item, ...]
