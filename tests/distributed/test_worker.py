"""The worker of one machine, and the blocks that it gets; no cluster is needed for these."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import retrieval
from retrieval.bulk.embed import embed
from retrieval.distributed.blocks import in_blocks
from retrieval.distributed.worker import Settings, Worker, model_files
from retrieval.embedding.reading import AUTO
from retrieval.embedding.stages import Resources
from retrieval.errors import InputError, Reason, RunError
from retrieval.models.bundle import ModelBundle
from retrieval.sources import photos
from retrieval.sources.photos import Photo
from retrieval.transfer.embedding_parts import RunRecord, parts_folder, write_record
from retrieval.transfer.vector_files import count_embeddings

VERSION = retrieval.__version__


def settings(out: Path, run: str = "1") -> Settings:
    return Settings(str(out), run, "cpu", "float32", Resources(), AUTO)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.stop()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the record of a run whose id is 1."""
    folder = parts_folder(tmp_path / "run")
    folder.make()
    write_record(folder, RunRecord("1", "m", []))
    return tmp_path / "run"


def test_a_block_becomes_the_file_that_embed_writes(
    worker: Worker, bundle: ModelBundle, faces: Path, out: Path, tmp_path: Path
) -> None:
    worker.start(settings(out), model_files(bundle), VERSION, 1)
    (block,) = in_blocks(photos.scan([faces]), 100)
    done = worker.embed(block)
    assert (done.part, done.rows, done.rejected) == (block.part, 36, ())
    embed(bundle, [faces], tmp_path / "one.parquet")
    assert (out / block.part).read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert [stage.name for stage in done.stages] == ["scan", "read", "decode", "embed", "write"]


def test_rejected_photos_are_told_by_their_places_and_a_block_of_them_has_no_part(
    worker: Worker, bundle: ModelBundle, faces: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    good = sorted(faces.glob("*/*.jpg"))[0]
    worker.start(settings(out), model_files(bundle), VERSION, 2)
    (mixed,) = in_blocks(photos.of([tmp_path / "empty.jpg", good, tmp_path / "absent.jpg"]), 10)
    done = worker.embed(mixed)
    assert [(place, one.reason) for place, one in done.rejected] == [
        (0, Reason.EMPTY_FILE),
        (2, Reason.MISSING),
    ]
    assert (done.rows, count_embeddings(out / mixed.part)) == (1, 1)
    (bad,) = in_blocks(photos.of([tmp_path / "empty.jpg"]), 10)
    assert worker.embed(bad).part is None
    assert not (out / bad.part).exists()


def test_a_worker_leaves_nothing_behind(bundle: ModelBundle, out: Path) -> None:
    made = Worker()
    made.start(settings(out), model_files(bundle), VERSION, 1)
    folder = made._folder
    assert folder.is_dir()
    made.stop()
    assert not folder.exists()


def test_a_machine_with_another_version_or_another_folder_is_refused(
    worker: Worker, bundle: ModelBundle, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=rf"has faceprint {VERSION}, and this one 0\.0\.1; install the same"):
        worker.start(settings(out), model_files(bundle), "0.0.1", 1)
    for other in (settings(out, "2"), settings(tmp_path / "elsewhere")):
        with pytest.raises(InputError, match="does not see the files that this one writes"):
            worker.start(other, model_files(bundle), VERSION, 1)


def test_blocks_have_names_that_their_photos_decide(faces: Path, tmp_path: Path) -> None:
    blocks = list(in_blocks(photos.scan([faces]), 10))
    assert [len(block.photos) for block in blocks] == [10, 10, 10, 6]
    names = [block.part for block in blocks]
    assert names == [block.part for block in in_blocks(photos.scan([faces]), 10)]
    assert names == sorted(set(names))
    one = Photo("/a.jpg", "Ada")
    others = [
        Photo("/b.jpg", "Ada"),
        Photo("/a.jpg", None),
        Photo("/a.jpg", "Ada", metadata={"k": 1}),
        Photo("/a.jpg", "Ada", content=b"1"),
        Photo("/a.jpg", "Ada", content=b"2"),
        Photo("/a.jpg", "Ada", Reason.DAMAGED),
    ]
    assert len({block.part[14:] for block in in_blocks([one, *others], 1)}) == 7


def test_photos_of_an_archive_travel_with_their_bytes(
    worker: Worker, bundle: ModelBundle, faces: Path, out: Path, tmp_path: Path
) -> None:
    shutil.make_archive(str(tmp_path / "photos"), "tar", faces)
    blocks = list(in_blocks(photos.scan([tmp_path / "photos.tar"]), 20))
    (tmp_path / "photos.tar").unlink()
    worker.start(settings(out), model_files(bundle), VERSION, 1)
    assert sum(worker.embed(block).rows for block in blocks) == 36
    large = [Photo(f"/{n}", None, content=b"x" * (20 * 2**20)) for n in range(3)]
    assert [len(block.photos) for block in in_blocks(large, 10)] == [2, 1]
    with pytest.raises(InputError, match="write pictures to files"):
        list(in_blocks([Photo(None, None, content=np.zeros((8, 8, 3), np.uint8))], 10))
