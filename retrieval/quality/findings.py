"""Findings of a data set check: their kinds, how serious they are, and the photos that show them."""

from dataclasses import dataclass
from enum import StrEnum


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
class DataFinding:
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
