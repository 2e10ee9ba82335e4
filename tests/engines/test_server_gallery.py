"""A gallery in PostgreSQL and Milvus: the answers of one in a folder, and of a brute force in float64."""

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.database.filters import Where
from retrieval.database.records import NewFace
from retrieval.errors import (
    FaceprintError,
    GalleryDamaged,
    GalleryError,
    InputError,
    NotFound,
    ServerUnavailable,
)
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble
from retrieval.index.knn import Explanation
from retrieval.index.milvus import MilvusVectors
from retrieval.models.bundle import FORGOTTEN, ModelBundle
from retrieval.quality.audit import audit
from tests.engines.postgresql_server import PostgresqlServer
from tests.operations import DIMENSION, add, face, photo, vector_of

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FACES = 400


def faces_and_vectors() -> tuple[list[NewFace], NDArray[np.float32]]:
    """Faces of 40 people, some without a name; some vectors are equal, so that ids decide."""
    rng = np.random.default_rng(7)
    people = rng.integers(0, 40, FACES)
    centres = rng.normal(size=(40, DIMENSION))
    vectors = (centres[people] + 0.3 * rng.normal(size=(FACES, DIMENSION))).astype(np.float32)
    vectors[300:] = vectors[rng.integers(0, 300, 100)]
    faces = [
        NewFace(
            None if number % 17 == 0 else f"person {person}",
            f"/photos/{number}.jpg",
            hashlib.sha256(str(number).encode()).hexdigest(),
            metadata={"camera": int(number % 3)},
        )
        for number, person in enumerate(people)
    ]
    return faces, vectors


@pytest.fixture(scope="module")
def both(
    milvus: str,
    postgresql_server: PostgresqlServer,
    bundle: ModelBundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Gallery, Gallery]]:
    """The same faces in a folder and in databases."""
    faces, vectors = faces_and_vectors()
    postgresql_server.execute("CREATE SCHEMA both_ways")
    address, collection = postgresql_server.address(schema="both_ways"), f"{milvus}/both_ways"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("folder") / "gallery"
        with (
            Gallery.create(folder, bundle) as one,
            Gallery.create(address, bundle, vectors=collection) as other,
        ):
            for gallery in (one, other):
                for part in (slice(0, 250), slice(250, FACES)):
                    gallery.enroll_vectors(faces[part], vectors[part])
                gallery.forget("person 3")
                gallery.calibrate(0.05)
            yield one, other
    with closing(MilvusVectors.open(collection, DIMENSION)) as opened:
        opened.drop()


def queries() -> NDArray[np.float32]:
    _, vectors = faces_and_vectors()
    rng = np.random.default_rng(1)
    between = (vectors[:3] + vectors[50:53]) / 2
    return np.concatenate([vectors[[0, 310, 20]], between, rng.normal(size=(2, DIMENSION))]).astype(
        np.float32
    )


def as_data(found: Any) -> Any:
    """An answer without what the clock says."""
    if isinstance(found, tuple) and hasattr(found, "decision"):
        return [as_data(one) for one in found], found.decision
    if hasattr(found, "matches"):
        return found.identity, found.distance, [as_data(one) for one in found.matches]
    return found.face.id, found.face.identity, found.face.paths, found.distance


SEARCHES: list[Callable[[Gallery], Any]] = [
    lambda gallery: gallery.search_by_vectors(queries(), 5),
    lambda gallery: gallery.search_by_vectors(queries(), 2 * FACES),
    lambda gallery: gallery.search_by_vectors(queries()[:2], None, within=2.0),
    lambda gallery: gallery.search_by_vectors(queries(), 3, max_distance=0.5),
    lambda gallery: gallery.search_by_vectors(
        queries(), 7, where=Where.parse(["camera=1"]).among(["person 5", "person 6"])
    ),
    lambda gallery: gallery.search_people_by_vectors(queries(), 4),
    lambda gallery: gallery.search_people_by_vectors(queries()[:2], 4, rule="mean", mean_of=4),
    lambda gallery: gallery.search_people_by_vectors(queries(), 4, rule="centroid"),
    lambda gallery: [gallery.search_by_face(11, 6)],
    lambda gallery: [gallery.search_people_by_face(11, 6)],
]


@pytest.mark.parametrize("number", range(len(SEARCHES)))
def test_each_search_has_the_answers_of_a_folder(number: int, both: tuple[Gallery, Gallery]) -> None:
    one, other = both
    expected = [as_data(found) for found in SEARCHES[number](one)]
    assert [as_data(found) for found in SEARCHES[number](other)] == expected


def test_the_nearest_are_those_of_a_brute_force_in_float64(both: tuple[Gallery, Gallery]) -> None:
    faces, vectors = faces_and_vectors()
    stays = np.array([one.identity != "person 3" for one in faces])
    ids = 1 + np.flatnonzero(stays)
    for query, found in zip(queries(), both[1].search_by_vectors(queries(), 40), strict=True):
        distances = np.sqrt(((vectors[stays].astype(np.float64) - query.astype(np.float64)) ** 2).sum(1))
        order = np.lexsort((ids, distances))[:40]
        assert [match.face.id for match in found] == ids[order].tolist()
        np.testing.assert_allclose([match.distance for match in found], distances[order], rtol=1e-12)


def test_calibration_and_audit_find_what_they_find_in_a_folder(both: tuple[Gallery, Gallery]) -> None:
    one, other = both
    expected, found = one.calibration(), other.calibration()
    assert expected is not None
    assert found is not None
    assert found.points == expected.points
    doubts = [audit(gallery).doubts for gallery in (one, other)]
    told = [[(d.kind, d.score, [[f.id for f in g] for g in d.groups]) for d in some] for some in doubts]
    assert told[0] == told[1]
    assert told[0]


def test_a_search_says_what_it_took(both: tuple[Gallery, Gallery]) -> None:
    explanation = Explanation()
    both[1].search_by_vectors(queries(), 3, explanation=explanation)
    info = both[1].info()
    assert (explanation.rows, explanation.queries) == (info.faces, len(queries()))
    assert explanation.method == "scan"
    assert "Milvus" in explanation.seconds


def test_images_are_searched_for_with_the_model_from_the_database(both: tuple[Gallery, Gallery]) -> None:
    one, other = both
    expected, found = one.search(photo(3), 4), other.search(photo(3), 4)
    assert [as_data(match) for match in found.matches] == [as_data(match) for match in expected.matches]
    assert found.prediction == expected.prediction


def test_a_gallery_is_opened_by_its_address_alone(databases: tuple[str, str], cache: Path) -> None:
    """Faces of one process are found by another, which has nothing but the address; photos are embedded."""
    address, vectors = databases
    with Gallery.open(address) as gallery:
        [outcome] = gallery.enroll([(photo(1), "Kim")])
        assert outcome.face_id == 1
        assert gallery.name == gallery.info().folder
        assert "secret-word" not in gallery.name
    shutil.rmtree(cache / "faceprint")  # as on another machine
    with Gallery.open(address, vectors=vectors) as gallery:
        found = gallery.search(photo(1), 1)
        assert [(match.face.identity, round(match.distance, 3)) for match in found.matches] == [("Kim", 0.0)]
        copy = pickle.loads(pickle.dumps(gallery))
        with copy:
            assert copy.info().faces == 1


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "model.safetensors"])
def test_a_damaged_copy_of_the_model_is_renewed(
    name: str, databases: tuple[str, str], bundle: ModelBundle, cache: Path
) -> None:
    address, _ = databases
    with Gallery.open(address) as gallery:
        gallery.enroll([(photo(1), "Kim")])
    [path] = cache.glob(f"faceprint/models/*/{name}")
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with Gallery.open(address) as gallery:
        [match] = gallery.search(photo(1), 1).matches
        assert (match.face.identity, round(match.distance, 3)) == ("Kim", 0.0)
    [path] = cache.glob(f"faceprint/models/*/{name}")
    assert path.read_bytes() == (bundle.folder / name).read_bytes()


def test_what_is_forgotten_is_in_no_answer_and_leaves_milvus_and_the_models_card(
    databases: tuple[str, str], cache: Path
) -> None:
    address, vectors = databases
    with Gallery.open(address) as gallery, Gallery.open(address, read_only=True) as reader:
        add(gallery, range(6))
        assert len(reader.search_by_vector(vector_of(face(2).sha256), 9)) == 6
        receipt = gallery.forget("Zephyr Kant")
        assert receipt.face_ids == (3, 6)
        found = reader.search_by_vector(vector_of(face(2).sha256), 9)
        assert sorted(match.face.id for match in found) == [1, 2, 4, 5]
        with closing(MilvusVectors.open(vectors, DIMENSION)) as collection:
            assert collection.ids(100).tolist() == [1, 2, 4, 5]
        assert gallery.bundle.labels == ("Adi", "Kim", FORGOTTEN)
        [card] = cache.rglob("bundle.json")
        assert "Zephyr" not in card.read_text()
        with pytest.raises(NotFound, match="There is no identity Zephyr Kant"):
            gallery.forget("Zephyr Kant")
        # Ids are never used again.
        [outcome] = gallery.enroll_vectors([face(9)], vector_of(face(9).sha256)[None])
        assert outcome.face_id == 7


def test_people_are_renamed_merged_and_given_back(databases: tuple[str, str]) -> None:
    with Gallery.open(databases[0]) as gallery:
        add(gallery, range(6))
        gallery.rename_identity("Adi", "Adi Berg")
        gallery.merge_identities("Kim", "Adi Berg")
        gallery.info()
        assert gallery.bundle.labels == ("Adi Berg", "Adi Berg", "Zephyr Kant")
        gallery.undo_merge()
        gallery.info()
        assert gallery.bundle.labels == ("Adi Berg", "Kim", "Zephyr Kant")
        gallery.annotate(identities={"Kim": {"team": 1}})
        where = Where.parse(["person.team=1"])
        [found] = gallery.search_people_by_vectors(vector_of(face(1).sha256)[None], 5, where=where)
        assert [one.identity for one in found] == ["Kim"]
        actions = [entry.action for entry in gallery.audit_log()]
        assert actions == ["enroll", "rename-identity", "merge-identities", "undo-merge", "annotate"]


def refusal(kind: type[FaceprintError], work: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        work()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "secret-word" not in message
    assert message.endswith(".")
    return message


def test_what_needs_a_folder_is_refused_and_says_what_to_do(
    databases: tuple[str, str], bundle: ModelBundle, tmp_path: Path
) -> None:
    with Gallery.open(databases[0]) as gallery:
        for work, instead in [
            (lambda: gallery.backup(tmp_path / "backup"), "copy it to a folder and back up that"),
            (lambda: gallery.reembed(bundle), "`faceprint copy`"),
            (gallery.optimize, "without codes"),
            (gallery.compact, "VACUUM"),
            (gallery.repair, "from backups of their own"),
            (lambda: gallery.folder, "`name`"),
        ]:
            assert instead in refusal(GalleryError, work)


def test_a_gallery_is_made_whole_or_not_at_all(
    databases: tuple[str, str], schema_address: str, milvus: str, bundle: ModelBundle, tmp_path: Path
) -> None:
    address, vectors = databases
    again = f"{milvus}/again"
    assert "already" in refusal(GalleryError, lambda: Gallery.create(address, bundle, vectors=again))
    assert "There is no collection" in refusal(GalleryError, lambda: MilvusVectors.open(again, DIMENSION))
    assert "exists already" in refusal(GalleryError, lambda: Gallery.create(address, bundle, vectors=vectors))
    assert "`vectors=milvus://" in refusal(InputError, lambda: Gallery.create(address, bundle))
    assert "leave `vectors` out" in refusal(
        InputError, lambda: Gallery.create(tmp_path / "folder", bundle, vectors=vectors)
    )
    assert "leave `vectors` out" in refusal(
        InputError, lambda: Gallery.open(tmp_path / "folder", vectors=vectors)
    )


def test_a_collection_of_another_gallery_is_refused(
    databases: tuple[str, str], collection: str, milvus: str, bundle: ModelBundle
) -> None:
    address, _ = databases
    other = f"{milvus}/other"
    with closing(MilvusVectors.create(other, DIMENSION, owner="another gallery")) as made:
        with Gallery.open(address, vectors=other) as gallery:
            asked = np.zeros((1, DIMENSION))
            add_one = [face(1)]
            assert "is not that of the gallery" in refusal(
                GalleryError, lambda: gallery.enroll_vectors(add_one, asked)
            )
        made.drop()


def test_verify_says_what_is_missing_or_damaged(
    databases: tuple[str, str], postgresql_server: PostgresqlServer, cache: Path
) -> None:
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(5))
        with closing(MilvusVectors.open(vectors, DIMENSION)) as collection:
            collection.remove(np.array([2]))
            assert "lacks the vector of face 2" in refusal(
                GalleryDamaged, lambda: gallery.search_by_vector(np.zeros(DIMENSION), 9)
            )
        schema = address.rpartition("schema=")[2]
        postgresql_server.execute(
            f"UPDATE {schema}.model_file SET data = data || 'x'::bytea WHERE name = 'model.onnx'"
        )
        found = {finding.trouble: finding for finding in gallery.verify().findings}
        assert found.keys() == {Trouble.FACE_WITHOUT_VECTOR, Trouble.MODEL_DAMAGED}
        assert found[Trouble.FACE_WITHOUT_VECTOR].face_ids == (2,)
        assert found[Trouble.MODEL_DAMAGED].file == "model.onnx"
    shutil.rmtree(cache / "faceprint")
    assert "is not whole" in refusal(GalleryDamaged, lambda: Gallery.open(address))


@pytest.mark.parametrize(
    ("lost", "stray"),
    [
        pytest.param([7], [], id="a vector is lost"),
        pytest.param([39, 40], [], id="Milvus was restored to an earlier state"),
        pytest.param([40], [5], id="the same, and as many vectors had been forgotten since"),
        pytest.param([7], [41], id="PostgreSQL was restored to an earlier state"),
        pytest.param([7], [5, 6, 41], id="a vector is lost, and killed writers left more"),
    ],
)
def test_no_search_leaves_out_a_face_that_lacks_its_vector(
    lost: list[int], stray: list[int], databases: tuple[str, str]
) -> None:
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(40))
        gallery.forget(face_id=5)
        gallery.forget(face_id=6)
        with closing(MilvusVectors.open(vectors, DIMENSION)) as collection:
            collection.remove(np.array(lost))
            if stray:
                collection.put(np.array(stray), np.ones((len(stray), DIMENSION), np.float32))
    with Gallery.open(address) as gallery:
        for _ in range(2):
            assert f"lacks the vector of face {lost[0]}" in refusal(
                GalleryDamaged, lambda: gallery.search_by_vector(np.zeros(DIMENSION), 1)
            )
        for number in lost:
            gallery.forget(face_id=number)
        assert len(gallery.search_by_vector(np.zeros(DIMENSION), 50)) == 38 - len(lost)
        assert gallery.verify().whole


def test_vectors_without_a_row_are_in_no_answer_and_no_damage(databases: tuple[str, str]) -> None:
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(40))
        gallery.forget(face_id=5)
        with closing(MilvusVectors.open(vectors, DIMENSION)) as collection:
            collection.put(np.array([5, 41]), np.zeros((2, DIMENSION), np.float32))
    with Gallery.open(address, read_only=True) as gallery:
        found = gallery.search_by_vector(np.zeros(DIMENSION), 3)
        assert len(found) == 3
        assert not {5, 41} & {match.face.id for match in found}


def test_names_change_while_milvus_is_down(databases: tuple[str, str]) -> None:
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(2))
    nowhere = vectors.replace(vectors.split("/")[2], "127.0.0.1:1")
    with Gallery.open(address, vectors=nowhere) as gallery:
        gallery.rename_identity("Adi", "Adi Berg")
        assert gallery.info().identities == 2
        assert "cannot be used" in refusal(
            ServerUnavailable, lambda: gallery.search_by_vector(np.zeros(DIMENSION), 1)
        )
