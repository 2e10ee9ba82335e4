"""Galleries, models and tables below a path that is not ASCII, or not even UTF-8, are used as any other."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from retrieval.bulk.ingest import ingest
from retrieval.gallery.gallery import Gallery
from retrieval.index.segments import FlatVectors
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.network import Network
from retrieval.models.self_test import _tensors
from retrieval.models.torch_engine import TorchEngine
from retrieval.sources.metadata_tables import read_annotations
from retrieval.system import proof_cache
from retrieval.system.files import path_in_utf8
from tests.operations import GONE, coded, contents, tiny_model, write_photos
from training.derive import derive
from training.networks import weights_files
from training.networks.initialize import build

NOT_UTF_8 = os.fsdecode(b"nu\xff")


@pytest.fixture(params=[NOT_UTF_8, "Müller 顔"], ids=["not-utf-8", "not-ascii"])
def below(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / request.param
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    return folder


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is proven when it was read once, and loaded by its path from then on, however new it is."""
    monkeypatch.setattr(proof_cache, "_SETTLED_NANOSECONDS", -(10**12))


def _life(folder: Path, photos: Path) -> None:
    """A gallery of two segments with codes, a backup of it, a person forgotten, and the backup restored."""
    with Gallery.create(folder / "g", tiny_model(folder / "model")) as gallery:
        assert ingest(gallery, [photos], batch_size=2, workers=1).enrolled == 6
        assert gallery.optimize(anew=True).encoded > 0
        gallery.backup(folder / "backup")
    with Gallery.open(folder / "g") as gallery:
        photo = photos / "Kim" / "Kim_1.png"
        assert gallery.search(photo, 1).matches[0].face.paths == (str(photo),)
        assert gallery.verify().whole
        gallery.compact()
        assert gallery.forget(GONE).faces == 2
    with Gallery.open(folder / "g") as gallery:
        assert gallery.verify().whole
        found = gallery.search_by_face(1, 3)
        assert {match.face.identity for match in found} == {"Adi", "Kim"}
    Gallery.restore(folder / "backup", folder / "restored")
    with Gallery.open(folder / "restored") as gallery:
        assert gallery.verify().whole


def test_a_gallery_lives_below_any_path_as_below_any_other(
    below: Path, at_once: None, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", range(6))
    plain = tmp_path / "plain"
    plain.mkdir()
    for folder in (plain, below):
        coded(lambda root: _life(root, tmp_path / "photos"))(folder)
    for name, faces in (("g", 4), ("restored", 6)):
        assert contents(below / name) == contents(plain / name)
        assert len(contents(below / name)) == faces


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="what is mapped shows only on Linux")
def test_vectors_below_any_path_are_mapped_and_not_read(below: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    flat = FlatVectors(below, 8)
    flat.write(1, [(np.arange(50), vectors)])
    _, found = flat.rows(1)
    np.testing.assert_array_equal(found, vectors)
    mapped = Path("/proc/self/maps").read_bytes().splitlines()
    assert any(line.endswith(os.fsencode(flat.path(1))) for line in mapped)


def test_a_model_below_any_path_is_loaded_by_torch_and_derived_from(
    bundle: ModelBundle, below: Path, at_once: None
) -> None:
    model = ModelBundle.load(shutil.copytree(bundle.folder, below / "model"))
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    expected, _ = TorchEngine.load(bundle, "cpu")(picture)
    for _ in range(2):  # from bytes, which proves the file, and by its path
        np.testing.assert_array_equal(TorchEngine.load(model, "cpu")(picture)[0], expected)
    derived = derive(model, below / "unit", embedding=Embedding(length="unit"), data=None).bundle
    assert derived.embedding.length == "unit"
    assert _tensors(model.weights_path).keys() == load_file(bundle.weights_path).keys()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_below_any_path_are_read(suffix: str, below: Path, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save({"x": torch.ones(2)}, path)
    else:
        save_file({"x": np.ones(2, np.float32)}, path)
    path = path.rename(below / path.name)
    assert weights_files.read(path).tensors["x"].tolist() == [1, 1]


def test_weights_of_any_name_are_named_by_a_text_that_a_card_can_hold(tmp_path: Path) -> None:
    path = tmp_path / f"{NOT_UTF_8}.pt"
    torch.save(Network(2, architecture="resnet14-narrow").state_dict(), path)
    _, start = build(2, weights=str(path), architecture="resnet14-narrow")
    assert start.source == "nu\\xff.pt"


def test_parquet_below_any_path_is_read(below: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"identity": ["Kim"], "badge": [1]}), path)
    path = path.rename(below / path.name)
    assert [batch for batch in read_annotations(path).batches() if batch] == [{"Kim": {"badge": 1}}]


def test_a_path_in_utf_8_is_given_as_it_is_and_another_as_a_descriptor(tmp_path: Path) -> None:
    with path_in_utf8(tmp_path / "nothing, but ü") as name:
        assert name == os.fspath(tmp_path / "nothing, but ü")
    (tmp_path / NOT_UTF_8).write_bytes(b"here")
    with path_in_utf8(tmp_path / NOT_UTF_8) as name:
        assert Path(name).read_bytes() == b"here"
        assert name.isascii() or not os.path.exists("/proc/self/fd")
