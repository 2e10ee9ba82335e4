"""Direct searches: when one scan of the codes is enough, and what then."""

from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator

from retrieval.index import direct, knn
from retrieval.index.blocks import Block, selections
from retrieval.index.candidates import Exclude, QueryBatch
from retrieval.index.explanation import Explanation
from retrieval.index.filter import Filter
from retrieval.index.segments import Vectors
from tests.index.test_knn import ALL_KINDS, blocks_of, expected
from tests.index.test_segments import Answer, Part, assert_same

DIMENSION = 128


def in_six_dimensions(rng: Generator, rows: int) -> Vectors:
    """Vectors that codes tell apart."""
    axes = np.random.default_rng(11).standard_normal((6, DIMENSION))
    return (rng.standard_normal((rows, 6)) @ axes).astype(np.float32)


def parts_of(vectors: Vectors, *sizes: int) -> list[Part]:
    ids = np.random.default_rng(3).permutation(10 * len(vectors))[: len(vectors)]
    cuts = np.cumsum(sizes)[:-1]
    return list(zip(np.split(ids, cuts), np.split(vectors, cuts), strict=True))


def found_directly(
    blocks: list[Block], queries: Vectors, k: int, exclude: Exclude, took: Explanation
) -> list[Answer] | None:
    batch = QueryBatch(queries, exclude, k=k, radius=np.inf, explanation=took)
    return direct.answers(batch, list(selections(blocks, None)), Filter(batch))


@pytest.mark.parametrize("k", [1, 10, 100])
def test_blocks_of_different_sizes_are_scanned_once_for_many_neighbours(k: int, tmp_path: Path) -> None:
    """The largest block has most of the neighbours: as many of each block made a second scan necessary."""
    rng = np.random.default_rng(1)
    parts = parts_of(in_six_dimensions(rng, 4000), 3500, 500)
    blocks, queries, took = blocks_of(parts, tmp_path, [0]), in_six_dimensions(rng, 5), Explanation()
    for query in queries:
        found = knn.nearest(blocks, query[None], k, explanation=took)
        assert_same(found, expected(parts, query[None], k))
    assert took.coded_rows == 5 * 4000


@pytest.mark.parametrize("number", [1, 2, direct.MAX_QUERIES])
def test_excluded_ids_are_replaced_by_the_next(number: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = parts_of(in_six_dimensions(rng, 4000), 2500, 1500)
    blocks, queries, took = (
        blocks_of(parts, tmp_path, [0, 1]),
        in_six_dimensions(rng, number),
        Explanation(),
    )
    exclude = [tuple(ids[:3].tolist()) for _, ids in expected(parts, queries, 3)]
    found = found_directly(blocks, queries, 4, exclude, took)
    assert found is not None
    assert_same(found, expected(parts, queries, 4, exclude=exclude))
    assert (took.coded_rows, took.scanned_rows) == (number * 4000, 0)


def test_another_search_has_to_find_what_the_bound_does_not_exclude(tmp_path: Path) -> None:
    """The distances of random vectors hardly differ, so their codes exclude none."""
    rng = np.random.default_rng(4)
    parts = parts_of(ALL_KINDS["random"](rng, 600, DIMENSION), 600)
    blocks, queries = blocks_of(parts, tmp_path, [0]), ALL_KINDS["random"](rng, 1, DIMENSION)
    assert found_directly(blocks, queries, 5, None, Explanation()) is None
    assert_same(knn.nearest(blocks, queries, 5), expected(parts, queries, 5))


def test_more_queries_or_pairs_than_pay_off_are_left_to_another_search(tmp_path: Path) -> None:
    rng, took = np.random.default_rng(5), Explanation()
    vectors = in_six_dimensions(rng, 600)
    blocks = blocks_of(parts_of(vectors, 600), tmp_path, [0])
    few = vectors[: direct.MAX_QUERIES]
    assert len(few) * len(vectors) * DIMENSION > direct.COMPARED_DIRECTLY
    assert found_directly(blocks, few, len(vectors), None, took) is None
    assert found_directly(blocks, vectors[: direct.MAX_QUERIES + 1], 1, None, took) is None
    assert (took.coded_rows, took.candidates) == (0, 0)
