"""Galleries of a model with a face detector: which faces are enrolled and found, and what is rejected."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieval import Gallery, ModelBundle, calibrate, embed, ingest, verify
from retrieval.errors import BundleError, InputError, ModelMismatch, Reason
from retrieval.images.photo_reader import FaceSelection, PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.network import Network
from tests.detectors import detector, drawn, save
from training.fitting.export import export

SIZE = 32
ALIGNED = Preprocessing(SIZE, 1.0, faces=FaceAlignment(detector().sha256))


@pytest.fixture(scope="module")
def aligned(network: Network, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The bundle of `network` with the detector of the tests."""
    return export(
        network,
        tmp_path_factory.mktemp("models") / "aligned",
        labels=tuple("ABCDEF"),
        reader=PhotoReader(ALIGNED, detector()),
        recipe={},
        split={"train": [], "validation": []},
        figures={},
        sample=np.stack([PhotoReader(ALIGNED, detector()).square(drawn((200, 160), [(64, 48, 16)]))]),
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two people with two photos each, a photo of two, and one of nobody."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("Ada", "Bo")):
        save(folder / name / "left.png", (320, 200), [(64, 64, 16)], seed=number)
        save(folder / name / "right.png", (320, 200), [(224, 96, 16)], seed=number)
    save(folder / "Bo" / "two.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    save(folder / "Bo" / "nobody.png", (320, 200), [], seed=8)
    return folder


@pytest.fixture
def gallery(aligned: ModelBundle, photos: Path, tmp_path: Path) -> Iterator[Gallery]:
    with Gallery.create(tmp_path / "gallery", aligned) as made:
        ingest(made, [photos])
        yield made


def test_the_card_and_the_fingerprint_state_the_detector_and_the_alignment(
    aligned: ModelBundle, bundle: ModelBundle, tmp_path: Path
) -> None:
    loaded = ModelBundle.load(aligned.folder)
    assert loaded.preprocessing == ALIGNED
    assert loaded.files["face_detector.onnx"] == detector().sha256
    assert loaded.fingerprint != bundle.fingerprint
    assert '"format": 4' in loaded.card()
    copy = loaded.save(tmp_path / "copy")
    copy.verify()
    assert (copy.folder / "face_detector.onnx").read_bytes() == detector().graph


def test_every_file_is_accounted_for(aligned: ModelBundle, photos: Path, tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", aligned) as made:
        done = ingest(made, [photos])
        assert (done.found, done.enrolled, done.rejected) == (6, 5, 1)
        assert done.reasons == {Reason.NO_FACE: 1}
        names = [stage.name for stage in done.stages]
        assert names.index("find faces") == names.index("decode") + 1
        again = ingest(made, [photos])
        assert (again.found, again.known, again.rejected) == (6, 5, 1)


def test_the_place_of_a_face_in_its_photo_does_not_matter(gallery: Gallery, photos: Path) -> None:
    answer = gallery.search(drawn((400, 300), [(160, 160, 16)], seed=1))
    assert answer.matches[0].face.identity == "Bo"
    assert answer.matches[0].face.path in (str(photos / "Bo/left.png"), str(photos / "Bo/right.png"))
    assert answer.face is not None
    assert answer.face.landmarks[2] == pytest.approx((168.5, 168.5))


def test_threads_processes_and_single_calls_give_the_same_vectors(
    aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    found = []
    for number, decoders in enumerate((0, 2)):
        with Gallery.create(tmp_path / f"g{number}", aligned) as made:
            ingest(made, [photos], decoders=decoders)
            found.append(vectors_by_path(made))
    with Gallery.create(tmp_path / "single", aligned) as made:
        made.enroll((path, path.parent.name) for path in sorted(photos.glob("*/*.png")))
        found.append(vectors_by_path(made))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for path, vector in found[0].items():
        assert np.array_equal(vector, found[1][path])
        assert np.allclose(vector, found[2][path], rtol=1e-5)


def vectors_by_path(gallery: Gallery) -> dict[str, np.ndarray]:
    with gallery.vault.store.read() as reader:
        generation = reader.serving_generation()
        faces = [face for some in reader.all_faces() for face in some]
        found = {face.path or "": gallery.vault.vector(reader, generation, face.id) for face in faces}
    return {path: vector for path, vector in found.items() if vector is not None}


def test_an_answer_for_each_face_of_a_picture_comes_from_left_to_right(gallery: Gallery) -> None:
    group = drawn((640, 200), [(64, 64, 16), (288, 64, 32), (512, 96, 16)], seed=5)
    (answers,) = gallery.search_faces([group], k=2)
    assert [one.face.landmarks[2][0] for one in answers if one.face is not None] == [72.5, 304.5, 520.5]
    assert all(len(one.matches) == 2 for one in answers)
    (largest,) = gallery.search_many([group], k=2)
    assert largest == answers[1]
    ((left, *_),) = gallery.search_people_of_faces([group], k=1)
    assert left.face == answers[0].face


def test_pictures_with_different_numbers_of_faces_keep_their_answers(gallery: Gallery) -> None:
    pictures = [drawn((320, 200), [(64 + 96 * i, 64, 16) for i in range(n)], seed=n) for n in (1, 2, 1, 2)]
    found = gallery.search_faces(pictures, k=1)
    assert [len(answers) for answers in found] == [1, 2, 1, 2]
    for picture, answers in zip(pictures, found, strict=True):
        assert gallery.search_faces([picture], k=1) == [answers]


def test_exclude_self_leaves_out_the_photo_for_each_of_its_faces(gallery: Gallery, photos: Path) -> None:
    two = photos / "Bo" / "two.png"
    (found,) = gallery.search_faces([two], k=5, exclude_self=True)
    assert len(found) == 2
    assert all(str(two) not in match.face.paths for one in found for match in one.matches)


def test_all_faces_in_one_answer_is_refused_with_a_sentence(gallery: Gallery) -> None:
    with pytest.raises(InputError, match="call `search_faces` for all of them"):
        gallery.search(drawn((320, 200), [(64, 64, 16)]), selection=FaceSelection("all"))


def test_a_picture_can_be_taken_as_it_is(gallery: Gallery) -> None:
    picture = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    assert gallery.search(picture, selection=FaceSelection("none")).face is None


def test_photos_with_several_faces_can_be_rejected(
    aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    with Gallery.create(tmp_path / "g", aligned) as made:
        done = ingest(made, [photos], selection=FaceSelection("one"))
    assert done.reasons == {Reason.NO_FACE: 1, Reason.SEVERAL_FACES: 1}


def test_embedding_and_calibrating_read_the_same_faces(
    gallery: Gallery, aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    done = embed(aligned, [photos], tmp_path / "v.npy")
    assert (done.embedded, done.reasons) == (5, {Reason.NO_FACE: 1})
    vectors = np.load(tmp_path / "v.npy")
    stored = vectors_by_path(gallery)
    order = sorted(stored)
    assert np.allclose(vectors, [stored[path] for path in order], rtol=1e-5)
    for number in range(12):
        save(tmp_path / "strangers" / f"{number}.png", (320, 200), [(64, 64, 16)], seed=100 + number)
    save(tmp_path / "strangers" / "nobody.png", (320, 200), [])
    found = calibrate(gallery, 0.1, strangers=[tmp_path / "strangers"])
    assert found.report is not None
    assert (found.report.used, found.report.reasons) == (12, {Reason.NO_FACE: 1})


def test_a_gallery_refuses_the_same_network_without_the_detector(
    aligned: ModelBundle, network: Network, gallery: Gallery, tmp_path: Path
) -> None:
    plain = export(
        network,
        tmp_path / "plain",
        labels=aligned.labels,
        reader=PhotoReader(Preprocessing(SIZE, 1.0)),
        recipe={},
        split={},
        figures={},
        sample=np.zeros((1, SIZE, SIZE, 3), np.uint8),
    )
    with pytest.raises(ModelMismatch):
        gallery.require(plain)


def test_reembedding_verifying_and_a_backup_know_the_detector(
    gallery: Gallery, aligned: ModelBundle, bundle: ModelBundle, tmp_path: Path
) -> None:
    before = vectors_by_path(gallery)
    gallery.backup(tmp_path / "backup")
    assert (tmp_path / "backup").exists()
    gallery.reembed(bundle)
    assert gallery.bundle.preprocessing.faces is None
    gallery.reembed(aligned)
    after = vectors_by_path(gallery)
    assert before.keys() == after.keys()
    assert all(np.allclose(before[path], after[path], rtol=1e-5) for path in before)
    gallery.close()
    assert verify(gallery.folder).findings == ()
    restored = Gallery.restore(tmp_path / "backup", tmp_path / "restored")
    with Gallery.open(restored.folder) as opened:
        assert vectors_by_path(opened).keys() == before.keys()
        opened.search(drawn((320, 200), [(64, 64, 16)]))


@pytest.mark.parametrize("damage", ["missing", "other", "cut"])
def test_a_damaged_detector_is_one_sentence(aligned: ModelBundle, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(aligned.folder, folder)
    file = folder / "face_detector.onnx"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"other" if damage == "other" else file.read_bytes()[:-20])
    with pytest.raises(BundleError, match="copy"):
        ModelBundle.load(folder).load_photo_reader()
    with pytest.raises(BundleError, match="copy"):
        ModelBundle.load(folder).verify()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("version", 3, "does not know"),
        ("template", "cat", "does not know"),
        ("margin", 9.0, "does not know"),
        ("detector", "0" * 64, "is not the detector's SHA-256"),
        ("smile", 1, "does not know"),
    ],
)
def test_a_card_with_another_alignment_is_refused(
    aligned: ModelBundle, tmp_path: Path, field: str, value: object, words: str
) -> None:
    import json

    folder = tmp_path / "model"
    shutil.copytree(aligned.folder, folder)
    card = json.loads((folder / "bundle.json").read_text())
    card["preprocessing"]["faces"][field] = value
    (folder / "bundle.json").write_text(json.dumps(card))
    with pytest.raises(BundleError, match=words):
        ModelBundle.load(folder)
