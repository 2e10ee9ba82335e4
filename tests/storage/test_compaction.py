"""Compaction: the database is written anew where that is worth it, and its unused bytes are zeroed always."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.galleries import faces, model
from retrieval.database.engines.sqlite_file import SqliteFile
from retrieval.gallery.gallery import Gallery
from tests.database.test_page_checksums import unused

# With fewer, the first pages of the tables, which are nearly empty, are more than a tenth of the database.
FACES = 20_000


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    with Gallery.create(tmp_path / "gallery", model(tmp_path / "model", 4)) as gallery:
        vectors = np.random.default_rng(0).standard_normal((FACES, 4), np.float32)
        for first in range(0, FACES, 5_000):
            gallery.enroll_vectors(faces(first, 5_000), vectors[first : first + 5_000])
        gallery.compact()
        yield gallery


@pytest.mark.parametrize(("forgotten", "anew"), [(10, False), (FACES // 2, True)])
def test_the_database_is_written_anew_only_where_that_saves_a_tenth(
    forgotten: int, anew: bool, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Path] = []

    def vacuum(file: SqliteFile) -> None:
        called.append(file.path)
        done(file)

    done = SqliteFile.vacuum
    path = gallery.vault.store.path
    before = path.stat().st_size
    with gallery.vault.writing() as writer:
        gallery.vault.remove(writer, range(1, forgotten + 1))
    monkeypatch.setattr(SqliteFile, "vacuum", vacuum)
    gallery.compact()
    assert called == [path] * anew
    assert anew or unused(path, 4096) == b""
    assert (path.stat().st_size < 0.6 * before) == anew
    assert gallery.info().faces == FACES - forgotten
