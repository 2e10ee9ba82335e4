"""Codes: a bound on every distance from a byte a coordinate, on disk and in a gallery."""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.database.records import NewFace
from retrieval.errors import GalleryDamaged, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from retrieval.index import quantization
from retrieval.index.knn import Explanation
from retrieval.index.quantization import Basis, WrittenCodes, basis_of
from retrieval.index.segments import Vectors
from retrieval.models.bundle import ModelBundle
from retrieval.models.importing import import_model
from retrieval.storage import codes, optimization
from retrieval.storage.optimization import Optimized
from tests.gallery.test_identities import sha256
from tests.onnx_networks import network, saved

FACES, PEOPLE = 320, 40

# A basis of 2,048 numbers takes some seconds to learn.
DIMENSION = 512

Answers = list[list[tuple[int, float]]]


def vectors_of(numbers: range, dimension: int = DIMENSION) -> Vectors:
    """What some photos give: everything about them is told by twelve numbers."""
    axes = np.random.default_rng(20).standard_normal((12, dimension)) / np.sqrt(dimension)
    rows = [np.random.default_rng([21, number]).standard_normal(12) for number in numbers]
    return (np.stack(rows) @ axes).astype(np.float32)


@pytest.fixture(scope="module")
def basis() -> Basis:
    learned = quantization.learn(vectors_of(range(2000), 128)).basis
    assert learned is not None
    return learned


# Files


def test_an_encoded_vector_is_no_farther_from_its_code_than_its_error(basis: Basis) -> None:
    """Vectors of the sample's kind are as far as the grid is coarse."""
    vectors = vectors_of(range(500, 600), 128)
    made, errors = basis.encode(vectors)
    moved = vectors.astype(np.float64) - basis.mean
    along = moved @ basis.axes.T
    rest = np.sqrt(np.maximum((moved**2).sum(axis=1) - (along**2).sum(axis=1), 0))
    places = np.column_stack([along, rest]).clip(basis.low, basis.low + 255 * basis.step)
    off = np.linalg.norm(places - (basis.low + made * basis.step), axis=1)
    assert (made.dtype, made.shape) == (np.uint8, (100, basis.coordinates))
    # The length of what remains is the root of a difference of nearly equal numbers here.
    np.testing.assert_array_less(off, errors + 1e-6)
    assert quantization.tolerable(basis, errors)
    assert errors.max() < 0.6 * basis.step * np.sqrt(basis.coordinates)


def test_vectors_too_long_for_float64_are_not_tolerable(basis: Basis) -> None:
    near, far = vectors_of(range(9), 128), vectors_of(range(9), 128) * np.float32(1e16)
    assert quantization.tolerable(basis, basis.encode(near)[1])
    assert not quantization.tolerable(basis, basis.encode(np.concatenate([near, far]))[1])
    assert quantization.tolerable(basis, np.empty(0))


def test_a_basis_comes_back_from_its_bytes(basis: Basis) -> None:
    read = basis_of(basis.data())
    for name in ("mean", "axes", "low"):
        assert np.array_equal(getattr(read, name), getattr(basis, name))
    assert (read.step, read.coordinates, read._slack) == (basis.step, basis.coordinates, basis._slack)
    assert read.data() == basis.data()
    vectors = vectors_of(range(20), 128)
    for one, other in zip(read.encode(vectors), basis.encode(vectors), strict=True):
        assert np.array_equal(one, other)


def test_bytes_that_are_no_basis_are_refused(basis: Basis) -> None:
    data = basis.data()
    wrong = [
        Basis(basis.mean[:-1], basis.axes, basis.low, basis.step),
        Basis(basis.mean, basis.axes[:-1], basis.low, basis.step),
        Basis(basis.mean, basis.axes, basis.low, 0.0),
        Basis(basis.mean, basis.axes, basis.low, np.inf),
        Basis(basis.mean, basis.axes, basis.low, np.nan),
        Basis(basis.mean, basis.axes[:9], basis.low[:10], basis.step),
    ]
    cut = [data[:length] for length in (0, 1, 8, 100, len(data) // 2, len(data) - 1)]
    for some in (*cut, data + b"\0", b"\xff" * 500, b"hello", *(one.data() for one in wrong)):
        with pytest.raises(ValueError, match="not a basis"):
            basis_of(some)


def test_codes_come_back_from_their_file(basis: Basis, tmp_path: Path) -> None:
    made, errors = basis.encode(vectors_of(range(60), 128))
    written = quantization.write(tmp_path / "codes", made, errors)
    read = quantization.read(tmp_path / "codes", basis, 60, written.error)
    assert (written.bytes, written.error) == ((tmp_path / "codes").stat().st_size, errors.max())
    assert np.array_equal(read.codes, made)
    assert (read.error, read.index.ntotal, read.basis) == (errors.max(), 60, basis)


@pytest.mark.parametrize("rows", [1, 2, 60])
@pytest.mark.parametrize("coordinates", [64, 128, 256])
def test_a_file_of_codes_is_byte_for_byte_what_faiss_writes(
    rows: int, coordinates: int, tmp_path: Path
) -> None:
    made = np.random.default_rng(rows).integers(0, 256, (rows, coordinates), np.uint8)
    written = quantization.write(tmp_path / "codes", made, np.arange(rows, dtype=np.float64))
    index = faiss.IndexScalarQuantizer(coordinates, faiss.ScalarQuantizer.QT_8bit_direct)
    index.add(made.astype(np.float32))
    data = (tmp_path / "codes").read_bytes()
    assert data == faiss.serialize_index(index).tobytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert written == WrittenCodes(len(data), sha256, rows - 1)
    copied = quantization.copy(tmp_path / "codes", rows, coordinates, sha256)
    assert copied is not None
    assert np.array_equal(copied, made)


def test_codes_that_are_not_what_was_written_are_not_copied(basis: Basis, tmp_path: Path) -> None:
    made, errors = basis.encode(vectors_of(range(60), 128))
    path = tmp_path / "codes"
    written = quantization.write(path, made, errors)
    whole = path.read_bytes()
    assert quantization.copy(path, 60, basis.coordinates, written.sha256) is not None
    assert quantization.copy(path, 59, basis.coordinates, written.sha256) is None
    for data in (whole[:-1], whole + b"\0", b"", whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]):
        path.write_bytes(data)
        assert quantization.copy(path, 60, basis.coordinates, written.sha256) is None
    path.unlink()
    assert quantization.copy(path, 60, basis.coordinates, written.sha256) is None


def test_a_file_that_is_not_whole_codes_is_damaged(basis: Basis, tmp_path: Path) -> None:
    made, errors = basis.encode(vectors_of(range(60), 128))
    path = tmp_path / "codes"
    with pytest.raises(GalleryDamaged, match="codes cannot be read"):
        quantization.read(path, basis, 60, 1.0)
    quantization.write(path, made, errors)
    whole = path.read_bytes()
    for data in (*(whole[:n] for n in range(0, len(whole), 97)), whole[:-1], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(GalleryDamaged, match="codes is damaged"):
            quantization.read(path, basis, 60, 1.0)
    for data in (bytes(len(whole)), b"\xff" * len(whole), b"IxMp" + whole[4:], whole[::-1]):
        path.write_bytes(data)
        with pytest.raises(GalleryDamaged, match=r"codes (is damaged|cannot be read)"):
            quantization.read(path, basis, 60, 1.0)
    path.write_bytes(whole)
    for rows in (0, 59, 61):
        with pytest.raises(GalleryDamaged, match="codes is damaged"):
            quantization.read(path, basis, rows, 1.0)


def test_a_byte_changed_in_the_head_is_damage(basis: Basis, tmp_path: Path) -> None:
    """FAISS itself would reserve gigabytes for a list whose length was changed."""
    made, errors = basis.encode(vectors_of(range(60), 128))
    path = tmp_path / "codes"
    quantization.write(path, made, errors)
    whole = path.read_bytes()
    for position in range(len(whole) - made.size):
        for value in {0, 0x7F, 0x80, 0xFF} - {whole[position]}:
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            with pytest.raises(GalleryDamaged, match="codes is damaged"):
                quantization.read(path, basis, 60, 1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
def test_a_disk_that_is_full_leaves_no_codes(basis: Basis, tmp_path: Path) -> None:
    import resource

    made, errors = basis.encode(vectors_of(range(60), 128))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(StorageError, match="codes cannot be written: file too large"):
            quantization.write(tmp_path / "codes", made, errors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_or_a_file_is_a_storage_error(basis: Basis, tmp_path: Path) -> None:
    made, errors = basis.encode(vectors_of(range(60), 128))
    (tmp_path / "file").write_bytes(b"")
    for folder, reason in (("gone", "no such file or directory"), ("file", "not a directory")):
        with pytest.raises(StorageError, match=f"codes cannot be written: {reason}"):
            quantization.write(tmp_path / folder / "codes", made, errors)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_a_storage_error(basis: Basis, tmp_path: Path) -> None:
    made, errors = basis.encode(vectors_of(range(60), 128))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="codes cannot be written: permission denied"):
            quantization.write(tmp_path / "codes", made, errors)
    finally:
        tmp_path.chmod(0o700)


# In a gallery


def enroll(gallery: Gallery, numbers: range) -> None:
    faces = [
        NewFace(f"person {number % PEOPLE}", f"/photos/{number}.jpg", sha256(number)) for number in numbers
    ]
    gallery.enroll_vectors(faces, vectors_of(numbers))


def answers(gallery: Gallery) -> Answers:
    """What stored and other vectors find, few and many together."""
    asked = np.concatenate([vectors_of(range(0, 40, 8)), vectors_of(range(9000, 9007))])
    found = [*gallery.search_by_vectors(asked[:2], 9), *gallery.search_by_vectors(asked, 9)]
    found += gallery.search_by_vectors(asked, None, within=0.9)
    return [[(match.face.id, match.distance) for match in some] for some in found]


def vector_files(gallery: Gallery, suffix: str) -> list[str]:
    return sorted(path.name for path in (gallery.folder / "vectors").glob(f"*.{suffix}"))


def covered(gallery: Gallery) -> dict[int, int]:
    """The rows of each segment that has codes, by its number; the codes on disk are those in the table."""
    with gallery.vault.store.read() as reader:
        known, segments = reader.codes(), {one.id: one.rows for one in reader.segments()}
        files = [f"{one.segment_id:08d}-{one.basis_id}.codes" for one in known.values()]
    assert vector_files(gallery, "codes") == sorted(files)
    return {number: segments[number] for number in known}


def method(gallery: Gallery) -> str:
    took = Explanation()
    gallery.search_by_vectors(vectors_of(range(9000, 9002)), 3, explanation=took)
    return took.method


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A model whose embeddings have DIMENSION numbers."""
    folder = tmp_path_factory.mktemp("imported")
    file = saved(network(dimension=DIMENSION), folder / "network.onnx")
    return import_model(file, folder / "model", colour="rgb", mean=127.5, std=128)


@pytest.fixture(scope="module")
def empty_gallery(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("galleries") / "empty.gallery"
    Gallery.create(folder, bundle).close()
    return folder


@pytest.fixture(scope="module")
def templates(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Answers]:
    """A gallery without codes, the same after `optimize`, and what both answer."""
    folder = tmp_path_factory.mktemp("templates")
    bare, quick = folder / "bare", folder / "quick"
    with Gallery.create(bare, bundle) as gallery:
        enroll(gallery, range(FACES))
        before = answers(gallery)
    shutil.copytree(bare, quick)
    with pytest.MonkeyPatch.context() as patch, Gallery.open(quick) as gallery:
        patch.setattr(optimization, "OPTIMIZE_FROM", 200)
        patch.setattr(codes, "CODES_FROM", 50)
        assert gallery.optimize() == Optimized(64, True, 1)
    return bare, quick, before


@pytest.fixture
def small_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "OPTIMIZE_FROM", 200)
    monkeypatch.setattr(codes, "CODES_FROM", 50)


@pytest.fixture
def quick(templates: tuple[Path, Path, Answers], small_thresholds: None, tmp_path: Path) -> Iterator[Gallery]:
    """A gallery of 320 faces in one segment that has codes."""
    shutil.copytree(templates[1], tmp_path / "quick")
    with Gallery.open(tmp_path / "quick") as gallery:
        yield gallery


@pytest.fixture
def before(templates: tuple[Path, Path, Answers]) -> Answers:
    """What was answered before there were any codes."""
    return templates[2]


def assert_whole(gallery: Gallery) -> None:
    found = gallery.verify()
    assert (found.findings, found.notes) == ((), ())


def test_a_gallery_with_too_few_faces_is_left_as_it_is(
    templates: tuple[Path, Path, Answers], tmp_path: Path
) -> None:
    shutil.copytree(templates[0], tmp_path / "bare")
    with Gallery.open(tmp_path / "bare") as gallery:
        assert gallery.optimize() == Optimized(None, False, 0)
        info = gallery.info()
        assert (info.coordinates, info.coded_faces, info.codes_bytes) == (None, 0, 0)
        assert vector_files(gallery, "codes") == vector_files(gallery, "basis") == []
        assert method(gallery) == "scan"
        assert_whole(gallery)


def test_optimizing_writes_codes_that_change_no_answer(quick: Gallery, before: Answers) -> None:
    assert covered(quick) == {1: FACES}
    assert vector_files(quick, "basis") == ["00000001.basis"]
    assert method(quick) == "bound"
    assert answers(quick) == before
    info = quick.info()
    on_disk = sum(
        path.stat().st_size
        for path in (quick.folder / "vectors").iterdir()
        if path.suffix in (".codes", ".basis")
    )
    assert (info.coordinates, info.coded_faces, info.codes_bytes) == (64, FACES, on_disk)
    assert quick.audit_log()[-1].action == "optimize"
    assert_whole(quick)


def test_optimizing_a_second_time_does_nothing(quick: Gallery) -> None:
    entries, files = quick.audit_log(), sorted((quick.folder / "vectors").iterdir())
    stamps = [path.stat().st_mtime_ns for path in files]
    assert quick.optimize() == Optimized(64, False, 0)
    assert quick.audit_log() == entries
    assert sorted((quick.folder / "vectors").iterdir()) == files
    assert [path.stat().st_mtime_ns for path in files] == stamps


def test_new_segments_get_codes_when_they_are_large_enough(quick: Gallery) -> None:
    enroll(quick, range(1000, 1049))
    assert covered(quick) == {1: FACES}
    assert method(quick) == "bound and scan"
    assert_whole(quick)
    enroll(quick, range(2000, 2030))
    assert sorted(covered(quick).values()) == [79, FACES]
    assert method(quick) == "bound"
    assert quick.info().coded_faces == FACES + 79
    assert_whole(quick)
    found = answers(quick)
    for path in (quick.folder / "vectors").glob("*.codes"):
        path.unlink()
    with Gallery.open(quick.folder) as again:
        assert method(again) == "scan"
        assert answers(again) == found


def test_compacting_keeps_codes(quick: Gallery) -> None:
    enroll(quick, range(1000, 1100))
    assert sorted(covered(quick).values()) == [100, FACES]
    found = answers(quick)
    quick.compact()
    assert list(covered(quick).values()) == [FACES + 100]
    assert (answers(quick), method(quick)) == (found, "bound")
    assert_whole(quick)


@pytest.mark.parametrize("broken", [False, True])
def test_merged_segments_keep_the_codes_that_they_have_and_broken_ones_are_made_anew(
    broken: bool, quick: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Basis.encode

    def counted(basis: Basis, vectors: Vectors) -> tuple[quantization.Codes, NDArray[np.float64]]:
        encoded.append(len(vectors))
        return encode(basis, vectors)

    found, (name,) = answers(quick), vector_files(quick, "codes")
    folder = quick.folder / "vectors"
    before = (folder / name).read_bytes()
    with quick.vault.store.read() as reader:
        error = reader.codes()[1].error
    if broken:
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    monkeypatch.setattr(Basis, "encode", counted)
    enroll(quick, range(1000, 1200))
    assert list(covered(quick).values()) == [FACES + 200]
    assert sum(encoded) == (FACES + 200 if broken else 200)
    (name,) = vector_files(quick, "codes")
    after = (folder / name).read_bytes()
    assert after != before
    if not broken:
        head = len(before) - FACES * 64
        assert before[head : head + FACES * 64] in after
        with quick.vault.store.read() as reader:
            (row,) = reader.codes().values()
        everything = np.concatenate([vectors_of(range(FACES)), vectors_of(range(1000, 1200))])
        _, errors = encode(quick.vault.vectors(quick._model.current()).basis(row.basis_id), everything)
        assert row.error >= error
        assert row.error == pytest.approx(errors.max(), rel=1e-9)
    assert_whole(quick)
    assert method(quick) == "bound"
    assert [some[0] for some in answers(quick)[:2]] == [some[0] for some in found[:2]]


def test_nothing_of_the_forgotten_is_left_in_codes(quick: Gallery) -> None:
    """The old segment's file of codes goes with it, and the new one has no row for them."""
    gone = range(3, FACES, PEOPLE)
    made, _ = quick.vault.vectors(quick._model.current()).basis(1).encode(vectors_of(gone))
    (old,) = vector_files(quick, "codes")
    assert all(row.tobytes() in (quick.folder / "vectors" / old).read_bytes() for row in made)
    quick.forget("person 3")
    assert list(covered(quick).values()) == [FACES - len(gone)]
    (new,) = vector_files(quick, "codes")
    assert new != old
    data = (quick.folder / "vectors" / new).read_bytes()
    assert not any(row.tobytes() in data for row in made)
    names = {m.face.identity for some in quick.search_by_vectors(vectors_of(gone), FACES) for m in some}
    assert (len(names), "person 3" in names, method(quick)) == (PEOPLE - 1, False, "bound")
    assert_whole(quick)


@pytest.mark.parametrize("file", ["codes", "basis"])
@pytest.mark.parametrize("damage", ["deleted", "cut", "a byte changed", "empty"])
def test_damage_is_found_and_mended(quick: Gallery, before: Answers, file: str, damage: str) -> None:
    """A file that cannot be read changes no answer."""
    folder = quick.folder
    quick.close()
    (path,) = (folder / "vectors").glob(f"*.{file}")
    data = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    else:
        data[-1] ^= 0x10
        path.write_bytes({"cut": data[:-5], "empty": b""}.get(damage, data))
    found = verify(folder).findings
    assert [(one.trouble, one.file) for one in found] == [(Trouble.CODES_DAMAGED, f"vectors/{path.name}")]
    assert found[0].trouble.value == "codes-damaged"
    with Gallery.open(folder) as again:
        if damage != "a byte changed":
            assert (method(again), answers(again)) == ("scan", before)
        assert again.repair().after.findings == ()
    with Gallery.open(folder) as mended:
        assert_whole(mended)
        assert (method(mended), answers(mended)) == ("bound", before)
        assert list(covered(mended).values()) == [FACES]


def test_codes_that_nothing_names_are_removed_by_the_next_write(quick: Gallery) -> None:
    folder = quick.folder / "vectors"
    names = ("00000001-7.codes", "00000099-1.codes", ".00000003-1.codes.part", "00000009.basis")
    for name in names:
        (folder / name).write_bytes(b"left")
    found = {(one.trouble, one.file) for one in quick.verify().findings}
    assert found == {(Trouble.LEFTOVER, f"vectors/{name}") for name in names}
    enroll(quick, range(1000, 1001))
    assert not any((folder / name).exists() for name in names)
    assert covered(quick) == {1: FACES}
    assert_whole(quick)


def test_a_restored_gallery_answers_as_the_one_that_was_backed_up(
    quick: Gallery, before: Answers, tmp_path: Path
) -> None:
    quick.backup(tmp_path / "backup")
    Gallery.restore(tmp_path / "backup", tmp_path / "restored")
    with Gallery.open(tmp_path / "restored") as restored:
        assert_whole(restored)
        assert (answers(restored), method(restored)) == (before, "bound")
        assert (restored.info().coordinates, restored.info().coded_faces) == (64, FACES)
    enroll(quick, range(1000, 1100))
    Gallery.restore(tmp_path / "backup", quick.folder)
    with Gallery.open(quick.folder) as back:
        assert_whole(back)
        assert (answers(back), method(back)) == (before, "bound")
        assert list(covered(back).values()) == [FACES]


def test_optimizing_anew_leaves_one_basis(quick: Gallery, before: Answers) -> None:
    assert quick.optimize(anew=True) == Optimized(64, True, 1)
    assert vector_files(quick, "basis") == ["00000002.basis"]
    assert vector_files(quick, "codes") == ["00000001-2.codes"]
    assert covered(quick) == {1: FACES}
    assert (answers(quick), quick.info().coordinates) == (before, 64)
    assert_whole(quick)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_is_learned_from_fewer_than_two_faces(rows: int, gallery: Gallery) -> None:
    enroll(gallery, range(rows)) if rows else None
    assert gallery.optimize(anew=True) == Optimized(None, False, 0)
    assert_whole(gallery)


def test_codes_do_not_pay_for_faces_that_are_all_the_same(gallery: Gallery, small_thresholds: None) -> None:
    """Nothing varies, so that there is no grid; the gallery remembers that it was tried."""
    faces = [NewFace(None, None, sha256(number)) for number in range(210)]
    same: NDArray[np.float32] = np.ones((210, DIMENSION), np.float32)
    gallery.enroll_vectors(faces, same)
    assert gallery.optimize() == Optimized(0, True, 0)
    assert gallery.optimize() == Optimized(0, False, 0)
    assert (gallery.info().coordinates, vector_files(gallery, "basis")) == (0, [])
    assert_whole(gallery)
