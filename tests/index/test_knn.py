"""knn: whatever codes, blocks and company a query has, its answer is that of a float64 brute force."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray

from retrieval.index import filter as filtering
from retrieval.index import knn, products, quantization, refine
from retrieval.index.blocks import Numbering, selections
from retrieval.index.candidates import Near, QueryBatch
from retrieval.index.filter import Filter
from retrieval.index.kernels import CACHED_BYTES, pairwise_squares
from retrieval.index.knn import Block, Explanation
from retrieval.index.quantization import Basis, Coded
from retrieval.index.refine import Refiner
from retrieval.index.segments import Ids, Vectors
from tests.index.test_segments import KINDS, Answer, Part, around, assert_same, brute_force, scaled, split

ROWS, DIMENSION = 96, 128


COUNTS = (1, 5, ROWS - 1, ROWS, ROWS + 10)

Number = int | None


def low_rank(rng: Generator, rows: int, dimension: int) -> Vectors:
    """Tight groups in twelve dimensions of many, the same groups every time."""
    fixed = np.random.default_rng(11)
    groups, axes = fixed.standard_normal((20, 12)), fixed.standard_normal((12, dimension))
    places = groups[rng.integers(0, 20, rows)] + 0.05 * rng.standard_normal((rows, 12))
    return (places @ axes + 0.002 * rng.standard_normal((rows, dimension))).astype(np.float32)


def one_identity(rng: Generator, rows: int, dimension: int) -> Vectors:
    """Photos of one person: a direction, and a little of everything."""
    centre = around(np.random.default_rng(12), 1, dimension)
    return (centre + 0.05 * around(rng, rows, dimension)).astype(np.float32)


def one_outlier(rng: Generator, rows: int, dimension: int) -> Vectors:
    """One vector is a million times as long as the others."""
    vectors = around(rng, rows, dimension)
    vectors[rng.integers(0, rows)] *= 1e6
    return vectors


ALL_KINDS: dict[str, Callable[[Generator, int, int], Vectors]] = {
    **KINDS,
    "low rank": low_rank,
    "one identity": one_identity,
    "one outlier": one_outlier,
}

# Blocks, and which of them has codes in which basis.
LAYOUTS: dict[str, tuple[int, Sequence[Number]]] = {
    "one block": (1, [0]),
    "six blocks": (6, [0]),
    "codes here and there": (6, [0, None]),
    "two bases": (6, [0, 1, None]),
    "no codes": (6, [None]),
}


def any_basis(stored: Vectors, seed: int = 0) -> Basis:
    """What is learned from vectors; where codes do not pay or nothing varies, some basis all the same."""
    return _learned(stored.tobytes(), stored.shape, seed)


@cache
def _learned(data: bytes, shape: tuple[int, int], seed: int) -> Basis:
    """Learning takes most of the time of these tests, and many of them search the same vectors."""
    stored: Vectors = np.frombuffer(data, np.float32).reshape(shape)
    learned = quantization.learn(stored, seed=seed).basis
    if learned is not None:
        return learned
    rng, mean = np.random.default_rng(seed), stored.mean(axis=0, dtype=np.float64)
    principal = np.linalg.qr(rng.standard_normal((stored.shape[1], 63)))[0].T
    found = quantization._basis((stored - mean).astype(np.float32), mean, principal, rng)
    return grid(64, stored.shape[1]) if found is None else found


def grid(coordinates: int, dimension: int) -> Basis:
    """The first axes of the space themselves, from -127.5 to 127.5."""
    axes = np.eye(coordinates - 1, dimension)
    return Basis(np.zeros(dimension), axes, np.full(coordinates, -127.5), 1.0)


def coded(basis: Basis, stored: Vectors, path: Path) -> Coded:
    made, errors = basis.encode(stored)
    written = quantization.write(path, made, errors)
    return quantization.read(path, basis, len(stored), written.error)


def blocks_of(parts: Sequence[Part], folder: Path, layout: Sequence[Number]) -> list[Block]:
    """Blocks whose codes are in the bases that a layout says, in turn; None is a block without."""
    everything, names = np.concatenate([vectors for _, vectors in parts]), count()
    learners = [
        lambda: any_basis(everything),
        lambda: any_basis(everything[: (len(everything) + 1) // 2], seed=7),
    ]
    blocks = []
    for number, (ids, vectors) in enumerate(parts):
        basis, own = layout[number % len(layout)], None
        if basis is not None:
            own = coded(learners[basis](), vectors, folder / f"{next(names)}.codes")
        blocks.append(Block(ids, np.ascontiguousarray(vectors), own))
    return blocks


def expected(
    parts: Sequence[Part],
    queries: Vectors,
    k: int,
    allowed: Ids | None = None,
    exclude: knn.Exclude = None,
) -> list[Answer]:
    """Brute force over what may be an answer."""
    answers: list[Answer] = []
    for query, out in zip(queries, exclude or [()] * len(queries), strict=True):
        stay = [~np.isin(ids, out) & (True if allowed is None else np.isin(ids, allowed)) for ids, _ in parts]
        some = [(ids[kept], vectors[kept]) for (ids, vectors), kept in zip(parts, stay, strict=True)]
        answers += brute_force(some, query[None], k)
    return answers


def bits(found: Sequence[Answer]) -> list[tuple[bytes, bytes]]:
    return [(distances.tobytes(), ids.tobytes()) for distances, ids in found]


def made(kind: str, layout: str, folder: Path, *, seed: int = 1) -> tuple[list[Part], list[Block], Vectors]:
    """Parts, blocks of them, and forty queries of which every other one is stored."""
    rng, (segments, bases) = np.random.default_rng(seed), LAYOUTS[layout]
    parts = split(ALL_KINDS[kind](rng, ROWS, DIMENSION), segments, rng)
    queries = ALL_KINDS[kind](rng, 40, DIMENSION)
    queries[::2] = np.concatenate([vectors for _, vectors in parts])[rng.integers(0, ROWS, 20)]
    return parts, blocks_of(parts, folder, bases), queries


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("kind", list(ALL_KINDS))
def test_the_nearest_are_those_of_a_float64_brute_force(kind: str, layout: str, tmp_path: Path) -> None:
    """Few queries go by FAISS through the codes, many by a product, and k may be more than there are rows."""
    parts, blocks, queries = made(kind, layout, tmp_path)
    true = brute_force(parts, queries, ROWS + 10)
    for number, ks in ((1, COUNTS), (3, (1, ROWS)), (9, COUNTS), (40, (5, ROWS + 10))):
        for k in ks:
            found = knn.nearest(blocks, queries[-number:], k)
            assert_same(found, [(distances[:k], ids[:k]) for distances, ids in true[-number:]])


@pytest.fixture(params=[1 / 8, 1 / 2, 100])
def few_chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a search choose so few rows first that it must look again, and hold fewer than it finds.

    The share of rows at which it scans all decides whether it often does, sometimes, or never. All is handed
    over to threads.
    """
    for name, value in (
        ("CHOSEN_PER_NEIGHBOUR", 1),
        ("LEAST_CHOSEN", 1),
        ("_SAMPLE_SHARE", 4),
        ("_SAMPLE_ROWS", (4, 64)),
        ("_SAMPLE_RANK", 0),
        ("SCANNED_ROWS", 3),
        ("_MAX_HELD", 1),
        ("MIN_CANDIDATES", 4),
        ("MAX_CANDIDATE_SHARE", request.param),
        ("MAX_CANDIDATE_SHARE_OF_FEW", request.param),
        ("_CACHED_PRODUCTS", 64),
        ("_CHUNK_ROWS", (5, 11)),
        ("SCANNED_ALONE", 0),
    ):
        monkeypatch.setattr(filtering, name, value)
    monkeypatch.setattr(refine, "COMPARED_ALONE", 0)


@pytest.mark.usefixtures("few_chosen")
@pytest.mark.parametrize("layout", ["one block", "codes here and there", "two bases"])
@pytest.mark.parametrize("kind", list(ALL_KINDS))
def test_the_nearest_are_found_where_those_with_the_lowest_bounds_are_not_enough(
    kind: str, layout: str, tmp_path: Path
) -> None:
    parts, blocks, queries = made(kind, layout, tmp_path)
    true = brute_force(parts, queries, ROWS + 10)
    half = np.sort(np.concatenate([ids for ids, _ in parts]))[::2]
    for number in (1, 2, 9, 40):
        for k in (1, 5, ROWS + 10):
            found = knn.nearest(blocks, queries[-number:], k)
            assert_same(found, [(distances[:k], ids[:k]) for distances, ids in true[-number:]])
        found = knn.nearest(blocks, queries[-number:], 3, allowed=half)
        assert_same(found, expected(parts, queries[-number:], 3, half))


def test_a_limit_of_chosen_rows_only_falls() -> None:
    """Also where a thread brings rows that it found by an earlier, larger limit."""
    most = np.array([5, 100])
    query = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    square = np.array([4, 9, 8, 7, 30, 10, 20, 20])
    found = Near(query, np.arange(8), np.zeros(8), square)
    kept = filtering._least(found, most, 3)
    assert most.tolist() == [5, 20]
    assert kept.row.tolist() == [0, 5, 6, 7]
    # More rows than are wanted, all equally far: none of them.
    crowd = Near(np.zeros(4, np.int64), np.arange(4), np.zeros(4), np.full(4, 3))
    assert len(filtering._least(crowd, most, 3).row) == 0
    assert most.tolist() == [2, 20]


@pytest.mark.parametrize("layout", ["one block", "two bases"])
@pytest.mark.parametrize("kind", list(ALL_KINDS))
def test_everything_within_a_radius_is_found_and_nothing_else(kind: str, layout: str, tmp_path: Path) -> None:
    """The radius itself is within: it is a distance that was computed, or 0, or one between two of them."""
    parts, blocks, queries = made(kind, layout, tmp_path)
    true = brute_force(parts, queries, ROWS)
    known = knn.nearest(blocks, queries, ROWS)
    assert_same(known, true)
    for number in (1, 9):
        for place in (4, ROWS // 2):
            radius = float(known[-1][0][place])
            for reach in (0.0, radius, float(np.nextafter(radius, 0)), 1.5 * radius):
                found = knn.within(blocks, queries[-number:], reach)
                cuts = [int(np.searchsorted(distances, reach, side="right")) for distances, _ in known]
                wanted = [(d[:cut], ids[:cut]) for (d, ids), cut in zip(known, cuts, strict=True)]
                assert bits(found) == bits(wanted[-number:])


@pytest.mark.parametrize("share", ["nobody", "one", "half", "others only", "everybody"])
@pytest.mark.parametrize("layout", ["one block", "two bases"])
@pytest.mark.parametrize("kind", ["low rank", "duplicates", "far off"])
def test_only_allowed_rows_that_are_not_excluded_are_answers(
    kind: str, layout: str, share: str, tmp_path: Path
) -> None:
    parts, blocks, queries = made(kind, layout, tmp_path)
    rng, ids = np.random.default_rng(4), np.sort(np.concatenate([ids for ids, _ in parts]))
    allowed = {
        "nobody": ids[:0],
        "one": ids[100:101],
        "half": np.sort(rng.choice(ids, ROWS // 2, replace=False)),
        "others only": np.setdiff1d(np.arange(50), ids),
        "everybody": ids,
    }[share]
    found_ids = [found for _, found in brute_force(parts, queries, 3)]
    nearest = [(int(found[0]),) for found in found_ids]
    mixed = [tuple(map(int, found[: row % 4])) for row, found in enumerate(found_ids)]
    for number in (1, 9):
        some = queries[-number:]
        for exclude in (None, nearest[-number:], mixed[-number:]):
            for k in (1, 5):
                true = expected(parts, some, k, allowed, exclude)
                assert_same(knn.nearest(blocks, some, k, allowed=allowed, exclude=exclude), true)
                reach = max((float(d[-1]) for d, _ in true if len(d)), default=1.0) * (1 + 1e-9)
                whole = expected(parts, some, ROWS, allowed, exclude)
                wanted = [(d[d <= reach], found[d <= reach]) for d, found in whole]
                within = knn.within(blocks, some, reach, allowed=allowed, exclude=exclude)
                assert_same(within, wanted)


@pytest.mark.parametrize("layout", ["one block", "two bases"])
@pytest.mark.parametrize("kind", list(ALL_KINDS))
def test_a_query_has_the_same_bits_of_an_answer_alone_and_in_company(
    kind: str, layout: str, tmp_path: Path
) -> None:
    parts, blocks, queries = made(kind, layout, tmp_path)
    for ask in (partial(knn.nearest, blocks, k=7), partial(knn.within, blocks, radius=3.0)):
        together = bits(ask(queries=queries))
        assert [bits(ask(queries=query[None]))[0] for query in queries] == together
        assert bits(ask(queries=queries[::-1].copy()))[::-1] == together
        # More than are asked at once, and through other blocks.
        assert bits(ask(queries=np.tile(queries, (8, 1)))) == together * 8
    bare = [Block(np.concatenate([i for i, _ in parts]), np.concatenate([v for _, v in parts]))]
    assert bits(knn.nearest(bare, queries, 7)) == bits(knn.nearest(blocks, queries, 7))


@pytest.mark.parametrize("layout", ["one block", "two bases"])
@pytest.mark.parametrize("factor", [0.0, 1e3, 1e8, 1e15])
@pytest.mark.parametrize("kind", ["random", "low rank", "one identity", "tiny"])
def test_queries_far_outside_of_the_data_are_answered_exactly(
    kind: str, factor: float, layout: str, tmp_path: Path
) -> None:
    """Their codes are clipped, and the error of a place grows with its length."""
    parts, blocks, queries = made(kind, layout, tmp_path)
    far = (queries * np.float32(factor)).astype(np.float32)
    for number in (1, 9):
        for k in (1, ROWS):
            found = knn.nearest(blocks, far[-number:], k)
            # So far away many rows are equally far in float64, and the order is that of its rounding.
            for (distances, ids), (true, _) in zip(found, brute_force(parts, far[-number:], k), strict=True):
                np.testing.assert_allclose(distances, true, rtol=1e-9, atol=0)
                assert len(set(ids.tolist())) == len(ids) == k
        assert bits(knn.nearest(blocks, far[-number:], 5)) == bits(bare_nearest(parts, far[-number:], 5))


def bare_nearest(parts: Sequence[Part], queries: Vectors, k: int) -> list[Answer]:
    """What blocks give that have no codes, every row of them looked at."""
    rows = sum(len(ids) for ids, _ in parts)
    whole = knn.nearest([Block(ids, np.ascontiguousarray(v)) for ids, v in parts], queries, rows)
    return [(distances[:k], ids[:k]) for distances, ids in whole]


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(), rows=st.integers(1, 80), reach=st.integers(1, 3), layout=st.sampled_from(list(LAYOUTS))
)
def test_small_whole_numbers_with_many_ties_are_ordered_by_id(
    data: st.DataObject, rows: int, reach: int, layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    stored, queries = (
        np.zeros((number, 64), np.float32) for number in (rows, data.draw(st.sampled_from([1, 2, 9, 20])))
    )
    for some in (stored, queries):
        some[:, :3] = rng.integers(-reach, reach + 1, (len(some), 3))
    segments, bases = LAYOUTS[layout]
    parts = split(stored, min(segments, rows), rng)
    blocks = blocks_of(parts, tmp_path_factory.mktemp("ties"), bases)
    k = data.draw(st.integers(1, rows + 3))
    true = [(d.tolist(), ids.tolist()) for d, ids in brute_force(parts, queries, k)]
    assert [(d.tolist(), ids.tolist()) for d, ids in knn.nearest(blocks, queries, k)] == true
    near = [([d for d in ds if d <= reach], ids[: sum(d <= reach for d in ds)]) for ds, ids in true]
    found = [(d.tolist()[:k], ids.tolist()[:k]) for d, ids in knn.within(blocks, queries, reach)]
    assert found == near


# The bound


def basis_of(kind: str) -> Basis:
    """What is learned from vectors of a kind, when it is wanted first."""
    if kind == "a grid of ones":
        return grid(128, 128)
    return any_basis(ALL_KINDS[kind](np.random.default_rng(8), 400, 128))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([*ALL_KINDS, "a grid of ones"]),
    shapes=st.tuples(st.sampled_from(list(ALL_KINDS)), st.sampled_from(list(ALL_KINDS))),
    scales=st.tuples(st.integers(-30, 16), st.integers(-30, 16), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_no_bound_exceeds_its_distance(
    kind: str, shapes: tuple[str, str], scales: tuple[int, int, bool], seed: int
) -> None:
    """Whatever was learned from, and however odd the vectors: the step times the root less both errors."""
    rng, basis = np.random.default_rng(seed), basis_of(kind)
    one, other = (within_reach(ALL_KINDS[shape](rng, 8, 128)) for shape in shapes)
    if scales[2]:
        one, other = (
            within_reach(v * np.float32(10.0**s)) for v, s in zip((one, other), scales[:2], strict=True)
        )
    (ones, one_errors), (others, other_errors) = basis.encode(one), basis.encode(other)
    between = ones[:, None].astype(np.int64) - others[None].astype(np.int64)
    differences = one[:, None].astype(np.longdouble) - other[None].astype(np.longdouble)
    true = np.sqrt((differences**2).sum(axis=2))
    reach = basis.step * np.sqrt((between**2).sum(axis=2)) * (1 - 1e-12)
    assert (reach - (one_errors[:, None] + other_errors) * (1 + 1e-12) <= true).all()


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.tuples(st.sampled_from(list(ALL_KINDS)), st.sampled_from(list(ALL_KINDS))),
    scale=st.integers(-30, 16),
    queries=st.sampled_from([1, 8, 20]),
    seed=st.integers(0, 2**32),
)
def test_a_distance_lies_between_the_bounds_of_its_float32_comparison(
    shapes: tuple[str, str], scale: int, queries: int, seed: int
) -> None:
    """Of a product as of differences, by whatever kernel, for vectors as long and as close as may be."""
    rng = np.random.default_rng(seed)
    stored, asked = (
        within_reach(ALL_KINDS[shape](rng, rows, 128) * np.float32(10.0**scale))
        for shape, rows in zip(shapes, (8, queries), strict=True)
    )
    asked[0] = stored[0]
    (selection,) = selections([Block(np.arange(8), stored)], None)
    batch = QueryBatch(asked, None, k=1, radius=np.inf, explanation=Explanation())
    scan, refiner = Filter(batch), Refiner(batch, Numbering([selection.block]))
    differences = asked[:, None].astype(np.longdouble) - stored.astype(np.longdouble)
    true = np.sqrt((differences**2).sum(axis=2)).ravel()
    query, row = np.divmod(np.arange(8 * queries), 8)

    every = np.arange(queries)
    squares = scan._vector_squares(selection, every).astype(np.float64)
    assert (scan._upper_bound(squares.ravel(), query) >= true).all()
    slack = scan._rounding(every, batch.lengths + true.reshape(queries, 8).max(axis=1).astype(np.float64))
    assert (squares - slack[:, None] <= (true**2).reshape(queries, 8)).all()

    compared = refiner._compare(query, row)
    assert (compared.lower <= true).all()
    assert (compared.upper >= true).all()


def within_reach(vectors: Vectors) -> Vectors:
    """Vectors no longer than the door of a gallery lets through."""
    wide = np.nan_to_num(vectors.astype(np.float64), posinf=1e17, neginf=-1e17)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide * np.minimum(1, 0.99e18 / np.maximum(lengths, 1e-30))).astype(np.float32)


@pytest.mark.parametrize("coordinates", quantization.CHOICES)
def test_distances_between_codes_are_the_same_whole_numbers_by_every_kernel(
    coordinates: int, tmp_path: Path
) -> None:
    """Also between the corners of the grid, where they are largest."""
    rng = np.random.default_rng(coordinates)
    some: NDArray[np.uint8] = rng.integers(0, 256, (61, coordinates)).astype(np.uint8)
    some[0], some[1], some[2] = 0, 255, np.arange(coordinates) % 2 * 255
    some[3:20] = rng.choice(np.array([0, 127, 128, 255], np.uint8), (17, coordinates))
    quantization.write(tmp_path / "codes", some, np.zeros(61))
    read = quantization.read(tmp_path / "codes", grid(coordinates, 256), 61, 0.0)
    assert np.array_equal(read.codes, some)
    wide = some.astype(np.int64)
    true = ((wide[:, None] - wide) ** 2).sum(axis=2)
    assert true.max() == 255**2 * coordinates
    assert np.array_equal(read.lengths, ((wide - 128) ** 2).sum(axis=1))
    for number in (1, 2, 8, 19, 21, 61):
        squares, rows = read.index.search(some[:number].astype(np.float32), 61)
        assert np.array_equal(squares, np.sort(true[:number], axis=1))
        assert np.array_equal(true[np.arange(number)[:, None], rows], squares)
        moved = np.ascontiguousarray((wide[:number] - 128).T).astype(np.int8)
        for found in (products.products(some, moved), *by_both_graphs(some, moved)):
            assert (found.dtype, found.tolist()) == (np.int32, (wide @ moved.astype(np.int64)).tolist())


def by_both_graphs(codes: NDArray[np.uint8], queries: NDArray[np.int8]) -> list[NDArray[np.int32]]:
    """Products in float32, and in bytes where this CPU multiplies them exactly."""
    graphs = [products._IN_FLOATS]
    if products._is_exact(products._opened(products._IN_BYTES)):
        graphs.append(products._IN_BYTES)
    opened = map(products._opened, graphs)
    return [session.run(None, {"codes": codes, "queries": queries})[0] for session in opened]


def test_products_that_overflow_are_noticed() -> None:
    """As sums of two products in 16 bits do, on CPUs without instructions for bytes."""

    class Saturating:
        def run(self, _: None, inputs: dict[str, NDArray[np.int8]]) -> list[NDArray[np.int64]]:
            codes, queries = (inputs[name].astype(np.int64) for name in ("codes", "queries"))
            pairs = codes[:, ::2, None] * queries[None, ::2] + codes[:, 1::2, None] * queries[None, 1::2]
            return [pairs.clip(-(2**15), 2**15 - 1).sum(axis=1)]

    assert not products._is_exact(Saturating())


# What it takes


@pytest.mark.parametrize("queries", [1, 8, 9, 64])
def test_codes_rule_most_rows_out_where_vectors_have_few_dimensions(queries: int, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(5), 4000
    axes = rng.standard_normal((6, 256))
    parts = split((rng.standard_normal((rows, 6)) @ axes).astype(np.float32), 3, rng)
    stored = np.concatenate([vectors for _, vectors in parts])
    basis = quantization.learn(stored).basis
    assert basis is not None
    blocks = [
        Block(ids, vectors.copy(), coded(basis, vectors, tmp_path / str(number)))
        for number, (ids, vectors) in enumerate(parts)
    ]
    asked, took = (rng.standard_normal((queries, 6)) @ axes).astype(np.float32), Explanation()
    assert_same(knn.nearest(blocks, asked, 5, explanation=took), brute_force(parts, asked, 5))
    assert (took.method, took.queries, took.rows, took.scanned_rows) == ("bound", queries, rows, 0)
    assert took.coded_rows >= queries * rows
    assert 5 * queries <= took.candidates < 0.05 * rows * queries
    assert took.bytes_read < stored.nbytes * (1 if queries == 1 else queries)
    assert set(took.seconds) == {"filter", "refine"}


def test_codes_that_rule_nothing_out_are_not_worth_learning() -> None:
    """In 512 dimensions that all vary alike, all are equally far from each other."""
    learned = quantization.learn(around(np.random.default_rng(6), 400, 512))
    assert learned.basis is None
    assert [trial.coordinates for trial in learned.trials] == list(quantization.CHOICES)
    assert all(trial.cost >= 0.7 * learned.scan_cost and 0 <= trial.left <= 1 for trial in learned.trials)


def test_blocks_without_codes_are_scanned(tmp_path: Path) -> None:
    _, blocks, queries = made("random", "no codes", tmp_path)
    took = Explanation()
    knn.nearest(blocks, queries[:9], 5, explanation=took)
    assert (took.method, took.rows, took.coded_rows) == ("scan", ROWS, 0)
    assert took.scanned_rows >= 9 * ROWS


@pytest.mark.parametrize("number", [0, 1, 9])
@pytest.mark.parametrize("blocks", [[], [Block(np.empty(0, np.int64), np.empty((0, 8), np.float32))]])
def test_where_there_is_nothing_each_answer_is_empty(blocks: list[Block], number: int) -> None:
    queries, took = np.zeros((number, 8), np.float32), Explanation()
    for found in (knn.nearest(blocks, queries, 3, explanation=took), knn.within(blocks, queries, 3.0)):
        assert [(d.tolist(), ids.tolist()) for d, ids in found] == [([], [])] * number
    assert (took.method, took.rows) == ("nothing to search", 0)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("radius", [1e18, 1e30, 1e160, 1e300])
def test_within_any_distance_that_is_a_number_are_all(radius: float, layout: str, tmp_path: Path) -> None:
    parts, blocks, queries = made("random", layout, tmp_path)
    for number in (1, 9):
        found = knn.within(blocks, queries[:number], radius)
        assert_same(found, brute_force(parts, queries[:number], ROWS))


def test_vectors_of_the_greatest_length_along_one_axis_are_learned_from() -> None:
    """The sum of their squares is beyond float32."""
    stored = scaled(1e15)(np.random.default_rng(9), 2000, 128)
    stored[:, 0] = np.where(np.arange(2000) % 2, 0.99e18, -0.99e18)
    learned = quantization.learn(stored)
    assert learned.scan_cost > 0


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dimension", [3, 2048])
def test_squares_of_rows_that_no_cache_holds_are_those_of_each_pair(number: int, dimension: int) -> None:
    rng = np.random.default_rng(number)
    rows = 2 * (CACHED_BYTES // (4 * dimension)) + 5
    stored = rng.standard_normal((rows, dimension), np.float32)
    queries = rng.standard_normal((number, dimension), np.float32)
    found = pairwise_squares(queries, stored)
    exact = stored.astype(np.float64)
    for query, squares in zip(queries.astype(np.float64), found, strict=True):
        np.testing.assert_allclose(squares, ((exact - query) ** 2).sum(axis=1), rtol=1e-4, atol=1e-4)
