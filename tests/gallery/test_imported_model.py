"""A gallery of an imported model does everything but predict."""

from pathlib import Path

import numpy as np
import pytest

from retrieval.bulk.ingest import ingest
from retrieval.database.records import NewFace
from retrieval.errors import ModelMismatch
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.models.bundle import ModelBundle
from retrieval.models.detectors import open_detector
from retrieval.models.importing import import_model
from tests.onnx_networks import DIMENSION, network, saved


@pytest.fixture(scope="module")
def enrolled(imported: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery of the drawn faces, calibrated; no test changes it."""
    folder = tmp_path_factory.mktemp("galleries") / "imported.gallery"
    with Gallery.create(folder, imported) as gallery:
        assert ingest(gallery, [faces]).enrolled == 36
        gallery.calibrate(0.1)
    return folder


def test_answers_have_matches_and_decisions_and_no_prediction(enrolled: Path, faces: Path) -> None:
    photo = min(faces.glob("*/*.jpg"))
    with Gallery.open(enrolled, read_only=True) as gallery:
        found = gallery.search(photo, k=3)
        (people,) = gallery.search_people([photo], k=2)
        info = gallery.info()
    assert (found.prediction, people.prediction) == (None, None)
    assert (found.matches[0].distance, found.matches[0].face.identity) == (0.0, photo.parent.name)
    for decision in (found.decision, people.decision):
        assert decision is not None
        assert (decision.identity, decision.classifier_agrees) == (photo.parent.name, None)
    assert (info.classifier_labels, info.dimension) == (0, DIMENSION)


def test_backups_exports_and_erasures_take_it_along(enrolled: Path, faces: Path, tmp_path: Path) -> None:
    photo = min(faces.glob("*/*.jpg"))
    with Gallery.open(enrolled) as gallery:
        gallery.backup(tmp_path / "backup")
        exported = gallery.export(tmp_path / "export")
    assert exported.architecture == "onnx"
    Gallery.restore(tmp_path / "backup", tmp_path / "restored")
    with Gallery.open(tmp_path / "restored") as gallery:
        gallery.forget(photo.parent.name)
        assert gallery.search(photo, k=1).matches[0].face.identity != photo.parent.name
    found = verify(tmp_path / "restored")
    assert (found.findings, found.faces) == ((), 30)
    with Gallery.create(tmp_path / "other", ModelBundle.load(tmp_path / "restored" / "model")) as gallery:
        assert gallery.import_export(exported).enrolled == 36
        assert gallery.search(photo, k=1).matches[0].distance == 0


def test_a_gallery_switches_between_imported_and_trained_models(
    imported: ModelBundle, bundle: ModelBundle, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    photo = min(faces.glob("*/*.jpg"))
    with Gallery.open(enrolled) as gallery:
        gallery.backup(tmp_path / "backup")
    Gallery.restore(tmp_path / "backup", tmp_path / "g")
    with Gallery.open(tmp_path / "g") as gallery:
        with pytest.raises(ModelMismatch):
            gallery.require(bundle)
        for model in (bundle, imported):
            gallery.reembed(model)
            assert (gallery.search(photo, k=1).prediction is None) == model.imported
            assert verify(tmp_path / "g").findings == ()


def test_a_detectors_file_is_part_of_galleries_and_backups(shared: Path, tmp_path: Path) -> None:
    file = saved(network(), tmp_path / "network.onnx")
    detector = open_detector(shared / "weights" / "yunet_s_640_640.onnx")
    how = {"colour": "rgb", "mean": 127.5, "std": 128}
    model = import_model(file, tmp_path / "model", detector=detector, **how)  # type: ignore[arg-type]
    with Gallery.create(tmp_path / "g", model) as gallery:
        gallery.enroll_vectors([NewFace("Ada", "/ada.jpg", "0" * 64)], np.ones((1, DIMENSION), np.float32))
        gallery.backup(tmp_path / "backup")
    Gallery.restore(tmp_path / "backup", tmp_path / "restored")
    assert verify(tmp_path / "restored").findings == ()
    (tmp_path / "restored" / "model" / "face_detector.onnx").unlink()
    (missing,) = verify(tmp_path / "restored").findings
    assert missing.file == "model/face_detector.onnx"
