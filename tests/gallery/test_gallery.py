"""Gallery: photos go in, the nearest come out, the forgotten are gone, and no reader stands in the way."""

import dataclasses
import errno
import gc
import hashlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

import retrieval.storage.vault
from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import (
    BundleError,
    GalleryBusy,
    GalleryDamaged,
    GalleryError,
    InputError,
    ModelMismatch,
    Reason,
    StorageError,
    UnreadableImage,
)
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.info import GalleryInfo
from retrieval.images import pixels
from retrieval.models.bundle import ModelBundle
from retrieval.models.network import Network
from retrieval.search.nearest import Match, Prediction
from retrieval.system import lock

ROOT = Path(__file__).parent.parent.parent

Photos = list[tuple[Path, str]]
Bare = list[tuple[int, float]]


HINT = "; if this name is right, `relabel` moves them to it"


@pytest.fixture(scope="session")
def photos(faces: Path) -> Photos:
    """Twelve photos of three people, the people taking turns."""
    people = sorted(path.name for path in faces.iterdir())[:3]
    return [(faces / name / f"{name}_{number:04d}.jpg", name) for number in range(1, 5) for name in people]


@pytest.fixture(scope="session")
def other_bundle(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Another training's weights in the same architecture. Its graph is never run here."""
    torch.manual_seed(1)
    tensors = Network(len(bundle.labels), architecture=bundle.architecture).state_dict()
    same = ("architecture", "labels", "preprocessing", "dimension", "recipe", "split", "figures", "versions")
    return ModelBundle.create(
        tmp_path_factory.mktemp("models") / "other",
        tensors={name: tensor.numpy() for name, tensor in tensors.items()},
        graph=bundle.graph_path.read_bytes(),
        created_at="2026-01-01T00:00:00+00:00",
        **{name: getattr(bundle, name) for name in same},
    )


@pytest.fixture
def enrolled(gallery: Gallery, photos: Photos) -> Gallery:
    """The gallery with the twelve photos in it; face n is photo n - 1."""
    gallery.enroll(photos)
    return gallery


def draw(gallery: Gallery, rows: int, seed: int = 0) -> NDArray[np.float32]:
    """Vectors of the gallery's dimension."""
    return np.random.default_rng(seed).standard_normal((rows, gallery.bundle.dimension)).astype(np.float32)


def add(gallery: Gallery, vectors: NDArray[np.float32], identity: str | None = None) -> list[int]:
    """Adds vectors as if photos had given them; returns their ids."""
    faces = [NewFace(identity, None, hashlib.sha256(vector.tobytes()).hexdigest()) for vector in vectors]
    outcomes = gallery.enrollment._writer.add(faces, vectors)
    assert {outcome.status for outcome in outcomes} <= {Status.ENROLLED}
    return [outcome.face_id for outcome in outcomes if outcome.face_id is not None]


def query(folder: Path, statement: str) -> list[Any]:
    connection = sqlite3.connect(folder / "gallery.db")
    rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


def sizes(gallery: Gallery) -> list[int]:
    """Rows of each segment, oldest first."""
    return [rows for (rows,) in query(gallery.folder, "SELECT rows FROM segment ORDER BY id")]


def vector_files(gallery: Gallery) -> list[str]:
    return sorted(path.name for path in (gallery.folder / "vectors").iterdir() if path.name != "gallery.id")


def stored(gallery: Gallery) -> dict[int, NDArray[np.float32]]:
    """The vectors by id, read by FAISS itself from the files that the database names; both must agree."""
    found: dict[int, NDArray[np.float32]] = {}
    segments = query(gallery.folder, "SELECT id, rows, bytes, sha256 FROM segment ORDER BY id")
    for number, rows, size, digest in segments:
        path = gallery.folder / "vectors" / f"{number:08d}.faiss"
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
        index = faiss.read_index(os.fspath(path))
        ids = faiss.vector_to_array(index.id_map).tolist()
        assert len(ids) == rows
        found |= dict(zip(ids, index.index.reconstruct_n(0, rows), strict=True))
    assert sorted(found) == [number for (number,) in query(gallery.folder, "SELECT id FROM face ORDER BY id")]
    assert sum(rows for _, rows, _, _ in segments) == len(found)
    return found


def brute_force(gallery: Gallery, vector: NDArray[Any], k: int) -> Bare:
    distances = [
        (float(np.linalg.norm(other.astype(np.float64) - vector.astype(np.float64))), number)
        for number, other in stored(gallery).items()
    ]
    return [(number, distance) for distance, number in sorted(distances)[:k]]


def bare(matches: Sequence[Match]) -> Bare:
    return [(match.face.id, match.distance) for match in matches]


def about(expected: Bare, *, tolerance: float = 1e-9) -> Bare:
    """The same ids, and distances within `tolerance`, relative and absolute."""
    return [(number, pytest.approx(distance, rel=tolerance, abs=tolerance)) for number, distance in expected]


# Making and opening


def test_a_new_gallery_has_a_database_vectors_and_the_model_and_nobody_in_it(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "down" / "people?x=1 %41.gallery"
    with Gallery.create(folder, bundle) as gallery:
        info = gallery.info()
        assert gallery.bundle == dataclasses.replace(bundle, folder=folder / "model")
    assert {path.name for path in folder.iterdir()} == {"gallery.db", "gallery.sums", "vectors", "model"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert info == GalleryInfo(
        folder=str(folder),
        uuid=info.uuid,
        created_at=info.created_at,
        faces=0,
        identities=0,
        faces_without_identity=0,
        files=0,
        largest=(),
        segments=0,
        vector_bytes=0,
        codes_bytes=0,
        coded_faces=0,
        coordinates=None,
        database_bytes=(folder / "gallery.db").stat().st_size,
        fingerprint=bundle.fingerprint,
        other_fingerprint=None,
        dimension=2048,
        classifier_labels=6,
        input_size=32,
        erasures=0,
    )
    assert len(info.uuid) == 36


def test_an_empty_folder_becomes_a_gallery(bundle: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    Gallery.create(str(tmp_path / "people"), bundle).close()
    Gallery.open(str(tmp_path / "people")).close()


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()


@pytest.mark.parametrize("make", [a_file, a_full_folder])
def test_what_is_there_already_is_not_touched(
    make: Callable[[Path], None], bundle: ModelBundle, tmp_path: Path
) -> None:
    target = tmp_path / "people"
    make(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(GalleryError) as caught:
        Gallery.create(target, bundle)
    assert str(caught.value) == f"{target} exists already and is not empty; choose another folder."
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gallery_is_not_made_over_another_one(enrolled: Gallery, bundle: ModelBundle) -> None:
    before = stored(enrolled)
    with pytest.raises(GalleryError, match="exists already"):
        Gallery.create(enrolled.folder, bundle)
    assert stored(enrolled).keys() == before.keys()


def test_a_damaged_model_makes_no_gallery_and_leaves_nothing(bundle: ModelBundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "model")
    with open(tmp_path / "model" / "model.onnx", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\0\xff\0")
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that bundle\.json names"):
        Gallery.create(tmp_path / "people", ModelBundle.load(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_refuses_makes_no_gallery_and_leaves_nothing(
    call: str, bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="no space left on device"):
        Gallery.create(tmp_path / "people", bundle)
    assert list(tmp_path.iterdir()) == []


def test_of_several_who_make_the_same_gallery_one_succeeds_and_the_others_are_told(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    ends: list[str] = []

    def make() -> None:
        try:
            Gallery.create(tmp_path / "people", bundle).close()
            ends.append("made")
        except GalleryError:
            ends.append("taken")

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["made", "taken", "taken", "taken"]
    assert [path.name for path in tmp_path.iterdir()] == ["people"]
    Gallery.open(tmp_path / "people").close()


def test_a_folder_that_is_missing_or_is_no_gallery_says_so(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match=r"There is no gallery .*none; make one with `faceprint ingest`\."):
        Gallery.open(tmp_path / "none")
    with pytest.raises(GalleryError, match=r"is not a gallery: it has no gallery\.db\."):
        Gallery.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_gallery_may_be_closed_moved_and_opened_again(enrolled: Gallery, photos: Photos) -> None:
    before = enrolled.search(photos[5][0], 12)
    enrolled.close()
    moved = enrolled.folder.rename(enrolled.folder.with_name("mövéd"))
    with Gallery.open(moved) as reopened:
        assert reopened.search(photos[5][0], 12) == before


def test_a_gallery_with_another_model_in_it_is_refused_when_it_is_opened(
    enrolled: Gallery, other_bundle: ModelBundle
) -> None:
    enrolled.close()
    shutil.rmtree(enrolled.folder / "model")
    shutil.copytree(other_bundle.folder, enrolled.folder / "model")
    with pytest.raises(ModelMismatch) as caught:
        Gallery.open(enrolled.folder)
    model = enrolled.folder / "model"
    assert str(caught.value) == (
        f"{model} is not the model that the gallery was made with; put that one back."
    )


def test_a_gallery_without_its_model_is_refused_when_it_is_opened(gallery: Gallery) -> None:
    shutil.rmtree(gallery.folder / "model")
    with pytest.raises(BundleError, match="There is no model folder"):
        Gallery.open(gallery.folder)


def test_only_the_gallerys_own_model_is_accepted(
    gallery: Gallery, bundle: ModelBundle, other_bundle: ModelBundle
) -> None:
    """A copy of it is the same model; another one is named by its fingerprint."""
    gallery.require(bundle)
    with pytest.raises(ModelMismatch) as caught:
        gallery.require(other_bundle)
    assert str(caught.value) == (
        f"The gallery {gallery.folder} was made with another model (fingerprint {bundle.fingerprint[:12]}, "
        f"not {other_bundle.fingerprint[:12]}); leave `model` out, or enroll into a new gallery."
    )


def test_the_gallerys_model_is_a_faithful_copy(gallery: Gallery, bundle: ModelBundle) -> None:
    copied, original = load_file(gallery.bundle.weights_path), load_file(bundle.weights_path)
    assert copied.keys() == original.keys()
    assert all(np.array_equal(copied[name], original[name]) for name in original)


# Enrolling


def test_enrolled_photos_have_consecutive_ids_and_their_absolute_path_and_identity(
    gallery: Gallery, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos[0][0].parent.parent)
    relative = [(path.relative_to(Path.cwd()), name) for path, name in photos]
    assert gallery.enroll(relative) == [
        Outcome(str(path), name, Status.ENROLLED, number)
        for number, (path, name) in enumerate(photos, start=1)
    ]
    rows = query(
        gallery.folder,
        "SELECT f.id, name, path, sha256 FROM face f JOIN identity i ON identity_id = i.id "
        "JOIN photo p ON p.id = f.photo_id LEFT JOIN file ON file.photo_id = p.id ORDER BY f.id",
    )
    assert rows == [
        (number, name, str(path), hashlib.sha256(path.read_bytes()).hexdigest())
        for number, (path, name) in enumerate(photos, start=1)
    ]
    assert len(stored(gallery)) == 12


def test_more_photos_than_a_batch_keep_their_order(gallery: Gallery, faces: Path) -> None:
    paths = sorted(faces.glob("*/*.jpg"))
    outcomes = gallery.enroll((path, path.parent.name) for path in paths)
    assert [(outcome.path, outcome.face_id) for outcome in outcomes] == [
        (str(path), number) for number, path in enumerate(paths, start=1)
    ]
    info = gallery.info()
    assert (info.faces, info.identities, info.faces_without_identity) == (36, 6, 0)
    assert info.largest == tuple((name, 6) for name in sorted(path.name for path in faces.iterdir()))
    assert info.vector_bytes == sum(
        path.stat().st_size for path in (gallery.folder / "vectors").glob("*.faiss")
    )
    assert (info.segments, info.database_bytes) == (2, (gallery.folder / "gallery.db").stat().st_size)


def test_batches_before_a_failure_are_enrolled(gallery: Gallery, faces: Path) -> None:
    paths = sorted(faces.glob("*/*.jpg"))

    def some() -> Iterator[tuple[Path, None]]:
        yield from ((path, None) for path in paths[:33])
        raise RuntimeError("the camera fell into the water")

    with pytest.raises(RuntimeError):
        gallery.enroll(some())
    assert gallery.info().faces_without_identity == gallery.info().faces == 32


def test_no_photos_give_no_outcomes_and_write_nothing(gallery: Gallery) -> None:
    assert gallery.enroll([]) == []
    assert vector_files(gallery) == []


@pytest.fixture
def known(gallery: Gallery, photos: Photos) -> tuple[Gallery, Path]:
    """A gallery that has one photo, of Kim."""
    path = photos[0][0]
    gallery.enroll([(path, "Kim")])
    return gallery, path


def test_the_same_file_again_is_known(known: tuple[Gallery, Path]) -> None:
    gallery, path = known
    assert gallery.enroll([(path, "Kim"), (str(path), None)]) == [
        Outcome(str(path), "Kim", Status.KNOWN, 1),
        Outcome(str(path), None, Status.KNOWN, 1),
    ]
    assert len(stored(gallery)) == 1


def test_the_same_bytes_under_another_path_are_a_duplicate(
    known: tuple[Gallery, Path], tmp_path: Path
) -> None:
    gallery, path = known
    copy = shutil.copy(path, tmp_path / "copy.png")
    detail = f"the same bytes as {path}"
    assert gallery.enroll([(copy, "Kim"), (path.read_bytes(), None)]) == [
        Outcome(str(copy), "Kim", Status.DUPLICATE, 1, detail=detail),
        Outcome(None, None, Status.DUPLICATE, 1, detail=detail),
    ]
    assert len(stored(gallery)) == 1


def test_the_same_bytes_under_another_name_are_a_conflict_that_names_the_other(
    known: tuple[Gallery, Path],
) -> None:
    gallery, path = known
    detail = f"the same bytes are enrolled as Kim from {path}{HINT}"
    assert gallery.enroll([(path, "Adi")]) == [
        Outcome(str(path), "Adi", Status.REJECTED, 1, Reason.IDENTITY_CONFLICT, detail)
    ]
    assert len(stored(gallery)) == 1


def test_a_name_for_a_photo_that_nobody_named_is_taken(gallery: Gallery, photos: Photos) -> None:
    """Afterwards the photo is that person's, and another name for it is a conflict."""
    content = photos[0][0].read_bytes()
    first, second, third = (gallery.enroll([(content, name)])[0] for name in (None, "Kim", "Adi"))
    assert first == Outcome(None, None, Status.ENROLLED, 1)
    detail = "the same bytes as face 1, which had no identity until now; it is Kim's"
    assert second == Outcome(None, "Kim", Status.DUPLICATE, 1, detail=detail)
    detail = f"the same bytes are enrolled as Kim{HINT}"
    assert third == Outcome(None, "Adi", Status.REJECTED, 1, Reason.IDENTITY_CONFLICT, detail)
    assert gallery.info().largest == (("Kim", 1),)
    assert len(stored(gallery)) == 1


def test_a_file_with_the_bytes_of_a_photo_without_a_file_is_a_duplicate_of_that_face(
    gallery: Gallery, photos: Photos
) -> None:
    path = photos[0][0]
    gallery.enroll([(path.read_bytes(), "Kim")])
    assert gallery.enroll([(path, "Kim")]) == [
        Outcome(str(path), "Kim", Status.DUPLICATE, 1, detail="the same bytes as face 1")
    ]


def test_the_same_bytes_twice_in_a_batch_are_one_face(
    gallery: Gallery, photos: Photos, tmp_path: Path
) -> None:
    """The first of them; what becomes of the others is the same as in two batches."""
    (path, _), (other, _) = photos[:2]
    copy = shutil.copy(path, tmp_path / "copy.jpg")
    batch = [(path, "Kim"), (copy, "Kim"), (other, "Kim"), (path, "Kim"), (copy, "Adi")]
    assert gallery.enroll(batch) == [
        Outcome(str(path), "Kim", Status.ENROLLED, 1),
        Outcome(str(copy), "Kim", Status.DUPLICATE, 1, detail=f"the same bytes as {path}"),
        Outcome(str(other), "Kim", Status.ENROLLED, 2),
        Outcome(str(path), "Kim", Status.KNOWN, 1),
        Outcome(
            str(copy),
            "Adi",
            Status.REJECTED,
            1,
            Reason.IDENTITY_CONFLICT,
            f"the same bytes are enrolled as Kim from {path}{HINT}",
        ),
    ]
    assert sorted(stored(gallery)) == [1, 2]


def test_a_bad_photo_among_good_ones_is_an_outcome_and_not_an_error(
    gallery: Gallery, photos: Photos, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "empty.jpg").touch()
    whole = photos[2][0].read_bytes()
    outcomes = gallery.enroll(
        [
            photos[0],
            (tmp_path / "text.jpg", "Kim"),
            (tmp_path / "empty.jpg", "Kim"),
            (tmp_path / "missing.jpg", "Kim"),
            (tmp_path, "Kim"),
            (whole[: len(whole) // 2], "Kim"),
            photos[1],
        ]
    )
    assert [(outcome.status, outcome.reason, outcome.face_id) for outcome in outcomes] == [
        (Status.ENROLLED, None, 1),
        (Status.REJECTED, Reason.NOT_AN_IMAGE, None),
        (Status.REJECTED, Reason.EMPTY_FILE, None),
        (Status.REJECTED, Reason.MISSING, None),
        (Status.REJECTED, Reason.NOT_A_FILE, None),
        (Status.REJECTED, Reason.TRUNCATED, None),
        (Status.ENROLLED, None, 2),
    ]
    assert all(outcome.detail for outcome in outcomes if outcome.status is Status.REJECTED)
    assert sorted(stored(gallery)) == [1, 2]


def test_a_path_that_is_not_utf8_is_an_outcome_that_can_be_printed(
    gallery: Gallery, photos: Photos, tmp_path: Path
) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg")
    shutil.copy(photos[0][0], path)
    detail = "its name is not UTF-8; rename it"
    assert gallery.enroll([(path, "Kim"), photos[1]]) == [
        Outcome(
            f"{tmp_path}/\\xff\\xfe.jpg",
            "Kim",
            Status.REJECTED,
            reason=Reason.NAME_NOT_UTF8,
            detail=detail,
        ),
        Outcome(str(photos[1][0]), photos[1][1], Status.ENROLLED, 1),
    ]


def test_an_identity_that_is_no_text_is_refused(gallery: Gallery, photos: Photos) -> None:
    with pytest.raises(InputError, match=r"^The identity 'Kim\\udcff' cannot be stored"):
        gallery.enroll([(photos[0][0], "Kim\udcff")])
    assert stored(gallery) == {}


def test_a_disk_that_refuses_enrolls_nothing_and_the_next_attempt_succeeds(
    enrolled: Gallery, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, files, photo = stored(enrolled), vector_files(enrolled), sorted(faces.glob("*/*.jpg"))[-1]

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="no space left on device"):
            enrolled.enroll([(photo, "Kim")])
    assert (stored(enrolled).keys(), vector_files(enrolled)) == (before.keys(), files)
    assert enrolled.enroll([(photo, "Kim")]) == [Outcome(str(photo), "Kim", Status.ENROLLED, 13)]
    assert sorted(stored(enrolled)) == list(range(1, 14))


# Searching


def test_an_enrolled_photo_finds_itself_first_at_no_distance(enrolled: Gallery, photos: Photos) -> None:
    for number, (path, name) in enumerate(photos, start=1):
        first, second = enrolled.search(path, 2).matches
        assert (first.face.id, first.face.path, first.face.identity) == (number, str(path), name)
        assert first.distance < 1e-4 < 1e-1 < second.distance


def test_every_kind_of_picture_gives_the_same_answer(enrolled: Gallery, photos: Photos) -> None:
    path = photos[4][0]
    expected = enrolled.search(path)
    assert len(expected.matches) == 5
    with Image.open(path) as image:
        image.load()
        kinds = [str(path), path.read_bytes(), image, np.asarray(image)]
        assert [enrolled.search(kind) for kind in kinds] == [expected] * 4


def test_three_doors_lead_to_the_same_room(enrolled: Gallery, photos: Photos) -> None:
    """By picture, by many pictures, by vector and by face; a batch may round otherwise than a single one."""
    paths = [path for path, _ in photos]
    vectors, single = stored(enrolled), [enrolled.search(path, 6) for path in paths]
    many = enrolled.search_many(paths, 6)
    assert [result.prediction.identity for result in many] == [r.prediction.identity for r in single]
    for number, alone, together in zip(vectors, single, many, strict=True):
        expected = brute_force(enrolled, vectors[number], 6)
        assert bare(enrolled.search_by_vector(vectors[number], 6)) == about(expected)
        assert bare(enrolled.search_by_face(number, 5)) == about(expected[1:])
        assert bare(alone.matches) == about(expected, tolerance=1e-4)
        assert bare(together.matches) == about(expected, tolerance=1e-4)


def test_a_prediction_is_the_models_most_probable_label(enrolled: Gallery, photos: Photos) -> None:
    square = pixels.read(photos[0][0], size=32)
    probabilities = enrolled.embedder.embed(square[None]).probabilities[0]
    best = int(probabilities.argmax())
    assert enrolled.search(photos[0][0]).prediction == Prediction(
        enrolled.bundle.labels[best], float(probabilities[best])
    )


def test_an_empty_gallery_gives_no_matches_but_a_prediction(gallery: Gallery, photos: Photos) -> None:
    result = gallery.search(photos[0][0])
    assert result.matches == gallery.search_by_vector(draw(gallery, 1)[0]) == ()
    assert result.prediction.identity in gallery.bundle.labels
    assert 1 / 6 < result.prediction.probability <= 1


@pytest.mark.parametrize("k", [12, 13, 1000])
def test_a_gallery_that_has_fewer_gives_them_all(k: int, enrolled: Gallery, photos: Photos) -> None:
    matches = enrolled.search(photos[0][0], k).matches
    assert sorted(match.face.id for match in matches) == list(range(1, 13))
    assert [match.distance for match in matches] == sorted(match.distance for match in matches)
    assert len(enrolled.search_by_face(3, k)) == 11


@pytest.mark.parametrize("k", [0, -1])
def test_no_door_gives_fewer_than_one_neighbour(k: int, enrolled: Gallery, photos: Photos) -> None:
    path = photos[0][0]
    doors: list[Callable[[], object]] = [
        lambda: enrolled.search(path, k),
        lambda: enrolled.search_many([path], k),
        lambda: enrolled.search_by_vector(draw(enrolled, 1)[0], k),
        lambda: enrolled.search_by_face(1, k),
    ]
    for door in doors:
        with pytest.raises(InputError, match=rf"must be at least 1, not {k}\."):
            door()


def test_no_pictures_give_no_results(enrolled: Gallery) -> None:
    assert enrolled.search_many(iter([])) == []


def test_a_picture_that_cannot_be_read_is_not_searched_for(enrolled: Gallery, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture at all")
    with pytest.raises(UnreadableImage) as caught:
        enrolled.search(tmp_path / "text.jpg")
    assert caught.value.reason is Reason.NOT_AN_IMAGE
    assert str(tmp_path / "text.jpg") in str(caught.value)


@pytest.mark.parametrize(
    "vector", [np.zeros(2047), np.zeros((1, 2048)), np.full(2048, np.nan), np.float64(1)]
)
def test_a_vector_that_is_none_of_the_gallerys_is_refused(vector: NDArray[Any], enrolled: Gallery) -> None:
    with pytest.raises(InputError, match=r"^Vectors must"):
        enrolled.search_by_vector(vector)


@pytest.mark.parametrize("number", [0, 13, -1, 2**70])
def test_a_face_that_does_not_exist_has_no_neighbours(number: int, enrolled: Gallery) -> None:
    with pytest.raises(InputError) as caught:
        enrolled.search_by_face(number)
    assert str(caught.value) == f"There is no face {number} in {enrolled.folder}."


def test_a_face_is_left_out_of_its_own_neighbours_even_among_its_equals(gallery: Gallery) -> None:
    vectors = np.repeat(draw(gallery, 1), 6, axis=0)
    gallery.enrollment._writer.add([NewFace(None, None, str(number)) for number in range(6)], vectors)
    assert [bare(gallery.search_by_face(number, 2)) for number in (1, 2, 6)] == [
        [(2, 0.0), (3, 0.0)],
        [(1, 0.0), (3, 0.0)],
        [(1, 0.0), (2, 0.0)],
    ]


def test_search_is_a_brute_force_over_all_segments(gallery: Gallery) -> None:
    for seed, rows in enumerate((40, 13, 5, 1)):
        add(gallery, draw(gallery, rows, seed))
    assert sizes(gallery) == [40, 13, 5, 1]
    for vector in draw(gallery, 3, seed=9):
        for k in (1, 7, 59):
            assert bare(gallery.search_by_vector(vector, k)) == about(brute_force(gallery, vector, k))


# Segments


def test_photos_added_one_at_a_time_leave_few_files(gallery: Gallery) -> None:
    """As the digits of a binary counter: each segment is at least twice the next."""
    vectors = draw(gallery, 40)
    for number, vector in enumerate(vectors, start=1):
        assert add(gallery, vector[None]) == [number]
        assert sizes(gallery) == [2**bit for bit in reversed(range(number.bit_length())) if number >> bit & 1]
    assert len(vector_files(gallery)) == len(sizes(gallery))
    found = stored(gallery)
    assert all(np.array_equal(found[number], vector) for number, vector in enumerate(vectors, start=1))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_batches_of_any_sizes_leave_few_files(seed: int | None, gallery: Gallery) -> None:
    """Also batches that become smaller and smaller, each of which could stay beside the one before."""
    batches = range(12, 0, -1) if seed is None else np.random.default_rng(seed).integers(1, 20, 15).tolist()
    for number, rows in enumerate(batches):
        add(gallery, draw(gallery, rows, number))
        found = sizes(gallery)
        assert all(large >= 2 * small for large, small in pairwise(found))
        assert len(found) <= math.log2(sum(found)) + 1
    assert len(stored(gallery)) == sum(batches)


def test_segments_stop_growing_at_the_ceiling(gallery: Gallery) -> None:
    gallery.vault.vectors(gallery._model.current()).ceiling = 8
    for number, vector in enumerate(draw(gallery, 50), start=1):
        add(gallery, vector[None])
        assert max(sizes(gallery)) <= 8
        assert len(sizes(gallery)) <= number / 8 + math.log2(8)
    assert sorted(stored(gallery)) == list(range(1, 51))


def test_files_that_no_segment_names_are_removed_by_the_next_write_and_nothing_else(
    enrolled: Gallery,
) -> None:
    strangers = ["1.faiss", "index.faiss", "notes.txt", "x00000002.faiss"]
    (name,) = vector_files(enrolled)
    for orphan in ("00000099.faiss", "00000098.part", "00000002.faiss"):
        shutil.copy(enrolled.folder / "vectors" / name, enrolled.folder / "vectors" / orphan)
    for stranger in strangers:
        (enrolled.folder / "vectors" / stranger).touch()
    assert len(vector_files(enrolled)) == 8
    add(enrolled, draw(enrolled, 1))
    assert vector_files(enrolled) == [name, "00000002.faiss", *strangers]
    assert sorted(stored(enrolled)) == list(range(1, 14))


def test_a_missing_vector_file_is_damage_that_names_the_file(enrolled: Gallery, photos: Photos) -> None:
    (name,) = vector_files(enrolled)
    enrolled.close()
    (enrolled.folder / "vectors" / name).unlink()
    with Gallery.open(enrolled.folder) as reopened, pytest.raises(GalleryDamaged, match=name):
        reopened.search(photos[0][0])


def test_a_vector_without_a_face_is_damage(enrolled: Gallery, photos: Photos) -> None:
    connection = sqlite3.connect(enrolled.folder / "gallery.db")
    connection.execute("DELETE FROM face WHERE id = 7")
    connection.commit()
    connection.close()
    with pytest.raises(GalleryDamaged, match="has a vector 7 without a face"):
        enrolled.search(photos[0][0], 12)


# Forgetting


def outside_the_model(folder: Path) -> bytes:
    """Every byte of a gallery, its model left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "model"]
    assert {path.name for path in files} >= {"gallery.db", "writer.lock"}
    return b"\0".join(path.read_bytes() for path in files)


def test_the_forgotten_are_not_found_and_everybody_else_is_as_before(
    enrolled: Gallery, photos: Photos
) -> None:
    name, others = photos[0][1], [path for path, name in photos if name != photos[0][1]]
    before = enrolled.search(others[0], 12).matches
    assert enrolled.forget(name).faces == 4
    after = enrolled.search(others[0], 12).matches
    assert after == tuple(match for match in before if match.face.identity != name)
    assert len(after) == 8
    assert sorted(stored(enrolled)) == [2, 3, 5, 6, 8, 9, 11, 12]
    assert [identity for identity, _ in enrolled.info().largest] == sorted({p[1] for p in photos} - {name})
    assert enrolled.search(photos[0][0], 1).matches[0].distance > 1e-1


def test_no_byte_of_the_forgotten_remains_in_any_file(gallery: Gallery, tmp_path: Path) -> None:
    """Their faces lie in several segments, among others; not even a part of a vector is left."""
    first, second = draw(gallery, 6, seed=1), draw(gallery, 2, seed=2)
    add(gallery, first[:4], "Zephyr Kant")
    add(gallery, first[4:5], "Kim")
    add(gallery, second[:1], "Zephyr Kant")
    faces = [NewFace("Zephyr Kant", "/private/zephyr.jpg", "d" * 64)]
    gallery.enrollment._writer.add(faces, second[1:])
    gone = [first[0], first[3], second[0], second[1]]
    needles = [b"Zephyr Kant", b"/private/zephyr.jpg", b"d" * 64, *(vector[:8].tobytes() for vector in gone)]
    before = outside_the_model(gallery.folder)
    assert [needle in before for needle in needles] == [True] * len(needles)
    gallery.search_by_vector(first[0])
    assert gallery.forget("Zephyr Kant").faces == 6
    after = outside_the_model(gallery.folder)
    assert [needle in after for needle in needles] == [False] * len(needles)
    assert first[4][:8].tobytes() in after
    assert bare(gallery.search_by_vector(first[4], 9)) == [(5, 0.0)]


def test_forgetting_everybody_leaves_an_empty_gallery_that_can_be_used(gallery: Gallery) -> None:
    add(gallery, draw(gallery, 5), "Kim")
    assert gallery.forget("Kim").faces == 5
    assert (stored(gallery), vector_files(gallery), gallery.info().identities) == ({}, [], 0)
    assert gallery.search_by_vector(draw(gallery, 1)[0]) == ()
    assert add(gallery, draw(gallery, 1, seed=1), "Kim") == [6]


def test_the_forgotten_may_be_enrolled_again_under_new_ids(enrolled: Gallery, photos: Photos) -> None:
    path, name = photos[-1]
    assert enrolled.forget(name).faces == 4
    assert enrolled.enroll([(path, name)]) == [Outcome(str(path), name, Status.ENROLLED, 13)]


@pytest.mark.parametrize("name", ["Nobody", "", "kim", "Kim ", "%", "K_m"])
def test_nobody_is_forgotten_under_a_name_that_does_not_exist(name: str, gallery: Gallery) -> None:
    add(gallery, draw(gallery, 3), "Kim")
    files = vector_files(gallery)
    with pytest.raises(InputError) as caught:
        gallery.forget(name)
    nearest = "; the nearest name is Kim" if name in ("kim", "Kim ", "K_m") else ""
    assert str(caught.value) == f"There is no identity {name} in {gallery.folder}{nearest}."
    assert (sorted(stored(gallery)), vector_files(gallery)) == ([1, 2, 3], files)


def test_only_segments_that_hold_the_forgotten_are_rewritten(gallery: Gallery) -> None:
    add(gallery, draw(gallery, 8, seed=1), "Kim")
    add(gallery, draw(gallery, 2, seed=2), "Adi")
    add(gallery, draw(gallery, 1, seed=3), "Kim")
    assert vector_files(gallery) == ["00000001.faiss", "00000002.faiss", "00000003.faiss"]
    gallery.forget("Adi")
    assert vector_files(gallery) == ["00000001.faiss", "00000003.faiss"]


# Many at once


def test_a_reader_that_was_open_before_a_merge_still_answers(gallery: Gallery) -> None:
    """A second Gallery in the same process; it sees each write as soon as it is done."""
    vectors = draw(gallery, 24)
    with Gallery.open(gallery.folder) as reader:
        for number, vector in enumerate(vectors, start=1):
            add(gallery, vector[None])
            assert bare(reader.search_by_vector(vector, 1)) == [(number, 0.0)]
        expected = brute_force(gallery, vectors[0], 24)
        assert bare(reader.search_by_vector(vectors[0], 24)) == about(expected)
        assert reader.search_by_face(1, 23) == gallery.search_by_face(1, 23)


READER = """
import json, sys
import numpy as np
from retrieval.gallery.gallery import Gallery
with Gallery.open(sys.argv[1]) as gallery:
    vector = np.load(sys.argv[2])
    for line in sys.stdin:
        found = gallery.search_by_vector(vector, 100)
        print(json.dumps([(match.face.id, match.distance) for match in found]), flush=True)
"""

WRITER = """
import sys
from pathlib import Path
from retrieval.system import lock
with lock.exclusive(Path(sys.argv[1]), timeout=0):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts programs that are told by a line, and answer with a line; ends them afterwards."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", program, *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ask(process: "subprocess.Popen[str]") -> Bare:
    stdin: IO[str] | None = process.stdin
    stdout: IO[str] | None = process.stdout
    assert stdin is not None
    assert stdout is not None
    stdin.write("\n")
    stdin.flush()
    return [tuple(pair) for pair in json.loads(stdout.readline())]


def test_a_reader_in_another_process_answers_while_segments_merge(
    gallery: Gallery, tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    vectors = draw(gallery, 12)
    np.save(tmp_path / "query.npy", vectors[0])
    add(gallery, vectors[:3])
    process = start(READER, gallery.folder, tmp_path / "query.npy")
    assert ask(process) == about(brute_force(gallery, vectors[0], 100))
    for vector in vectors[3:]:
        add(gallery, vector[None])
        assert ask(process) == about(brute_force(gallery, vectors[0], 100))
    assert len(ask(process)) == 12


def test_a_second_writer_is_told_who_is_writing_and_readers_do_not_notice(
    enrolled: Gallery,
    photos: Photos,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[..., "subprocess.Popen[str]"],
) -> None:
    monkeypatch.setattr(retrieval.storage.vault, "LOCK_TIMEOUT", 0.05)
    process = start(WRITER, enrolled.folder / "writer.lock")
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    for write in (lambda: add(enrolled, draw(enrolled, 1)), lambda: enrolled.forget(photos[0][1])):
        with pytest.raises(GalleryBusy) as caught:
            write()
        assert str(caught.value).startswith(f"Process {process.pid} is writing to {enrolled.folder} and")
    assert enrolled.search(photos[0][0], 1).matches[0].face.id == 1
    assert sorted(stored(enrolled)) == list(range(1, 13))
    process.kill()
    process.wait()
    assert add(enrolled, draw(enrolled, 1)) == [13]


def test_garbage_is_collected_while_a_thread_waits_for_another_writer(
    enrolled: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval.storage.vault, "LOCK_TIMEOUT", 0.5)
    refused: list[GalleryBusy] = []

    def enroll() -> None:
        try:
            add(enrolled, vectors)
        except GalleryBusy as error:
            refused.append(error)

    vectors = draw(enrolled, 1)
    thread = threading.Thread(target=enroll)
    with lock.exclusive(enrolled.folder / "writer.lock", timeout=0):
        thread.start()
        seen = {gc.isenabled()}
        while thread.is_alive():
            seen.add(gc.isenabled())
    thread.join()
    assert (seen, len(refused)) == ({True}, 1)


def test_threads_share_one_gallery(gallery: Gallery, faces: Path) -> None:
    """Two enroll photos, one adds and forgets, three search in three ways; nobody fails, nothing is lost."""
    paths = sorted(faces.glob("*/*.jpg"))[:18]
    vectors = draw(gallery, 8)
    (first,) = add(gallery, vectors[:1], "First")
    errors: list[BaseException] = []
    done = threading.Event()

    def enroll(mine: Sequence[Path]) -> None:
        for path in mine:
            (outcome,) = gallery.enroll([(path, path.parent.name)])
            assert outcome.status is Status.ENROLLED

    def come_and_go() -> None:
        for vector in vectors[1:8]:
            add(gallery, vector[None], "Fleeting")
            gallery.forget("Fleeting")

    def search() -> None:
        while not done.is_set():
            assert bare(gallery.search_by_vector(vectors[0], 1)) == [(first, 0.0)]
            gallery.search(paths[0], 3)
            assert first not in dict(bare(gallery.search_by_face(first, 3)))

    def run(work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)
            done.set()

    writers = [
        threading.Thread(target=run, args=(enroll, paths[::2])),
        threading.Thread(target=run, args=(enroll, paths[1::2])),
        threading.Thread(target=run, args=(come_and_go,)),
    ]
    readers = [threading.Thread(target=run, args=(search,)) for _ in range(3)]
    for thread in [*writers, *readers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert errors == []
    assert len(stored(gallery)) == 19
    assert gallery.info().identities == 4
    assert len(vector_files(gallery)) == len(sizes(gallery))
