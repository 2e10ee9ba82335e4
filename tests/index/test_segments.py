"""FlatVectors: the answers are those of a float64 brute force, and a file is a whole segment or an error."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray

from retrieval.errors import GalleryDamaged, InputError, StorageError
from retrieval.index import segments as module
from retrieval.index.segments import FlatVectors, Ids, SegmentMissing, Vectors, Written

Part = tuple[Ids, Vectors]
Answer = tuple[NDArray[np.float64], Ids]

ROWS = 200
BLAS = {"by the row": 2**30, "in blocks by BLAS": 1}


@pytest.fixture(params=list(BLAS))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both of FAISS's ways to compute distances; which one it takes for how many depends on its version."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = BLAS[request.param]
    yield request.param
    faiss.cvar.distance_compute_blas_threshold = before


def brute_force(parts: Sequence[Part], queries: Vectors, k: int) -> list[Answer]:
    """Every distance in float64, sorted by distance and then by id."""
    ids = np.concatenate([ids for ids, _ in parts])
    stored = np.concatenate([vectors for _, vectors in parts]).astype(np.float64)
    answers = []
    for query in queries.astype(np.float64):
        squares = ((stored - query) ** 2).sum(axis=1)
        order = np.lexsort((ids, squares))[:k]
        answers.append((np.sqrt(squares[order]), ids[order]))
    return answers


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert [ids.tolist() for _, ids in found] == [ids.tolist() for _, ids in expected]
    for (distances, _), (true, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(distances, true, rtol=1e-9, atol=0)


def stored_in(folder: Path, parts: Sequence[Part]) -> FlatVectors:
    """Vectors in a folder, one segment a part, numbered from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = FlatVectors(folder, parts[0][1].shape[1])
    for number, part in enumerate(parts, start=1):
        vectors.write(number, [part])
    return vectors


def split(stored: Vectors, segments: int, rng: Generator) -> list[Part]:
    """Rows dealt to segments of different sizes, under ids in no order at all."""
    ids = rng.permutation(10 * len(stored))[: len(stored)].astype(np.int64)
    cuts = np.sort(rng.choice(np.arange(1, len(stored)), segments - 1, replace=False))
    return list(zip(np.split(ids, cuts), np.split(stored, cuts), strict=True))


def around(rng: Generator, rows: int, dimension: int) -> Vectors:
    return rng.standard_normal((rows, dimension)).astype(np.float32)


def duplicates(rng: Generator, rows: int, dimension: int) -> Vectors:
    """Few different vectors, each many times."""
    return around(rng, 7, dimension)[rng.integers(0, 7, rows)]


def last_bits(rng: Generator, rows: int, dimension: int) -> Vectors:
    """One vector, and its neighbours in the last bit of one of its numbers."""
    vectors = np.repeat(around(np.random.default_rng(5), 1, dimension), rows, axis=0)
    row, column = np.arange(rows), rng.integers(0, dimension, rows)
    towards = np.where(rng.random(rows) < 0.5, -np.inf, np.inf).astype(np.float32)
    vectors[row, column] = np.nextafter(vectors[row, column], towards)
    return vectors


def scaled(factor: float) -> Callable[[Generator, int, int], Vectors]:
    def make(rng: Generator, rows: int, dimension: int) -> Vectors:
        vectors = rng.standard_normal((rows, dimension))
        return (factor * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return make


def far_off(rng: Generator, rows: int, dimension: int) -> Vectors:
    """Norms of 1e4, distances of 1e-2: |x|^2 + |y|^2 - 2xy in float32 has no correct digit."""
    centre = 1e4 / np.sqrt(dimension)
    return (centre + rng.standard_normal((rows, dimension)) * 1e-2 / np.sqrt(dimension)).astype(np.float32)


def mixed(rng: Generator, rows: int, dimension: int) -> Vectors:
    """Lengths from 1e-3 to 1e5; float64 itself cannot tell many more apart."""
    return (around(rng, rows, dimension) * 10.0 ** rng.uniform(-4, 4, (rows, 1))).astype(np.float32)


def zeros(_: Generator, rows: int, dimension: int) -> Vectors:
    return np.zeros((rows, dimension), np.float32)


KINDS: dict[str, Callable[[Generator, int, int], Vectors]] = {
    "random": around,
    "duplicates": duplicates,
    "last bits": last_bits,
    "tiny": scaled(1e-30),
    "squares at the end of float32": scaled(1.5e-22),
    "huge": scaled(1e17),
    "far off": far_off,
    "mixed": mixed,
    "zeros": zeros,
}


@pytest.mark.parametrize("segments", [1, 6])
@pytest.mark.parametrize("kind", list(KINDS))
def test_search_is_a_float64_brute_force(kind: str, segments: int, kernel: str, tmp_path: Path) -> None:
    """Same ids in the same order, whatever k, and whether or not a query is stored."""
    rng = np.random.default_rng(1)
    parts = split(KINDS[kind](rng, ROWS, 64), segments, rng)
    queries = np.concatenate([KINDS[kind](rng, 12, 64), parts[-1][1][:12]])
    vectors = stored_in(tmp_path, parts)
    for k in (1, 5, ROWS - 1, ROWS, ROWS + 10):
        found = vectors.search(range(1, segments + 1), queries, k)
        assert_same(found, brute_force(parts, queries, k))


@pytest.mark.parametrize("count", [1, 19, 20, 21, 100])
@pytest.mark.parametrize("kind", ["random", "duplicates", "far off"])
def test_the_number_of_queries_does_not_change_an_answer(kind: str, count: int, tmp_path: Path) -> None:
    """FAISS, as it is installed, takes another kernel for many queries than for few."""
    rng = np.random.default_rng(2)
    parts, queries = split(KINDS[kind](rng, ROWS, 64), 3, rng), KINDS[kind](rng, count, 64)
    assert_same(stored_in(tmp_path, parts).search([1, 2, 3], queries, 5), brute_force(parts, queries, 5))


@pytest.mark.parametrize("kind", ["random", "far off"])
@pytest.mark.parametrize("dimension", [2, 8, 64, 2048])
def test_every_dimension_is_searched_exactly(dimension: int, kind: str, kernel: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(dimension)
    parts, queries = split(KINDS[kind](rng, ROWS, dimension), 2, rng), KINDS[kind](rng, 21, dimension)
    assert_same(stored_in(tmp_path, parts).search([1, 2], queries, 5), brute_force(parts, queries, 5))


@pytest.mark.parametrize("kind", ["tiny", "far off"])
def test_faiss_alone_gets_the_hard_kinds_wrong(kind: str) -> None:
    """Otherwise the tests above would prove nothing that an IndexFlatL2 does not give by itself."""
    rng = np.random.default_rng(3)
    stored, queries = KINDS[kind](rng, ROWS, 64), KINDS[kind](rng, 24, 64)
    index = faiss.IndexFlatL2(64)
    index.add(stored)
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    _, rows = index.search(queries, 5)
    faiss.cvar.distance_compute_blas_threshold = before
    expected = brute_force([(np.arange(ROWS), stored)], queries, 5)
    assert any(row.tolist() != ids.tolist() for row, (_, ids) in zip(rows, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dimension=st.integers(1, 3), rows=st.integers(1, 60), segments=st.integers(1, 4))
def test_small_whole_numbers_with_many_ties_are_searched_exactly(
    data: st.DataObject, dimension: int, rows: int, segments: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    reach = data.draw(st.integers(1, 4))
    stored, queries = (
        rng.integers(-reach, reach + 1, (count, dimension)).astype(np.float32)
        for count in (rows, data.draw(st.integers(1, 25)))
    )
    parts = split(stored, min(segments, rows), rng)
    vectors = stored_in(tmp_path_factory.mktemp("ties"), parts)
    k = data.draw(st.integers(1, rows + 3))
    found = vectors.search(range(1, len(parts) + 1), queries, k)
    expected = brute_force(parts, queries, k)
    assert [(d.tolist(), ids.tolist()) for d, ids in found] == [(d.tolist(), i.tolist()) for d, i in expected]


def test_equal_distances_are_ordered_by_id_across_segments(tmp_path: Path) -> None:
    same = np.ones((3, 4), np.float32)
    vectors = stored_in(tmp_path, [(np.array([9, 2, 5]), same), (np.array([7, 1, 8]), same)])
    ((distances, ids),) = vectors.search([1, 2], np.zeros((1, 4)), 4)
    assert (distances.tolist(), ids.tolist()) == ([2.0] * 4, [1, 2, 5, 7])


def test_only_the_named_segments_are_searched(tmp_path: Path) -> None:
    one, two = (np.array([1]), np.zeros((1, 2), np.float32)), (np.array([2]), np.ones((1, 2), np.float32))
    vectors = stored_in(tmp_path, [one, two])
    assert_same(vectors.search([2], np.zeros((1, 2)), 5), [(np.array([np.sqrt(2.0)]), np.array([2]))])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_segments_give_an_empty_answer_to_each_query(count: int, tmp_path: Path) -> None:
    found = FlatVectors(tmp_path, 4).search([], np.zeros((count, 4)), 5)
    assert [(d.dtype, d.shape, i.dtype, i.shape) for d, i in found] == [
        (np.dtype(np.float64), (0,), np.dtype(np.int64), (0,))
    ] * count


def test_no_queries_give_no_answers(tmp_path: Path) -> None:
    vectors = stored_in(tmp_path, [(np.array([1]), np.zeros((1, 4), np.float32))])
    assert vectors.search([1], np.empty((0, 4)), 5) == []


# The door


@pytest.mark.parametrize("k", [0, -1, -(10**9)])
def test_fewer_than_one_neighbour_is_refused(k: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^The number of neighbours must be at least 1, not {k}\.$"):
        FlatVectors(tmp_path, 4).search([], np.zeros((1, 4)), k)


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 1.1e18, -3e38, 1e300], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("door", ["checked", "search"])
def test_numbers_that_cannot_be_compared_are_refused(door: str, value: float, tmp_path: Path) -> None:
    """One such number among good ones: `checked` is the door of what is stored, `search` of what is asked."""
    vectors = FlatVectors(tmp_path, 4)
    array = np.ones((3, 4))
    array[1, 2] = value
    with pytest.raises(
        InputError, match=r"^Vectors must be finite numbers, with a length of at most 1e18\.$"
    ):
        vectors.checked(array) if door == "checked" else vectors.search([], array, 1)


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (1, 5), (4, 1), (1, 1, 4), (0,), (0, 3)], ids=str)
@pytest.mark.parametrize("door", ["checked", "search"])
def test_another_shape_is_refused_with_both_shapes_named(
    door: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    vectors, array = FlatVectors(tmp_path, 4), np.zeros(shape)
    with pytest.raises(InputError) as caught:
        vectors.checked(array) if door == "checked" else vectors.search([], array, 1)
    assert str(caught.value) == (
        f"Vectors must have shape (n, 4) as this gallery's model gives them, not {shape}."
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, ">f4"], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors_of_any_number_type_and_order_become_float32_rows(
    dtype: Any, order: Any, tmp_path: Path
) -> None:
    given = np.arange(12).reshape(3, 4).astype(dtype, order=order)
    checked = FlatVectors(tmp_path, 4).checked(given)
    assert (checked.dtype, checked.flags.c_contiguous) == (np.dtype(np.float32), True)
    assert checked.tolist() == np.arange(12).reshape(3, 4).tolist()


def test_the_longest_allowed_vector_is_accepted(tmp_path: Path) -> None:
    """1e18 itself, as float32 has it (slightly below)."""
    assert FlatVectors(tmp_path, 1).checked(np.array([[1e18]])).tolist() == [[float(np.float32(1e18))]]


# Files


def sample(rows: int = 50, dimension: int = 8) -> Part:
    return np.arange(100, 100 + rows), around(np.random.default_rng(4), rows, dimension)


def test_written_tells_the_files_true_size_and_sha256(tmp_path: Path) -> None:
    written = FlatVectors(tmp_path, 8).write(7, [sample(), sample(3)])
    data = (tmp_path / "00000007.faiss").read_bytes()
    assert written == Written(7, 53, len(data), hashlib.sha256(data).hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["00000007.faiss"]


def test_a_segment_is_an_idmap_over_a_flat_l2_that_faiss_itself_opens(tmp_path: Path) -> None:
    (ids, stored), (more_ids, more) = sample(), (np.array([7, 2**40]), np.eye(2, 8, dtype=np.float32))
    FlatVectors(tmp_path, 8).write(1, [(ids, stored), (more_ids, more)])
    index = faiss.read_index(os.fspath(tmp_path / "00000001.faiss"))
    flat = faiss.downcast_index(index.index)
    assert (type(index), type(flat)) == (faiss.IndexIDMap, faiss.IndexFlatL2)
    assert faiss.vector_to_array(index.id_map).tolist() == [*ids.tolist(), 7, 2**40]
    assert np.array_equal(flat.reconstruct_n(0, 52), np.concatenate([stored, more]))
    assert index.search(more, 1)[1].tolist() == [[7], [2**40]]


def faiss_bytes(parts: Sequence[Part], dimension: int) -> bytes:
    """What FAISS itself writes of these rows."""
    index = faiss.IndexIDMap(faiss.IndexFlatL2(dimension))
    for ids, stored in parts:
        index.add_with_ids(np.ascontiguousarray(stored), np.ascontiguousarray(ids))
    return bytes(faiss.serialize_index(index).tobytes())


@given(
    dimension=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 30), max_size=4),
    block=st.integers(1, 2000),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_segment_is_byte_for_byte_what_faiss_writes_whatever_its_parts_are_read_from(
    dimension: int, sizes: list[int], block: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From memory, and merged from the files of segments, whole and without some rows."""
    folder, rng = tmp_path_factory.mktemp("bytes"), np.random.default_rng(seed)
    parts = [
        (rng.integers(0, 2**62, size), rng.standard_normal((size, dimension)).astype(np.float32))
        for size in sizes
    ]
    vectors = FlatVectors(folder, dimension)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block)
        written = [vectors.write(number, [part]) for number, part in enumerate(parts)]
        whole = [vectors.stored(one.id, one.rows, one.sha256) for one in written]
        kept = [rng.random(one.rows) < 0.5 for one in written]
        some = [
            vectors.stored(one.id, one.rows, one.sha256, kept=mask)
            for one, mask in zip(written, kept, strict=True)
        ]
        more = rng.integers(0, 2**62, 3), rng.standard_normal((3, dimension)).astype(np.float32)
        merged, left = vectors.write(100, [*whole, more]), vectors.write(101, some)
    assert [vectors.path(one.id).read_bytes() for one in written] == [
        faiss_bytes([part], dimension) for part in parts
    ]
    fewer = [(ids[mask], stored[mask]) for (ids, stored), mask in zip(parts, kept, strict=True)]
    for made, expected in ((merged, [*parts, more]), (left, fewer)):
        data = vectors.path(made.id).read_bytes()
        assert data == faiss_bytes(expected, dimension)
        rows = sum(len(ids) for ids, _ in expected)
        assert made == Written(made.id, rows, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("position", [0, 40, 81, 82, 500, -400, -8, -1])
def test_a_segment_that_is_not_what_was_written_is_passed_on_to_no_other(
    position: int, tmp_path: Path
) -> None:
    vectors = FlatVectors(tmp_path, 8)
    written, path = vectors.write(1, [sample()]), vectors.path(1)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    part = vectors.stored(1, written.rows, written.sha256)
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss is not what was written; see what"):
        vectors.write(2, [part, sample(3)])
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [-500, -8, -1, 1, 5000])
def test_a_segment_of_another_length_is_passed_on_to_no_other(change: int, tmp_path: Path) -> None:
    vectors = FlatVectors(tmp_path, 8)
    written, path = vectors.write(1, [sample()]), vectors.path(1)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(change) if change > 0 else whole[:change])
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss is not what was written"):
        vectors.write(2, [vectors.stored(1, written.rows, written.sha256)])
    path.unlink()
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss is not what was written"):
        vectors.stored(1, written.rows, written.sha256)
    assert list(tmp_path.iterdir()) == []


def test_a_segment_that_goes_while_it_is_merged_is_damage_and_leaves_no_file(tmp_path: Path) -> None:
    vectors = FlatVectors(tmp_path, 8)
    written = vectors.write(1, [sample()])
    part = vectors.stored(1, written.rows, written.sha256)
    vectors.path(1).unlink()
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss is not what was written"):
        vectors.write(2, [part])
    assert list(tmp_path.iterdir()) == []


MERGE = """
import sys
from pathlib import Path
import numpy as np
from retrieval.system.memory import peak_memory
from retrieval.index.segments import FlatVectors
vectors = FlatVectors(Path(sys.argv[1]), 2048)
block = np.ones((256, 2048), np.float32)
def made(number, size):
    return vectors.write(number, [(np.arange(256), block)] * size)
segments = [made(1, 1), made(2, 1)]
vectors.write(3, [vectors.stored(one.id, one.rows, one.sha256) for one in segments])
before = peak_memory()
segments = [made(4, 16), made(5, 15)]
merged = vectors.write(6, [vectors.stored(one.id, one.rows, one.sha256) for one in segments])
print(merged.bytes, peak_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_merging_segments_takes_a_few_megabytes_however_large_they_are(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MERGE, tmp_path], capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    assert size > 62 * 2**20
    assert grown < 6 * 2**20


def test_a_segment_of_an_older_version_is_read_and_searched(tmp_path: Path) -> None:
    """They were IndexIDMap2, which differs in nothing but the first letters of the file."""
    (ids, stored), vectors = sample(), FlatVectors(tmp_path, 8)
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(8))
    index.add_with_ids(stored, ids)
    faiss.write_index(index, os.fspath(tmp_path / "00000001.faiss"))
    vectors.write(2, [(ids, stored)])
    old, new = ((tmp_path / f"0000000{number}.faiss").read_bytes() for number in (1, 2))
    assert (old[:4], new[:4], old[4:] == new[4:]) == (b"IxM2", b"IxMp", True)
    found_ids, found = vectors.rows(1)
    assert np.array_equal(found_ids, ids)
    assert np.array_equal(found, stored)
    assert_same(vectors.search([1], stored[:5], 9), brute_force([(ids, stored)], stored[:5], 9))
    (tmp_path / "00000001.faiss").write_bytes(old[:-8])
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss is damaged"):
        FlatVectors(tmp_path, 8).rows(1)


def test_rows_come_back_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    ids, stored = sample()
    vectors = FlatVectors(tmp_path, 8)
    vectors.write(1, [(ids[30:], stored[30:]), (ids[:30], stored[:30])])
    found_ids, found = vectors.rows(1)
    assert found_ids.tolist() == np.roll(ids, 20).tolist()
    assert np.array_equal(found, np.roll(stored, 20, axis=0))


def test_rows_stay_readable_after_their_segment_is_closed_and_cannot_be_written_to(tmp_path: Path) -> None:
    """Another thread may close a segment, and another process delete it, while its rows are being copied."""
    vectors, (ids, stored) = FlatVectors(tmp_path, 8), sample(20_000)
    vectors.write(1, [(ids, stored)])
    _, found = vectors.rows(1)
    tail = found[10_000:]
    vectors.forget_all_but(())
    vectors.path(1).unlink()
    del found
    assert np.array_equal(tail, stored[10_000:])
    with pytest.raises(ValueError, match="read-only"):
        tail[0, 0] = 1


@pytest.mark.parametrize("call", [lambda v: v.search([3], np.zeros((1, 8)), 1), lambda v: v.rows(3)])
def test_a_missing_file_is_a_missing_segment(call: Callable[[FlatVectors], object], tmp_path: Path) -> None:
    with pytest.raises(
        SegmentMissing, match=r"00000003\.faiss is missing; bring it back with `faceprint repair`"
    ):
        call(FlatVectors(tmp_path, 8))


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\0", b"IxM2", b"hello world\n" * 99, b"SQLite format 3\0" * 40, bytes(5000), b"\xff" * 5000],
    ids=["empty", "one zero", "head only", "text", "sqlite", "zeros", "ones"],
)
def test_a_file_of_something_else_is_damaged(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "00000001.faiss"
    path.write_bytes(garbage)
    with pytest.raises(GalleryDamaged) as caught:
        FlatVectors(tmp_path, 8).rows(1)
    assert type(caught.value) is GalleryDamaged
    assert (
        str(caught.value)
        == f"The vector file {path} is damaged; `faceprint repair` may mend it, or restore it from a backup."
    )


def test_a_file_that_was_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    """FAISS by itself crashes the process on some lengths, and accepts others with wrong ids."""
    vectors, path = FlatVectors(tmp_path, 8), tmp_path / "00000001.faiss"
    vectors.write(1, [sample()])
    whole = path.read_bytes()
    for length in [*range(200), *range(200, len(whole) - 50, 37), *range(len(whole) - 50, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(GalleryDamaged, match="is damaged"):
            vectors.rows(1)
    path.write_bytes(whole + b"\0")
    with pytest.raises(GalleryDamaged, match="is damaged"):
        vectors.rows(1)
    path.write_bytes(whole)
    assert len(vectors.rows(1)[0]) == 50


def test_a_byte_changed_in_the_structure_never_ends_in_anything_but_an_answer_or_damage(
    tmp_path: Path,
) -> None:
    """Every byte around the vectors and ids, four ways each: an error of ours, or the rows as they were."""
    vectors, path, (ids, stored) = FlatVectors(tmp_path, 8), tmp_path / "00000001.faiss", sample()
    vectors.write(1, [(ids, stored)])
    whole, refused = path.read_bytes(), 0
    heads = [*range(82), *range(82 + stored.nbytes, 90 + stored.nbytes)]
    for position in heads:
        for value in {0, 0x7F, 0x80, 0xFF} - {whole[position]}:
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            vectors.forget_all_but(())
            try:
                found_ids, found = vectors.rows(1)
            except GalleryDamaged:
                refused += 1
            else:
                assert (found_ids.tolist(), found.tolist()) == (ids.tolist(), stored.tolist())
    assert refused > len(heads)


@pytest.mark.parametrize(
    "make",
    [
        lambda: faiss.IndexFlatL2(8),
        lambda: faiss.IndexIDMap2(faiss.IndexFlatIP(8)),
        lambda: faiss.IndexIDMap2(faiss.IndexHNSWFlat(8, 4)),
    ],
    ids=["no ids", "inner product", "approximate"],
)
def test_another_kind_of_index_is_damaged(make: Callable[[], Any], tmp_path: Path) -> None:
    index, (ids, stored) = make(), sample()
    index.add(stored) if isinstance(index, faiss.IndexFlatL2) else index.add_with_ids(stored, ids)
    faiss.write_index(index, os.fspath(tmp_path / "00000001.faiss"))
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss is damaged; `faceprint repair` may mend it"):
        FlatVectors(tmp_path, 8).search([1], stored[:1], 1)


def test_a_segment_of_another_dimension_is_damaged(tmp_path: Path) -> None:
    FlatVectors(tmp_path, 8).write(1, [sample()])
    with pytest.raises(GalleryDamaged, match=r"00000001\.faiss has other dimensions than the gallery"):
        FlatVectors(tmp_path, 16).rows(1)


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_refuses_leaves_no_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, fail_with(number))
    with pytest.raises(StorageError) as caught:
        FlatVectors(tmp_path, 8).write(1, [sample()])
    assert str(caught.value) == f"Vectors cannot be written to {tmp_path}: {os.strerror(number).lower()}."
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second fsync is the folder's: the file has its final name by then."""
    real, calls = os.fsync, []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(StorageError, match="input/output error"):
        FlatVectors(tmp_path, 8).write(1, [sample()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
@pytest.mark.parametrize("rows", [1, 3_000], ids=["buffered", "larger than any buffer"])
def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_no_file(rows: int, tmp_path: Path) -> None:
    """A real limit of the operating system, which FAISS's own writer runs into."""
    import resource

    vectors, part = FlatVectors(tmp_path, 8), sample(rows)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(StorageError, match="file too large"):
            vectors.write(1, [part])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    vectors = FlatVectors(tmp_path / "gone", 8)
    with pytest.raises(StorageError, match=r"cannot be written to .*gone: no such file or directory"):
        vectors.write(1, [sample()])


def test_a_removed_segment_is_missing_even_for_whom_it_was_open(tmp_path: Path) -> None:
    vectors = stored_in(tmp_path, [sample()] * 2)
    vectors.search([1, 2], np.zeros((1, 8)), 1)
    vectors.forget_all_but([2])
    vectors.path(1).unlink()
    with pytest.raises(SegmentMissing):
        vectors.search([1], np.zeros((1, 8)), 1)
    assert len(vectors.search([2], np.zeros((1, 8)), 1)) == 1


def test_an_open_segment_answers_after_its_file_was_deleted_by_another_process(tmp_path: Path) -> None:
    vectors = stored_in(tmp_path, [sample()])
    before = vectors.search([1], np.zeros((1, 8)), 5)
    vectors.path(1).unlink()
    assert_same(vectors.search([1], np.zeros((1, 8)), 5), before)


def test_segments_may_be_opened_and_closed_by_many_threads_at_once(tmp_path: Path) -> None:
    """Half of the threads search, the other half close what the first have open."""
    parts = [(np.array([number]), np.full((1, 2), number, np.float32)) for number in range(1, 41)]
    vectors, queries = stored_in(tmp_path, parts), np.zeros((1, 2), np.float32)
    errors: list[BaseException] = []
    searching = threading.Event()
    searching.set()

    def search(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            named = sorted(rng.choice(np.arange(1, 41), 20, replace=False).tolist())
            assert vectors.search(named, queries, 20)[0][1].tolist() == named

    def close(seed: int) -> None:
        while searching.is_set():
            vectors.forget_all_but(range(seed, 41, 7))

    def run(work: Callable[[int], None], seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        searchers, closers = (
            [threading.Thread(target=run, args=(work, seed)) for seed in range(3)] for work in (search, close)
        )
        for thread in [*searchers, *closers]:
            thread.start()
        for thread in searchers:
            thread.join()
        searching.clear()
        for thread in closers:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert errors == []
