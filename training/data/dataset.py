"""Data sets for training: reads identity folders or lists, splits each identity, loads augmented pixels."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from retrieval.errors import DataError, InputError, Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.photo_reader import PhotoReader
from retrieval.sources import lists
from retrieval.sources.exclusion import Exclusion, PassedOver
from retrieval.sources.folders import File, walk
from retrieval.sources.holdout import held_out
from retrieval.system.cpu import reading_threads
from retrieval.system.files import why
from retrieval.system.paths import is_url, is_utf8_name, parent_name
from training.data.augmentation import Augmentation, augmented

# Number of photos on which the graph of an exported model is checked.
TRIAL_PICTURES: Final = 16
# Number of names in an error message before "and N more".
_NAMES_SHOWN = 8

_Groups: TypeAlias = dict[str, list[File]]


@dataclass(frozen=True)
class Sample:
    """A readable photo and the index of its identity in `Split.labels`."""

    path: Path
    label: int


@dataclass(frozen=True)
class Split:
    """A data set, split into training and validation within each identity.

    Attributes:
        labels: identities in code point order; a sample's label is an index into it.
        train: the training samples.
        validation: the held-out samples; every label occurs in both parts.
        left_out: files of the folder that are in neither part, each with the reason.
        passed_over: files and folders that were excluded and not read.
    """

    labels: tuple[str, ...]
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    left_out: tuple[tuple[Path, str], ...]
    passed_over: PassedOver = field(default_factory=PassedOver)


def check_outside(out: Path, photos: Path) -> None:
    """Checks that a model's folder is outside the folder of its training photos.

    Raises:
        InputError: `out` is `photos`, or inside it.
    """
    if out.resolve().is_relative_to(photos.resolve()):
        raise InputError(f"The model {out} would lie among the photos of {photos}; choose another `out`.")


def load(
    folder: Path,
    *,
    validation_fraction: float,
    min_images: int | None,
    seed: int,
    exclude: Iterable[str] = (),
    reader: PhotoReader | None = None,
) -> Split:
    """Reads identity folders or a list, decodes every photo once to check it, and splits each identity.

    A photo that cannot be decoded is left out and listed in `left_out`. So are files directly in the folder,
    which have no identity. Which photos of an identity are held out depends only on the seed and on that
    identity, so that a new identity does not change the split of the others.

    Args:
        folder: one subfolder per identity; or a list of photos as `retrieval.sources.lists` reads it. A photo
            without an identity in the list has the name of its folder as identity.
        validation_fraction: share of each identity's photos to hold out, rounded to the nearest photo,
            at least one and never all.
        min_images: identities with fewer photos are left out; None refuses a set with an identity
            that cannot be split.
        seed: of the split.
        exclude: patterns of files and folders that are passed over, as in `sources.photos.scan`; not allowed
            with a list.
        reader: reads the photos, where a photo without a face is to be left out.

    Raises:
        DataError: there is no folder or list, fewer than two identities, an identity with a single photo, or
            no readable photo.
        InputError: a pattern is invalid, or patterns are given with a list.
    """
    passed_over = PassedOver()
    found = list(_found(folder, Exclusion.of(exclude), passed_over))
    loose = [(photo.path, photo.problem or "no-identity") for photo in found if photo.identity is None]
    groups, too_few_files = _large_enough(_by_identity(found), min_images)
    # Only photos of the remaining identities are decoded: a large set with a high `min_images` starts fast.
    groups, unreadable = _readable(groups, reader)
    groups, too_few_readable = _large_enough(groups, min_images)
    left_out = loose + too_few_files + unreadable + too_few_readable
    if not groups:
        raise DataError(_nothing_found(folder, left_out, passed_over))
    if len(groups) < 2:
        raise DataError(
            f"Telling people apart takes two identities at least, and {folder} has {len(groups)} "
            f"with enough photos; add subfolders, or lower `min_images`."
        )
    labels = tuple(groups)
    train: list[Sample] = []
    validation: list[Sample] = []
    for label, photos in enumerate(groups.values()):
        held = held_out(labels[label], len(photos), validation_fraction, seed)
        for index, photo in enumerate(photos):
            (validation if index in held else train).append(Sample(photo.path, label))
    return Split(labels, tuple(train), tuple(validation), tuple(left_out), passed_over)


def _found(data: Path, exclusion: Exclusion, passed_over: PassedOver) -> Iterator[File]:
    """Yields the files of identity folders, or those of a list."""
    if data.is_dir():
        return walk(data, exclusion=exclusion.with_file_of(data), passed_over=passed_over)
    if exclusion.patterns:
        raise InputError("Patterns to exclude are about folders; a list names its photos itself.")
    if data.is_file() and data.suffix.lower() in lists.SUFFIXES:
        return _listed(data)
    if data.is_file():
        endings = ", ".join(lists.SUFFIXES)
        raise DataError(f"There is no folder {data}; it is a file, and the name of a list ends in {endings}.")
    raise DataError(f"There is no folder {data}; give one with a subfolder of photos per identity.")


def _listed(path: Path) -> Iterator[File]:
    lists.check_list(path)
    try:
        for row in lists.rows(path, parent_name):
            # Training reads each photo in every epoch; an address would be downloaded as often.
            problem = row.problem or (Reason.UNSUPPORTED_FORMAT if is_url(row.path or "") else None)
            if not is_utf8_name(row.path or ""):
                problem = Reason.NAME_NOT_UTF8
            yield File(Path(row.path or path), row.identity, problem)
    except InputError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"The list {path} cannot be read: {why(error)}.") from error


def _by_identity(photos: Iterable[File]) -> dict[str, list[File]]:
    groups: dict[str, list[File]] = {}
    for photo in photos:
        if photo.identity is not None:
            groups.setdefault(photo.identity, []).append(photo)
    return dict(sorted(groups.items()))


def _readable(groups: _Groups, reader: PhotoReader | None) -> tuple[_Groups, list[tuple[Path, str]]]:
    """Returns the decodable photos by identity, and the paths of the others with the reason."""
    photos = [photo for group in groups.values() for photo in group]
    with ThreadPoolExecutor(reading_threads()) as threads:
        problems = list(threads.map(partial(_problem, reader=reader), photos))
    pairs = list(zip(photos, problems, strict=True))
    good = _by_identity(photo for photo, problem in pairs if problem is None)
    return good, [(photo.path, problem) for photo, problem in pairs if problem is not None]


def _problem(photo: File, reader: PhotoReader | None) -> str | None:
    if photo.problem:
        return photo.problem
    try:
        check_readable(photo.path, reader)
    except UnreadableImage as error:
        return error.reason
    return None


def check_readable(path: Path, reader: PhotoReader | None) -> None:
    """Decodes a photo and, with a reader that has a face detector, finds its face.

    Raises:
        UnreadableImage: that is not possible.
    """
    if reader is None or reader.detector is None:
        pixels.read(path, size=8)
    else:
        reader.square(path)


def _large_enough(groups: _Groups, min_images: int | None) -> tuple[_Groups, list[tuple[Path, str]]]:
    """Returns the identities with enough photos to be split, and the photos of the others."""
    lowest = max(2, min_images or 0)
    small = {name: photos for name, photos in groups.items() if len(photos) < lowest}
    if small and min_images is None:
        raise DataError(
            f"{len(small)} of {len(groups)} identities have a single photo and cannot be split into "
            f"training and validation: {_first_names(list(small))}; pass `min_images=2` (or more) to train "
            f"without the identities that have fewer photos."
        )
    kept = {name: photos for name, photos in groups.items() if name not in small}
    return kept, [(photo.path, "too-few-images") for photos in small.values() for photo in photos]


def _first_names(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _nothing_found(folder: Path, left_out: list[tuple[Path, str]], passed_over: PassedOver) -> str:
    if not left_out:
        return (
            f"{folder} has no photos{passed_over.aside()}; it must hold one subfolder of photos per identity."
        )
    counts = Counter(reason for _, reason in left_out)
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.most_common())
    return (
        f"{folder} has no identity with a readable photo ({reasons}); "
        "it must hold one subfolder of photos per identity."
    )


class Photographs(Dataset[tuple[torch.Tensor, int]]):
    """Samples as pixels: item i is (uint8 (size, size, 3), label)."""

    def __init__(self, samples: Sequence[Sample], reader: PhotoReader) -> None:
        self.samples = samples
        self.reader = reader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[index]
        picture = self.reader.square(sample.path)
        return torch.from_numpy(picture), sample.label


class AugmentedPhotographs(Dataset[tuple[torch.Tensor, int]]):
    """Samples with random augmentation; keys are (epoch, index).

    The augmentation of a photo is a function of (seed, epoch, index) only, independent of the worker and of
    the order of reads. So an interrupted epoch can be resumed with the same result.
    """

    def __init__(self, plain: Photographs, augmentation: Augmentation, *, seed: int) -> None:
        self.plain = plain
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        picture, label = self.plain[index]
        # index + 1: numpy pads seeds with zeros, so [seed, epoch, 0] would equal [seed, epoch], the seed of
        # the epoch's shuffle.
        random = np.random.default_rng([self.seed, epoch, index + 1])
        return augmented(picture, self.augmentation, random), label


def trial_pictures(samples: Sequence[Sample], reader: PhotoReader) -> NDArray[np.uint8]:
    """Returns at most 16 photos on which an exported graph is checked, (n, size, size, 3) uint8."""
    photographs = Photographs(tuple(samples[:TRIAL_PICTURES]), reader)
    return np.stack([photographs[index][0].numpy() for index in range(len(photographs))])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch, shuffled by (seed, epoch), starting with batch number `start`.

    An incomplete last batch is dropped, unless it is the only batch: batch normalisation over one or two
    photos is harmful. Of several processes, the one with number `rank` gets its share of each batch.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.batch_size = min(batch_size, length)
        self.steps = length // self.batch_size
        self.start = start
        self.epoch = epoch
        self.share = slice(rank, None, processes)
        self.order = np.random.default_rng([seed, epoch]).permutation(length).tolist()

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            chosen = self.order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in chosen[self.share]]


def plain_batches(
    photographs: Photographs, *, batch_size: int, workers: int, pin: bool
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Returns a loader of (pixels uint8 (n, size, size, 3), labels int64 (n,)), in the samples' order."""
    return DataLoader(
        photographs,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=leave_interrupts_to_the_parent,
    )


def augmented_batches(
    photographs: AugmentedPhotographs, batches: EpochBatches, *, workers: int, pin: bool
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Returns a loader of (pixels uint8 (n, size, size, 3), labels int64 (n,)) for one epoch."""
    return DataLoader(
        photographs,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=leave_interrupts_to_the_parent,
    )


def leave_interrupts_to_the_parent(_worker: int) -> None:
    """Ignores SIGINT in a worker: Ctrl-C reaches all processes, and only the parent can stop cleanly."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
