"""Protocols: which photos of a data folder are enrolled and which are probes. Opens no photo."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.errors import DataError
from retrieval.models.bundle import ModelBundle
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.holdout import held_out
from retrieval.sources.photos import Photo, scan
from training.evaluation.observe import shown


@dataclass(frozen=True)
class Division:
    """A division of photos into enrolled photos and probes.

    Attributes:
        enrolled, probes: in the order of the files.
        says: the rule of the division, as text for people.
        trained_photos: number of photos in neither part because the model was trained on them.
        unnamed: number of photos in neither part because they have no identity.
    """

    enrolled: tuple[Photo, ...]
    probes: tuple[Photo, ...]
    says: str
    trained_photos: int = 0
    unnamed: int = 0


def photos_of(
    data: Path, *, exclude: Sequence[str] = (), passed_over: PassedOver | None = None
) -> list[Photo]:
    """Returns every file of a data folder; adds excluded ones (see `photos.scan`) to `passed_over`.

    Raises:
        DataError: the folder does not exist, or has no files.
    """
    if not data.exists():
        raise DataError(f"There is no folder {data}; give one with a subfolder of photos per identity.")
    passed_over = PassedOver() if passed_over is None else passed_over
    found = list(scan([data], exclude=exclude, passed_over=passed_over))
    if not found:
        raise DataError(
            f"There are no photos in {data}{passed_over.aside()}; "
            "it must hold one subfolder of photos per identity."
        )
    return found


def closed(
    found: Sequence[Photo], data: Path, bundle: ModelBundle, *, fraction: float, seed: int
) -> Division:
    """Returns the model's own split, if the data has its photos; otherwise a new split of the data.

    In the model's own split, the training photos are enrolled and the held-out photos are probes.

    Raises:
        DataError: only some photos of the model's split are there, or no identity has two photos.
    """
    by_name = {shown(photo.path or "", str(data)): photo for photo in found}
    train, validation = _card(bundle, "train"), _card(bundle, "validation")
    present = [name for name in (*train, *validation) if name in by_name]
    if present:
        missing = [name for name in (*train, *validation) if name not in by_name]
        if missing:
            raise DataError(
                f"{data} lacks {len(missing):,} of the {len(present) + len(missing):,} photos of the model's "
                f"own split, such as {missing[0]}; give all that it was trained on, or other photos."
            )
        return Division(
            tuple(by_name[name] for name in train),
            tuple(by_name[name] for name in validation),
            "the model's own split",
        )
    people = _people(found)
    enrolled, probes = [], []
    for name, photos in people.items():
        if len(photos) > 1:
            kept, held = _split(name, photos, fraction, seed)
            enrolled += kept
            probes += held
    if not probes:
        raise DataError(f"No person in {data} has two photos; one is needed to enroll and one to search for.")
    return Division(
        tuple(enrolled), tuple(probes), _split_rule(fraction, seed), unnamed=_without_identity(found)
    )


def open_set(
    found: Sequence[Photo], data: Path, bundle: ModelBundle, *, min_images: int, fraction: float, seed: int
) -> Division:
    """Enrolls people with at least `min_images` photos, with a share of each held out; others are strangers.

    A photo that the model was trained on is never a probe. For people of the model's split, the photos of its
    training half are enrolled and their other photos are probes.

    Raises:
        DataError: no identity has that many photos, or every identity has.
    """
    trained = frozenset(_card(bundle, "train"))
    known = {name.split("/")[0] for name in trained}
    enrolled: list[Photo] = []
    probes: list[Photo] = []
    strangers: list[Photo] = []
    left_out = 0
    for name, photos in _people(found).items():
        fresh = [one for one in photos if shown(one.path or "", str(data)) not in trained]
        if len(photos) < min_images:
            strangers += fresh
            left_out += len(photos) - len(fresh)
        elif name in known and len(fresh) < len(photos):
            enrolled += [one for one in photos if one not in fresh]
            probes += fresh
        else:
            kept, held = _split(name, photos, fraction, seed)
            enrolled += kept
            probes += held
    if not enrolled or not strangers:
        who = "No person" if not enrolled else "Every person"
        raise DataError(
            f"{who} in {data} has {min_images} photos or more; choose another `min_images`, so that some are "
            "enrolled and some are strangers."
        )
    says = f"people with {min_images} photos or more enrolled, {_split_rule(fraction, seed)}"
    if known & {one.identity for one in enrolled}:
        says += ", but for the model's own people, whose photos are cut as in training"
    return Division(tuple(enrolled), (*probes, *strangers), says, left_out, _without_identity(found))


def untrained(found: Sequence[Photo], data: Path, bundle: ModelBundle) -> Division:
    """Makes a probe of every photo that has an identity and that the model was not trained on."""
    trained = frozenset(_card(bundle, "train"))
    named = [one for one in found if one.identity is not None]
    fresh = [one for one in named if shown(one.path or "", str(data)) not in trained]
    return Division(
        (),
        tuple(fresh),
        "every photo",
        trained_photos=len(named) - len(fresh),
        unnamed=_without_identity(found),
    )


def _card(bundle: ModelBundle, half: str) -> tuple[str, ...]:
    split: Mapping[str, Any] = bundle.split
    return tuple(split.get(half, ()))


def _people(found: Iterable[Photo]) -> dict[str, list[Photo]]:
    people: dict[str, list[Photo]] = {}
    for photo in found:
        if photo.identity is not None:
            people.setdefault(photo.identity, []).append(photo)
    return people


def _without_identity(found: Iterable[Photo]) -> int:
    return sum(photo.identity is None for photo in found)


def _split(name: str, photos: Sequence[Photo], fraction: float, seed: int) -> tuple[list[Photo], list[Photo]]:
    """Splits a person's photos as training does: the photos that are kept, and those that are held out."""
    chosen = held_out(name, len(photos), fraction, seed)
    return (
        [photo for index, photo in enumerate(photos) if index not in chosen],
        [photo for index, photo in enumerate(photos) if index in chosen],
    )


def _split_rule(fraction: float, seed: int) -> str:
    return f"{fraction:.0%} of each one's photos held out, seed {seed}"
