"""Photos of several people: each face is a row with its vector, and every operation keeps them together."""

import dataclasses
import hashlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval import Gallery, ModelBundle, embed, ingest, verify
from retrieval.bulk.ingest import ingest_embeddings
from retrieval.database.records import Face, FaceRegion, NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import InputError, Reason
from retrieval.gallery.integrity import Trouble
from retrieval.gallery.repair import repair
from retrieval.images.detection import DetectedFace
from retrieval.images.photo_reader import FaceSelection, PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.network import Network
from retrieval.sources.photos import Photo
from retrieval.transfer.export_reader import read_export
from tests.detectors import detector, drawn, save
from training.fitting.export import export

SIZE = 32


def model(network: Network, folder: Path, margin: float = 0.0) -> ModelBundle:
    """The bundle of `network` with the detector of the tests."""
    faces = FaceAlignment(detector().sha256, margin=margin)
    reader = PhotoReader(Preprocessing(SIZE, 1.0, faces=faces), detector())
    return export(
        network,
        folder,
        labels=tuple("ABCDEF"),
        reader=reader,
        recipe={},
        split={"train": [], "validation": []},
        figures={},
        sample=np.stack([reader.square(drawn((200, 160), [(64, 48, 16)]))]),
    )


@pytest.fixture(scope="module")
def aligned(network: Network, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return model(network, tmp_path_factory.mktemp("models") / "aligned")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos without names: of three people, of two, of one, and of nobody."""
    folder = tmp_path / "photos"
    save(folder / "a three.png", (640, 200), [(64, 64, 16), (288, 64, 32), (512, 96, 16)], seed=1)
    save(folder / "b two.png", (480, 200), [(64, 64, 16), (288, 64, 16)], seed=2)
    save(folder / "c one.png", (320, 200), [(64, 64, 16)], seed=3)
    save(folder / "d nobody.png", (320, 200), [], seed=4)
    return folder


@pytest.fixture
def gallery(aligned: ModelBundle, photos: Path, tmp_path: Path) -> Iterator[Gallery]:
    """A gallery of their six faces."""
    with Gallery.create(tmp_path / "gallery", aligned) as made:
        ingest(made, [photos], identity_from="none")
        yield made


def faces_of(gallery: Gallery) -> list[Face]:
    with gallery.vault.store.read() as reader:
        return [face for some in reader.all_faces() for face in some]


def vector_of(gallery: Gallery, number: int) -> np.ndarray:
    with gallery.vault.store.read() as reader:
        found = gallery.vault.vector(reader, reader.serving_generation(), number)
    assert found is not None
    return np.array(found)


def contents(gallery: Gallery) -> list[tuple[str, str | None, FaceRegion | None]]:
    """The photo, the identity and the place of each face."""
    return sorted(
        ((face.sha256, face.identity, face.region) for face in faces_of(gallery)),
        key=lambda row: (row[0], "" if row[2] is None else row[2].box),
    )


def middles(faces: list[Face]) -> list[float]:
    """The left edge of each face's box."""
    return [face.box[0] for face in faces if face.box is not None]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_each_face_of_a_photo_without_a_name_is_enrolled_from_left_to_right(
    aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    outcomes: list[Outcome] = []
    with Gallery.create(tmp_path / "g", aligned) as made:
        done = ingest(made, [photos], identity_from="none", on_outcome=outcomes.append)
        faces = faces_of(made)
    assert (done.found, done.enrolled, done.rejected, done.faces) == (4, 3, 1, 6)
    assert done.summary()["faces"] == 6
    assert [one.face_ids for one in outcomes] == [(1, 2, 3), (4, 5), (6,), ()]
    assert [face.id for face in faces] == [1, 2, 3, 4, 5, 6]
    assert middles(faces[:3]) == sorted(middles(faces[:3]))
    assert {face.paths for face in faces[:3]} == {(str(photos / "a three.png"),)}
    region = faces[1].region
    assert region is not None
    assert region.detected is not None
    assert (region.detected.side, region.detected.yaw) == (pytest.approx(192), pytest.approx(0))
    assert region.sharpness is not None
    assert region.sharpness > 0


@pytest.mark.parametrize("rehash", [False, True])
def test_a_photo_is_known_with_all_its_faces(gallery: Gallery, photos: Path, rehash: bool) -> None:
    outcomes: list[Outcome] = []
    again = ingest(gallery, [photos], identity_from="none", rehash=rehash, on_outcome=outcomes.append)
    assert (again.found, again.known, again.rejected, again.faces) == (4, 3, 1, 0)
    assert [one.face_ids for one in outcomes] == [(1, 2, 3), (4, 5), (6,), ()]
    assert len(faces_of(gallery)) == 6


def test_every_way_of_enrolling_gives_the_same_faces(
    gallery: Gallery, aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    """Threads, processes, single calls, a file of vectors in one piece and row by row, and an export."""
    expected = contents(gallery)
    ways = []
    with Gallery.create(tmp_path / "processes", aligned) as made:
        ingest(made, [photos], identity_from="none", decoders=2)
        ways.append((made, contents(made)))
    with Gallery.create(tmp_path / "single", aligned) as made:
        made.enroll((path, None) for path in sorted(photos.iterdir()))
        ways.append((made, contents(made)))
    save(photos / "e later.png", (320, 200), [(64, 64, 16)], seed=9)
    embed(aligned, [photos], tmp_path / "vectors.parquet")
    (photos / "e later.png").unlink()
    with Gallery.create(tmp_path / "vectors", aligned) as made:
        done = ingest_embeddings(made, tmp_path / "vectors.parquet")
        assert (done.found, done.enrolled, done.faces) == (7, 7, 7)
        assert ingest_embeddings(made, tmp_path / "vectors.parquet").known == 7
        made.forget(path=photos / "e later.png")
        ways.append((made, contents(made)))
    gallery.export(tmp_path / "export")
    with Gallery.create(tmp_path / "imported", aligned) as made:
        assert made.import_export(read_export(tmp_path / "export")).enrolled == 6
        again = made.import_export(read_export(tmp_path / "export"))
        assert (again.enrolled, again.known) == (0, 6)
        ways.append((made, contents(made)))
    for _, found in ways:
        assert found == expected


def test_a_copy_gives_its_path_to_every_face_and_other_bytes_take_it_from_all(
    gallery: Gallery, photos: Path
) -> None:
    copy = photos / "x copy.png"
    shutil.copy(photos / "a three.png", copy)
    (outcome,) = gallery.enroll([(copy, None)])
    assert (outcome.status, outcome.face_ids) == (Status.DUPLICATE, (1, 2, 3))
    assert all(face.paths[-1] == str(copy) for face in faces_of(gallery)[:3])
    shutil.copy(photos / "c one.png", copy)
    shutil.copy(photos / "c one.png", photos / "a three.png")
    outcomes = gallery.enroll([(copy, None), (photos / "a three.png", None)])
    assert [one.replaced for one in outcomes] == [1, 1]
    assert [face.id for face in faces_of(gallery)] == [4, 5, 6]


def test_a_name_is_of_one_face(gallery: Gallery, photos: Path, tmp_path: Path) -> None:
    """A photo with a name is enrolled with its main face; where all are asked for, several are rejected."""
    named = tmp_path / "named" / "Ada" / "group.png"
    save(named, (640, 200), [(64, 64, 16), (288, 64, 32)], seed=21)
    (all_faces,) = gallery.enroll([(named, "Ada")], selection=FaceSelection("all"))
    assert (all_faces.status, all_faces.reason) == (Status.REJECTED, Reason.SEVERAL_FACES)
    assert all_faces.detail == "it shows 2 faces, and Ada can be one of them"
    (largest,) = gallery.enroll([(named, "Ada")])
    assert (largest.status, len(largest.face_ids)) == (Status.ENROLLED, 1)
    # The bytes are enrolled with three faces: the name is that of the main one.
    (main,) = gallery.enroll([(photos / "a three.png", "Bo")])
    assert (main.status, main.face_ids) == (Status.KNOWN, (2,))
    (again,) = gallery.enroll([(photos / "a three.png", "Bo")])
    assert again.status is Status.KNOWN
    (other,) = gallery.enroll([(photos / "a three.png", "Cy")])
    assert (other.status, other.reason) == (Status.REJECTED, Reason.IDENTITY_CONFLICT)
    (single,) = gallery.enroll([(photos / "c one.png", "Bo")])
    assert single.status is Status.KNOWN
    assert [face.identity for face in faces_of(gallery)] == [None, "Bo", None, None, None, "Bo", "Ada"]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("anonymous_first", [False, True])
def test_a_photo_with_and_without_a_name_gives_the_same_in_one_run_and_in_two(
    aligned: ModelBundle, tmp_path: Path, together: bool, anonymous_first: bool
) -> None:
    """Whoever comes first decides how many faces are enrolled; the main one has the name."""
    plain = save(tmp_path / "g.png", (640, 200), [(64, 64, 16), (288, 64, 32), (512, 96, 16)], seed=1)
    named = tmp_path / "Ada" / "g.png"
    named.parent.mkdir()
    shutil.copy(plain, named)
    offered = [(plain, None), (named, "Ada")]
    offered = offered if anonymous_first else offered[::-1]
    with Gallery.create(tmp_path / "g", aligned) as made:
        for some in [offered] if together else [[one] for one in offered]:
            outcomes = made.enroll(some)
        faces = faces_of(made)
    assert outcomes[-1].status is Status.DUPLICATE
    names = [None, "Ada", None] if anonymous_first else ["Ada"]
    assert [face.identity for face in faces] == names
    assert all(len(face.paths) == 2 for face in faces)


def test_a_face_is_forgotten_and_the_others_of_its_photo_stay(gallery: Gallery, photos: Path) -> None:
    second = faces_of(gallery)[1]
    assert second.region is not None
    stays = vector_of(gallery, 3)
    receipt = gallery.forget(face_id=2)
    assert (receipt.what, receipt.face_ids) == ("face", (2,))
    assert [face.id for face in faces_of(gallery)] == [1, 3, 4, 5, 6]
    assert np.array_equal(vector_of(gallery, 3), stays)
    # The photo is still known, so that the forgotten face does not come back.
    assert ingest(gallery, [photos], identity_from="none", rehash=True).enrolled == 0
    gallery.close()
    assert verify(gallery.folder).findings == ()
    database = (gallery.folder / "gallery.db").read_bytes()
    assert second.region.box.encode() not in database
    assert str(photos / "a three.png").encode() in database


def test_a_forgotten_face_comes_back_in_no_way_while_its_photo_stays(
    gallery: Gallery, aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    """Neither from a file of vectors, nor from an older export, nor from a run that had read the photo."""
    embed(aligned, [photos], tmp_path / "vectors.parquet")
    gallery.export(tmp_path / "export")
    prepared = None
    with Gallery.create(tmp_path / "empty", aligned) as empty:
        prepared = empty.prepare_many([Photo(str(photos / "a three.png"), None)])
    gallery.forget(face_id=2)
    left = [1, 3, 4, 5, 6]
    assert ingest_embeddings(gallery, tmp_path / "vectors.parquet").enrolled == 0
    assert gallery.import_export(read_export(tmp_path / "export")).enrolled == 0
    assert [one.status for one in gallery.enroll_prepared(prepared)] == [Status.KNOWN]
    assert [face.id for face in faces_of(gallery)] == left


def test_the_last_face_of_a_photo_takes_the_photo_with_it(gallery: Gallery, photos: Path) -> None:
    for number in (1, 3, 2):
        gallery.forget(face_id=number)
    assert ingest(gallery, [photos], identity_from="none").enrolled == 1
    assert [face.id for face in faces_of(gallery)] == [4, 5, 6, 7, 8, 9]
    receipt = gallery.forget(path=photos / "a three.png")
    assert (receipt.what, receipt.faces, receipt.face_ids) == ("path", 3, (7, 8, 9))
    gallery.close()
    for file in ("gallery.db", "gallery.db-wal"):
        if (gallery.folder / file).exists():
            assert b"a three.png" not in (gallery.folder / file).read_bytes()


def test_a_person_is_forgotten_where_others_stand_beside(gallery: Gallery, photos: Path) -> None:
    with gallery.vault.writing() as writer:
        writer.name_face(2, "Ada")
        writer.name_face(6, "Ada")
    receipt = gallery.forget("Ada")
    assert receipt.face_ids == (2, 6)
    assert [face.id for face in faces_of(gallery)] == [1, 3, 4, 5]
    assert ingest(gallery, [photos], identity_from="none").enrolled == 1  # the photo of Ada alone
    gallery.close()
    assert b"Ada" not in (gallery.folder / "gallery.db").read_bytes()


def test_sync_follows_and_removes_photos_with_all_faces(gallery: Gallery, photos: Path) -> None:
    (photos / "a three.png").rename(photos / "moved.png")
    (photos / "b two.png").unlink()
    planned = gallery.missing_files([photos])
    assert ([face.id for face in planned.moved], [face.id for face in planned.faces]) == ([1, 2, 3], [4, 5])
    done = gallery.remove_missing([photos])
    assert done == planned
    faces = faces_of(gallery)
    assert [(face.id, face.paths) for face in faces] == [
        *((number, (str(photos / "moved.png"),)) for number in (1, 2, 3)),
        (6, (str(photos / "c one.png"),)),
    ]
    assert ingest(gallery, [photos], identity_from="none").known == 2


def test_a_moved_photo_of_named_faces_is_followed_to_a_folder_of_one_of_them(
    gallery: Gallery, tmp_path: Path
) -> None:
    """And stays where it was for a folder of somebody else, whom no face is."""
    with gallery.vault.writing() as writer:
        writer.name_face(1, "Ada")
        writer.name_face(4, "Ada")
    people = tmp_path / "photos"
    for name, photo in (("Ada", "a three.png"), ("Cy", "b two.png")):
        (people / name).mkdir()
        (people / photo).rename(people / name / photo)
    done = gallery.remove_missing([people])
    assert [face.id for face in done.moved] == [1, 2, 3]
    assert [(one.face.id, one.identities) for one in done.kept] == [(4, ("Cy",)), (5, ("Cy",))]
    relabelled = gallery.relabel(_scanned(people))
    assert relabelled.faces == ()
    assert {one.face.id for one in relabelled.kept} <= {1, 2, 3, 4, 5}


def _scanned(folder: Path) -> "Iterator[object]":
    from retrieval.sources.photos import scan

    return scan([folder])


def test_a_renamed_folder_takes_along_the_faces_of_its_person_in_photos_of_several(
    gallery: Gallery, tmp_path: Path
) -> None:
    people = tmp_path / "people"
    save(people / "Ann" / "x.png", (320, 200), [(64, 64, 16)], seed=30)
    ingest(gallery, [people])
    gallery.assign_identity([2], "Ann")
    (people / "Ann").rename(people / "Anna")
    (renamed,) = gallery.remove_missing([people]).renamed
    assert (renamed.name, renamed.new_name, renamed.faces) == ("Ann", "Anna", 2)
    assert [face.id for face in faces_of(gallery) if face.identity == "Anna"] == [2, 7]


def test_relocating_and_annotating_speak_of_all_faces_of_a_photo(gallery: Gallery, photos: Path) -> None:
    done = gallery.annotate(paths={str(photos / "a three.png"): {"event": "wedding"}})
    assert done.faces == 3
    moved = photos.with_name("elsewhere")
    photos.rename(moved)
    found = gallery.relocate(photos, moved)
    assert (found.paths, found.faces, found.present) == (3, 6, 3)
    assert [face.metadata for face in faces_of(gallery)[:4]] == [{"event": "wedding"}] * 3 + [{}]


def test_another_model_finds_each_face_again(
    gallery: Gallery, network: Network, aligned: ModelBundle, tmp_path: Path
) -> None:
    before = {face.id: vector_of(gallery, face.id) for face in faces_of(gallery)}
    wide = model(network, tmp_path / "wide", margin=0.3)
    assert gallery.reembed(wide).embedded == 6
    with Gallery.create(tmp_path / "fresh", wide) as fresh:
        ingest(fresh, [tmp_path / "photos"], identity_from="none")
        for face in faces_of(fresh):
            assert np.allclose(vector_of(gallery, face.id), vector_of(fresh, face.id), rtol=1e-5)
    gallery.drop_other_model()
    gallery.reembed(aligned)
    for number, vector in before.items():
        assert np.allclose(vector_of(gallery, number), vector, rtol=1e-5)


def test_a_model_without_a_detector_cannot_tell_the_faces_of_a_photo_apart(
    gallery: Gallery, bundle: ModelBundle, photos: Path
) -> None:
    done = gallery.reembed(bundle)
    assert (done.embedded, done.switched, [face.id for face in done.lost]) == (1, False, [1, 2, 3, 4, 5])
    assert set(done.reasons.values()) == {
        "it shows several faces, and this model takes the picture as a whole"
    }
    gallery.forget(face_id=4)
    assert [face.id for face in gallery.reembed(bundle).lost] == [1, 2, 3]


def test_lost_vectors_come_back_from_the_faces_of_their_photos(gallery: Gallery) -> None:
    before = {face.id: vector_of(gallery, face.id) for face in faces_of(gallery)}
    gallery.close()
    (segment,) = (gallery.folder / "vectors").glob("*.faiss")
    segment.unlink()
    assert repair(gallery.folder).embedded == 6
    with Gallery.open(gallery.folder) as opened:
        for number, vector in before.items():
            assert np.allclose(vector_of(opened, number), vector, rtol=1e-5)


def test_a_picture_that_was_taken_as_it_is_is_taken_so_again(gallery: Gallery, tmp_path: Path) -> None:
    save(tmp_path / "crop.png", (64, 64), [], seed=5)
    (outcome,) = gallery.enroll([(tmp_path / "crop.png", "Cy")], selection=FaceSelection("none"))
    assert outcome.face_id is not None
    vector = vector_of(gallery, outcome.face_id)
    face = faces_of(gallery)[-1]
    assert (face.region, face.box) == (FaceRegion(), None)
    gallery.close()
    for segment in (gallery.folder / "vectors").glob("*.faiss"):
        segment.unlink()
    repair(gallery.folder)
    with Gallery.open(gallery.folder) as opened:
        assert np.allclose(vector_of(opened, outcome.face_id), vector, rtol=1e-5)


def test_a_restored_backup_lacks_a_face_that_was_forgotten_since(gallery: Gallery, tmp_path: Path) -> None:
    gallery.backup(tmp_path / "backup")
    gallery.forget(face_id=2)
    expected = contents(gallery)
    gallery.close()
    Gallery.restore(tmp_path / "backup", gallery.folder)
    with Gallery.open(gallery.folder) as opened:
        assert contents(opened) == expected


def test_a_photo_without_a_face_and_a_face_without_a_place_are_damage(gallery: Gallery) -> None:
    gallery.close()
    (gallery.folder / "gallery.sums").unlink()
    connection = sqlite3.connect(gallery.folder / "gallery.db")
    connection.execute("INSERT INTO photo VALUES (5, 'f', 0, 15)")
    connection.execute("UPDATE face SET landmarks = '[[1, 2]]' WHERE id = 1")
    connection.commit()
    connection.close()
    found = verify(gallery.folder).findings
    assert {one.trouble for one in found} == {Trouble.DATABASE_DAMAGED}
    assert [one.detail for one in found] == [
        "the photo with number 5 has no face, or a number that is not that of its first face",
        "the place of face 1 in its photo is not one that faceprint writes",
    ]


def test_vectors_of_the_same_face_found_elsewhere_by_a_hair_are_known(gallery: Gallery) -> None:
    """Another machine finds a face some thousandths of a pixel away; a place that is none is refused."""
    face = faces_of(gallery)[0]
    assert face.region is not None
    assert face.region.detected is not None
    left, *others = face.region.detected.box
    near = dataclasses.replace(face.region.detected, box=(left + 0.01, *others))
    new = NewFace(None, face.path, face.sha256, region=FaceRegion(near, 1.0))
    (outcome,) = gallery.enroll_vectors([new], vector_of(gallery, 1)[None])
    assert (outcome.status, outcome.face_id) == (Status.KNOWN, 1)
    for width in (float("nan"), float("inf"), 0.0, -1.0, 1e308, 10**400):
        broken = FaceRegion(DetectedFace((0.0, 0.0, width, 1e10), near.landmarks, 1.0))
        with pytest.raises(InputError, match=r"The region of .* cannot be stored"):
            gallery.enroll_vectors([dataclasses.replace(new, region=broken)], vector_of(gallery, 1)[None])
    for text in ("[" * 200_000, "1", "{}", '{"box": [1], "landmarks": 1, "score": 1, "sharpness": 1}'):
        with pytest.raises(ValueError, match=r"is no region|has too many levels|is no box"):
            FaceRegion.of_json(text)


def test_exclude_self_leaves_out_every_face_of_the_photo(gallery: Gallery, photos: Path) -> None:
    (answers,) = gallery.search_faces([photos / "a three.png"], k=6, exclude_self=True)
    assert [{match.face.id for match in one.matches} for one in answers] == [{4, 5, 6}] * 3
    people = gallery.search_faces([photos / "a three.png"], k=1)[0]
    assert [one.matches[0].face.id for one in people] == [1, 2, 3]
