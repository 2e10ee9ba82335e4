"""Vectors that were made elsewhere come in, with what is known of their photos; and the other way round."""

import dataclasses
import hashlib
import os
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Status
from retrieval.errors import InputError, ModelMismatch, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.transfer.export import export
from retrieval.transfer.vector_files import count_embeddings, read_embeddings, write_embeddings
from tests.transfer.numbered_faces import D, contents, digest_of, disk_that_takes, face, said, vector_of


def read(path: Path, gallery: Gallery, **options: Any) -> list[tuple[NewFace, bytes]]:
    """All rows of a file of embeddings."""
    options = {"trusted": True, **options}
    found = read_embeddings(
        path, fingerprint=gallery.bundle.fingerprint, dimension=gallery.bundle.dimension, **options
    )
    batches = list(found)
    assert all(vectors.dtype == np.float32 and vectors.flags.c_contiguous for _, vectors in batches)
    return [
        (face, vector.tobytes())
        for faces, vectors in batches
        for face, vector in zip(faces, vectors, strict=True)
    ]


def offered(count: int) -> list[tuple[NewFace, bytes]]:
    return [(face(number), vector_of(number).tobytes()) for number in range(count)]


def table_of(count: int, kind: Any = None, **columns: Any) -> pa.Table:
    """Vectors as another program would write them."""
    vectors = [vector_of(number) for number in range(count)]
    return pa.table(
        {"vector": pa.array([list(v) for v in vectors], kind or pa.list_(pa.float32())), **columns}
    )


@pytest.mark.parametrize("size", [1, 4, 8192])
def test_written_embeddings_are_read_and_enrolled_as_they_were(
    gallery: Gallery, tmp_path: Path, size: int
) -> None:
    """In blocks of any size; the file itself says which model made them."""
    path, count = tmp_path / "e.parquet", 11
    batches = [
        ([face(n) for n in part], np.stack([vector_of(n) for n in part]))
        for part in (range(5), range(5, count))
    ]
    model = {"fingerprint": gallery.bundle.fingerprint, "dimension": D}
    assert write_embeddings(path, batches, **model) == count_embeddings(path) == count
    assert read(path, gallery, trusted=False, size=size) == offered(count)
    for faces, vectors in read_embeddings(path, **model, trusted=False, size=size):
        assert {one.status for one in gallery.enroll_vectors(faces, vectors)} == {Status.ENROLLED}
    assert contents(gallery) == {
        (f.sha256, f.identity, (f.path,), vector) for f, vector in offered(count) if f.path is not None
    }


def test_an_exports_own_file_can_be_read_as_embeddings(people: Gallery, tmp_path: Path) -> None:
    """Of several paths the first is taken."""
    export(people.vault, tmp_path / "out")
    found = read(tmp_path / "out" / "faces-00000.parquet", people, trusted=False)
    assert {(f.sha256, f.identity, f.path, vector) for f, vector in found} == {
        (sha256, identity, paths[0] if paths else None, vector)
        for sha256, identity, paths, vector in contents(people)
    }


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), D),
        pa.list_(pa.float64(), D),
    ],
    ids=str,
)
def test_lists_of_floats_of_any_kind_are_read(gallery: Gallery, tmp_path: Path, kind: Any) -> None:
    """Without a SHA-256 a row has that of its float32 numbers, no identity and no path."""
    pq.write_table(table_of(9, kind), tmp_path / "e.parquet", row_group_size=4)
    assert read(tmp_path / "e.parquet", gallery, size=3) == [
        (NewFace(None, None, hashlib.sha256(vector).hexdigest()), vector) for _, vector in offered(9)
    ]


def test_half_precision_is_read(gallery: Gallery, tmp_path: Path) -> None:
    """Each number becomes the same number in float32."""
    halves = np.random.default_rng(0).standard_normal((5, D)).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(halves.reshape(-1)), D)
    pq.write_table(pa.table({"vector": column}), tmp_path / "e.parquet")
    vectors = [vector for _, vector in read(tmp_path / "e.parquet", gallery)]
    assert vectors == [row.astype(np.float32).tobytes() for row in halves]


def test_what_is_null_or_empty_is_not_there(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths begin here, names are composed, digests may be in capitals."""
    monkeypatch.chdir(tmp_path)
    identities = [unicodedata.normalize("NFD", "Zoë"), "", None, "Zoë"]
    table = table_of(
        4,
        sha256=pa.array([digest_of(0).upper(), None, "", digest_of(3)]),
        identity=pa.array(identities).dictionary_encode(),
        path=pa.array(["a/../b.jpg", "/c.jpg", "", None], pa.large_string()),
        age=pa.array([1, 2, 3, 4]),
    )
    pq.write_table(table, tmp_path / "e.parquet")
    derived = [hashlib.sha256(vector_of(number)).hexdigest() for number in range(4)]
    assert [face for face, _ in read(tmp_path / "e.parquet", gallery)] == [
        NewFace("Zoë", os.path.join(os.getcwd(), "b.jpg"), digest_of(0)),
        NewFace(None, "/c.jpg", derived[1]),
        NewFace(None, None, derived[2]),
        NewFace("Zoë", None, digest_of(3)),
    ]
    nothing = table_of(2, sha256=pa.nulls(2), identity=pa.nulls(2), path=pa.nulls(2))
    pq.write_table(nothing, tmp_path / "e.parquet")
    assert [face for face, _ in read(tmp_path / "e.parquet", gallery)] == [
        NewFace(None, None, digest) for digest in derived[:2]
    ]


def with_vector(number: int, row: list[Any] | None, kind: Any = None) -> pa.Table:
    """Six vectors, one of them another one."""
    vectors: list[Any] = [list(vector_of(n)) for n in range(6)]
    vectors[number] = row
    return pa.table({"vector": pa.array(vectors, kind or pa.list_(pa.float32()))})


HOLE = [*[1.0] * (D - 1), None]
FIXED = pa.list_(pa.float32(), D)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"embedding": [1]}), "has no column `vector`; its columns are embedding"),
        (table_of(2, path=pa.array([1, 2])), "column `path` of .* holds int64; texts are needed"),
        (table_of(2, identity=pa.array([b"a", b"b"])), "column `identity` of .* holds binary"),
        (table_of(2, sha256=pa.array([1.0, 2.0])), "column `sha256` of .* holds double"),
        (table_of(2, paths=pa.array(["a", "b"])), "column `paths` of .* holds string; lists of texts"),
        (pa.table({"vector": [[1, 2], [3, 4]]}), "holds list<.*int64>; lists of floats are needed"),
        (pa.table({"vector": [1.0, 2.0]}), "holds double; lists of floats are needed"),
        (table_of(2, sha256=pa.array([digest_of(0), "z" * 64])), "Row 1 of .* 64 hexadecimal digits"),
        (
            pa.table({"vector": pa.array([[1.0] * 64], pa.list_(pa.float32(), 64))}),
            "have 64 numbers; .* 2,048",
        ),
        (with_vector(3, [1.0] * 64), "in row 3 of .* has 64 numbers; the gallery's have 2,048"),
        (with_vector(2, []), "in row 2 of .* has 0 numbers"),
        (with_vector(5, None), "Row 5 of .* has no vector"),
        (with_vector(4, None, FIXED), "Row 4 of .* has no vector"),
        (with_vector(1, [np.nan] * D), "row 1 of .* null or not finite"),
        (with_vector(1, [*[1.0] * (D - 1), -np.inf], FIXED), "row 1 of .* null or not finite"),
        (with_vector(5, [1e300] * D, pa.list_(pa.float64())), "row 5 of .* null or not finite"),
        (with_vector(3, HOLE), "row 3 of .* null or not finite"),
        (with_vector(3, HOLE, FIXED), "row 3 of .* null or not finite"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused_with_the_name_of_the_file(
    gallery: Gallery, tmp_path: Path, table: pa.Table, message: str
) -> None:
    """And with the row, counted from 0 over all blocks, where it is one row's fault."""
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=4)
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path / "e.parquet", gallery, size=2)
    assert str(tmp_path / "e.parquet") in str(raised.value)


def test_columns_are_checked_before_the_first_row_is_asked_for(gallery: Gallery, tmp_path: Path) -> None:
    """So that nothing is enrolled of a file that does not fit."""
    pq.write_table(pa.table({"embedding": [1]}), tmp_path / "e.parquet")
    with pytest.raises(InputError, match="has no column `vector`"):
        read_embeddings(tmp_path / "e.parquet", fingerprint="", dimension=D, trusted=True)


def test_a_file_must_say_which_model_made_it_or_somebody_must(gallery: Gallery, tmp_path: Path) -> None:
    """What it says itself is never overruled."""
    path = tmp_path / "e.parquet"
    pq.write_table(table_of(2), path)
    with pytest.raises(InputError, match=f"{path} does not say which model .* pass `trusted=True`"):
        read(path, gallery, trusted=False)
    pq.write_table(table_of(2).replace_schema_metadata({"faceprint.fingerprint": "f" * 64}), path)
    for trusted in (True, False):
        with pytest.raises(
            ModelMismatch, match=f"{path} were made by another model .fingerprint {'f' * 12},"
        ):
            read(path, gallery, trusted=trusted)


def test_what_is_not_a_parquet_file_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    """A picture, nothing at all, a folder, an empty file, one that is cut."""
    path = tmp_path / "e.parquet"
    with pytest.raises(InputError, match=f"{path} cannot be read: no such file"):
        read(path, gallery)
    with pytest.raises(InputError, match=f"{tmp_path} is a folder; name a Parquet file"):
        read(tmp_path, gallery)
    pq.write_table(table_of(20), path)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", b"\xff\xd8" + bytes(1000), whole[:-1], whole[:1000], whole[1000:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"{path} is not a Parquet file, or it is damaged"):
            read(path, gallery)


def test_a_flipped_bit_among_written_vectors_does_not_go_unnoticed(gallery: Gallery, tmp_path: Path) -> None:
    """Pages have checksums."""
    path = tmp_path / "e.parquet"
    batch = [face(n) for n in range(8)], np.stack([vector_of(n) for n in range(8)])
    write_embeddings(path, [batch], fingerprint=gallery.bundle.fingerprint, dimension=D)
    data = path.read_bytes()
    for number in range(8):
        damaged = bytearray(data)
        damaged[data.index(vector_of(number).tobytes()) + 999 * number] ^= 1 << number
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            read(path, gallery)


def test_a_full_disk_leaves_the_older_file_of_embeddings(gallery: Gallery, tmp_path: Path) -> None:
    """And nothing beside it, also where the caller is wrong or is interrupted."""
    path = tmp_path / "e.parquet"
    model: dict[str, Any] = {"fingerprint": gallery.bundle.fingerprint, "dimension": D}
    batch = [face(0)], vector_of(0)[None]
    write_embeddings(path, [batch], **model)

    def stopped() -> Iterator[tuple[Sequence[NewFace], NDArray[np.float32]]]:
        yield batch
        raise KeyboardInterrupt

    before = sorted(entry.name for entry in tmp_path.iterdir())
    with disk_that_takes(1000), pytest.raises(StorageError, match="cannot be written: file too large"):
        write_embeddings(path, [batch] * 2, **model)
    with pytest.raises(InputError, match=r"2 faces need vectors of shape \(2, 2048\), not \(1, 2048\)"):
        write_embeddings(path, [([face(0), face(1)], batch[1])], **model)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(path, stopped(), **model)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    assert read(path, gallery, trusted=False) == offered(1)


def test_a_reader_that_is_left_ends_its_thread(gallery: Gallery, tmp_path: Path) -> None:
    """The block that it was reading ahead is dropped."""
    pq.write_table(table_of(40), tmp_path / "e.parquet")
    found = read_embeddings(
        tmp_path / "e.parquet", fingerprint=gallery.bundle.fingerprint, dimension=D, trusted=True, size=1
    )
    next(found)
    before = threading.active_count()
    del found
    assert threading.active_count() == before - 1


def test_embeddings_may_come_with_metadata(gallery: Gallery, tmp_path: Path) -> None:
    """As JSON text; a row of something else is refused, with its number."""
    path = tmp_path / "e.parquet"
    options = {"fingerprint": gallery.bundle.fingerprint, "dimension": D}
    faces = [dataclasses.replace(face(1), metadata={"é": 1}), face(2)]
    write_embeddings(path, [(faces, np.stack([vector_of(1), vector_of(2)]))], **options)
    assert pq.read_table(path)["metadata"].to_pylist() == ['{"é":1}', None]
    for found, vectors in read_embeddings(path, trusted=False, **options):
        assert found == faces
        gallery.enroll_vectors(found, vectors)
    assert said(gallery)[0] == {digest_of(1): {"é": 1}}
    table = pq.read_table(path)
    for text, words in {"[1]": "are a value of the type list", "{": "are not JSON"}.items():
        pq.write_table(table.set_column(3, "metadata", pa.array([None, text])), path)
        with pytest.raises(InputError, match=rf"^The metadata of row 1 of {path} {words}"):
            list(read_embeddings(path, trusted=False, **options))
