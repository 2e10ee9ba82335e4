"""Data sets: what is read, how it is split, and what augmentation does to the pixels."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retrieval.errors import DataError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from training.data import dataset as data
from training.data.augmentation import Augmentation, displaced
from training.data.dataset import AugmentedPhotographs, EpochBatches, Photographs, Sample, Split

# A machine with a single core, and Python from 3.12 on, warn of worker processes.
with_workers = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:.*multi-threaded.*fork:DeprecationWarning"
)


def people(folder: Path, photos: Mapping[str, int]) -> Path:
    """An identity folder with so many photos of each, every one another small picture."""
    for name, number in photos.items():
        (folder / name).mkdir(parents=True)
        for index in range(number):
            noise = np.random.default_rng([index, *name.encode()]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(folder / name / f"{index:03d}.png")
    return folder


def load(folder: Path, **options: Any) -> Split:
    return data.load(folder, **{"validation_fraction": 0.3, "min_images": None, "seed": 0, **options})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, **options)
    return str(caught.value)


def names(samples: tuple[Sample, ...]) -> set[str]:
    return {f"{sample.path.parent.name}/{sample.path.name}" for sample in samples}


@pytest.mark.parametrize(
    ("photos", "fraction", "held_out"),
    [
        (2, 0.3, 1),
        (3, 0.3, 1),
        (5, 0.3, 2),
        (10, 0.3, 3),
        (20, 0.3, 6),
        (10, 0.26, 3),
        (10, 0.24, 2),
        (2, 0.9, 1),
        (3, 0.99, 2),
        (9, 0.01, 1),
    ],
)
def test_each_identity_holds_out_its_share_at_least_one_and_never_all(
    tmp_path: Path, photos: int, fraction: float, held_out: int
) -> None:
    folder = people(tmp_path, {"Ada": photos, "Bo": photos, "Cy": 4})
    split = load(folder, validation_fraction=fraction)
    validation, train = (Counter(s.label for s in half) for half in (split.validation, split.train))
    assert (validation[0], validation[1]) == (held_out, held_out)
    assert (train[0], train[1]) == (photos - held_out, photos - held_out)
    assert 1 <= validation[2] <= 3


def test_train_and_validation_are_disjoint_and_together_every_photo(tmp_path: Path) -> None:
    split = load(people(tmp_path, {"Ada": 7, "Bo": 5, "Cy": 2}))
    assert names(split.train).isdisjoint(names(split.validation))
    assert names(split.train) | names(split.validation) == {
        f"{name}/{index:03d}.png"
        for name, number in (("Ada", 7), ("Bo", 5), ("Cy", 2))
        for index in range(number)
    }
    assert len(split.train) + len(split.validation) == 14
    assert split.left_out == ()


def test_labels_are_the_folders_in_code_point_order_and_each_sample_has_its_own(tmp_path: Path) -> None:
    split = load(people(tmp_path, {"bo": 2, "Zoë": 2, "Ada": 2, "Émile": 2}))
    assert split.labels == ("Ada", "Zoë", "bo", "Émile")
    for sample in (*split.train, *split.validation):
        assert split.labels[sample.label] == sample.path.parent.name


def test_the_same_seed_gives_the_same_split(tmp_path: Path) -> None:
    folder = people(tmp_path, {"Ada": 8, "Bo": 9})
    assert load(folder, seed=5) == load(folder, seed=5)


def test_another_seed_gives_another_split_of_the_same_photos(tmp_path: Path) -> None:
    folder = people(tmp_path, {"Ada": 8, "Bo": 9})
    one, other = load(folder, seed=0), load(folder, seed=1)
    assert names(one.validation) != names(other.validation)
    assert names(one.train) | names(one.validation) == names(other.train) | names(other.validation)


def test_identities_with_equally_many_photos_hold_out_different_ones(tmp_path: Path) -> None:
    split = load(people(tmp_path, {f"person {number}": 10 for number in range(6)}))
    held_out = {
        tuple(s.path.name for s in split.validation if s.label == label) for label in range(len(split.labels))
    }
    assert len(held_out) > 1


@pytest.mark.parametrize("added", ["Aaron", "Bob", "Zed"])
def test_a_new_identity_does_not_reshuffle_the_others(tmp_path: Path, added: str) -> None:
    folder = people(tmp_path, {"Ada": 8, "Bo": 9, "Cy": 5})
    before = load(folder)
    people(folder, {added: 6})
    after = load(folder)
    assert {name for name in names(after.validation) if not name.startswith(added)} == names(
        before.validation
    )
    assert {name for name in names(after.train) if not name.startswith(added)} == names(before.train)


def test_unreadable_photos_and_loose_files_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    folder = people(tmp_path, {"Ada": 4, "Bo": 4})
    (folder / "Ada" / "empty.jpg").touch()
    (folder / "Ada" / "notes.txt").write_text("taken in Rome")
    whole = (folder / "Bo" / "000.png").read_bytes()
    (folder / "Bo" / "short.png").write_bytes(whole[: len(whole) // 2])
    (folder / "loose.png").write_bytes(whole)
    split = load(folder)
    assert sorted((path.relative_to(folder).as_posix(), reason) for path, reason in split.left_out) == [
        ("Ada/empty.jpg", "empty-file"),
        ("Ada/notes.txt", "not-an-image"),
        ("Bo/short.png", "truncated"),
        ("loose.png", "no-identity"),
    ]
    assert len(split.train) + len(split.validation) == 8


def test_an_identity_whose_photos_are_all_unreadable_is_no_label(tmp_path: Path) -> None:
    folder = people(tmp_path, {"Ada": 2, "Bo": 2, "Cy": 1})
    (folder / "Cy" / "000.png").write_text("no picture")
    (folder / "Cy" / "001.png").write_text("no picture")
    split = load(folder)
    assert split.labels == ("Ada", "Bo")
    assert {reason for _, reason in split.left_out} == {"not-an-image"}


def test_an_identity_with_a_single_photo_is_named_and_the_option_that_helps_too(tmp_path: Path) -> None:
    assert refusal(people(tmp_path, {"Ada": 3, "Bo": 1, "Cy": 2})) == (
        "1 of 3 identities have a single photo and cannot be split into training and validation: Bo; "
        "pass `min_images=2` (or more) to train without the identities that have fewer photos."
    )


def test_a_photo_that_cannot_be_read_does_not_count_towards_the_two(tmp_path: Path) -> None:
    folder = people(tmp_path, {"Ada": 3, "Bo": 2, "Cy": 2})
    (folder / "Bo" / "001.png").write_text("no picture")
    assert "1 of 3 identities have a single photo" in (message := refusal(folder))
    assert ": Bo;" in message


def test_of_many_identities_with_a_single_photo_eight_are_named(tmp_path: Path) -> None:
    message = refusal(people(tmp_path, {f"p{number}": 1 for number in range(11)}))
    assert ": p0, p1, p10, p2, p3, p4, p5, p6 and 3 more;" in message


@pytest.mark.parametrize(
    ("min_images", "labels"), [(2, "Ada Bo Cy"), (3, "Ada Bo"), (4, "Ada Bo"), (5, "Ada")]
)
def test_min_images_leaves_out_identities_with_fewer(tmp_path: Path, min_images: int, labels: str) -> None:
    folder = people(tmp_path, {"Ada": 5, "Bo": 4, "Cy": 2, "Di": 1, "Ed": 7})
    split = load(folder, min_images=min_images)
    assert split.labels == (*labels.split(), "Ed")
    left_out = Counter(path.parent.name for path, _ in split.left_out)
    assert left_out == {
        name: number
        for name, number in (("Ada", 5), ("Bo", 4), ("Cy", 2), ("Di", 1))
        if name not in split.labels
    }
    assert {reason for _, reason in split.left_out} == {"too-few-images"}


def test_identities_with_too_few_photos_are_left_out_undecoded(tmp_path: Path) -> None:
    """A broken photo of an identity that is too small anyway is counted as too few, not as broken."""
    folder = people(tmp_path, {"Ada": 3, "Bo": 3, "Cy": 0, "Di": 3})
    for number in range(2):
        (folder / "Cy" / f"{number}.jpg").write_text("no picture")
    (folder / "Di" / "000.png").write_text("no picture")
    split = load(folder, min_images=3)
    assert sorted((path.parent.name, path.name, reason) for path, reason in split.left_out) == [
        ("Cy", "0.jpg", "too-few-images"),
        ("Cy", "1.jpg", "too-few-images"),
        ("Di", "000.png", "not-an-image"),
        ("Di", "001.png", "too-few-images"),
        ("Di", "002.png", "too-few-images"),
    ]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "people") == (
        f"There is no folder {tmp_path / 'people'}; give one with a subfolder of photos per identity."
    )


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "people").write_text("")
    assert refusal(tmp_path / "people").startswith(f"There is no folder {tmp_path / 'people'};")


def test_an_empty_folder_has_no_photos(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} has no photos; it must hold one subfolder of photos per identity."
    )


def test_a_flat_folder_has_no_identity(tmp_path: Path) -> None:
    people(tmp_path, {"Ada": 2})
    assert refusal(tmp_path / "Ada") == (
        f"{tmp_path / 'Ada'} has no identity with a readable photo (2 no-identity); "
        "it must hold one subfolder of photos per identity."
    )


def test_a_folder_of_broken_photos_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    for name in ("Ada", "Bo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_text("no picture")
        (tmp_path / name / "b.jpg").write_text("no picture")
    (tmp_path / "Bo" / "c.jpg").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path} has no identity with a readable photo (4 not-an-image, 1 empty-file); "
        "it must hold one subfolder of photos per identity."
    )


@pytest.mark.parametrize(("photos", "min_images"), [({"Ada": 3}, None), ({"Ada": 5, "Bo": 3}, 4)])
def test_one_identity_is_too_few(tmp_path: Path, photos: dict[str, int], min_images: int | None) -> None:
    assert refusal(people(tmp_path, photos), min_images=min_images) == (
        f"Telling people apart takes two identities at least, and {tmp_path} has 1 with enough photos; "
        "add subfolders, or lower `min_images`."
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    """Thirteen pictures of noise, 16 x 16."""
    folder = people(tmp_path_factory.mktemp("noise"), {"Ada": 6, "Bo": 7})
    samples = tuple(Sample(path, path.parent.name == "Bo") for path in sorted(folder.glob("*/*.png")))
    return Photographs(samples, PhotoReader(Preprocessing(size=16, crop=1.0)))


def augmented(photographs: Photographs, **options: Any) -> AugmentedPhotographs:
    seed = options.pop("seed", 0)
    return AugmentedPhotographs(photographs, Augmentation(**{"displacement": 0.2, **options}), seed=seed)


def test_photographs_are_their_files_pixels_and_labels(photographs: Photographs) -> None:
    for index, sample in enumerate(photographs.samples):
        picture, label = photographs[index]
        assert picture.dtype == torch.uint8
        assert np.array_equal(picture.numpy(), np.asarray(Image.open(sample.path)))
        assert label == sample.label


def test_an_augmented_photo_is_the_photo_mirrored_or_not_and_moved_within_reach(
    photographs: Photographs,
) -> None:
    """Reach is a fifth of 16 pixels, rounded to 3; both mirrorings and both extremes of the reach occur."""
    plain, label = photographs[7]
    ways = {
        displaced(source, down, right).numpy().tobytes(): (mirrored, down, right)
        for mirrored, source in ((False, plain), (True, plain.flip(1)))
        for down in range(-3, 4)
        for right in range(-3, 4)
    }
    dataset = augmented(photographs)
    seen = [dataset[epoch, 7] for epoch in range(150)]
    assert {said for _, said in seen} == {label}
    found = [ways[picture.numpy().tobytes()] for picture, _ in seen]
    assert 0.35 < np.mean([mirrored for mirrored, _, _ in found]) < 0.65
    assert {down for _, down, _ in found} == set(range(-3, 4))
    assert {right for _, _, right in found} == set(range(-3, 4))


def test_without_flip_and_displacement_a_photo_stays_as_it_is(photographs: Photographs) -> None:
    dataset = augmented(photographs, displacement=0.0, flip=False)
    for index in range(len(dataset)):
        assert torch.equal(dataset[3, index][0], photographs[index][0])


def test_augmentation_does_not_depend_on_what_was_read_before(photographs: Photographs) -> None:
    keys = [(epoch, index) for epoch in range(3) for index in range(len(photographs))]
    forwards, backwards = augmented(photographs), augmented(photographs)
    ahead = {key: forwards[key][0] for key in keys}
    back = {key: backwards[key][0] for key in reversed(keys)}
    assert all(torch.equal(ahead[key], back[key]) for key in keys)


def test_each_photo_of_an_epoch_is_augmented_in_its_own_way(photographs: Photographs) -> None:
    """The same file, twenty times in a set, comes out in more than ten versions."""
    copies = Photographs([photographs.samples[0]] * 20, photographs.reader)
    dataset = augmented(copies)
    assert len({dataset[0, index][0].numpy().tobytes() for index in range(20)}) > 10


def test_augmentation_changes_with_the_seed_and_with_the_epoch(photographs: Photographs) -> None:
    def everything(seed: int, epoch: int) -> torch.Tensor:
        dataset = augmented(photographs, seed=seed)
        return torch.stack([dataset[epoch, index][0] for index in range(len(dataset))])

    assert not torch.equal(everything(0, 0), everything(1, 0))
    assert not torch.equal(everything(0, 0), everything(0, 1))


@with_workers
def test_worker_processes_give_the_same_batches_as_none(photographs: Photographs) -> None:
    def batches(workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        order = EpochBatches(len(photographs), batch_size=4, seed=3, epoch=2)
        loader = data.augmented_batches(augmented(photographs), order, workers=workers, pin=False)
        return [(pixels, labels) for pixels, labels in loader]

    alone, together = batches(0), batches(2)
    assert len(alone) == len(together) == 3
    for (pixels, labels), (same_pixels, same_labels) in zip(alone, together, strict=True):
        assert pixels.shape == (4, 16, 16, 3)
        assert torch.equal(pixels, same_pixels)
        assert torch.equal(labels, same_labels)


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_plain_batches_hold_every_photo_once_and_in_order(photographs: Photographs, workers: int) -> None:
    batches = list(data.plain_batches(photographs, batch_size=5, workers=workers, pin=False))
    assert [len(labels) for _, labels in batches] == [5, 5, 3]
    pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(pixels, torch.stack([photographs[index][0] for index in range(13)]))
    assert labels.tolist() == [sample.label for sample in photographs.samples]


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_is_full_batches_of_distinct_photos_and_leaves_out_fewer_than_a_batch(
    length: int, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochBatches(length, batch_size=batch_size, seed=seed, epoch=epoch)
    batches = list(sampler)
    assert len(sampler) == len(batches) >= 1
    assert {len(batch) for batch in batches} == {min(batch_size, length)}
    keys = [key for batch in batches for key in batch]
    assert {epoch_of for epoch_of, _ in keys} == {epoch}
    assert len(set(keys)) == len(keys)
    assert {index for _, index in keys} <= set(range(length))
    assert length - len(keys) < batch_size


@given(length=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 99), at=st.data())
def test_an_epoch_that_starts_later_has_the_rest_of_the_same_batches(
    length: int, batch_size: int, seed: int, at: st.DataObject
) -> None:
    whole = list(EpochBatches(length, batch_size=batch_size, seed=seed, epoch=4))
    start = at.draw(st.integers(0, len(whole)))
    rest = EpochBatches(length, batch_size=batch_size, seed=seed, epoch=4, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == len(whole) - start


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_another_epoch_and_another_seed_shuffle_differently(seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [
            index for batch in EpochBatches(40, batch_size=4, seed=seed, epoch=epoch) for _, index in batch
        ]

    assert order(seed, epoch) != order(0, 0)
    assert sorted(order(seed, epoch)) == sorted(order(0, 0)) == list(range(40))
