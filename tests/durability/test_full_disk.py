"""A disk that is really full: a small one in memory, mounted for one process."""

from pathlib import Path

from tests.disks import on_small_disk

# Fills the disk to the last byte at a different place each time, and looks what is left of the gallery.
PROGRAM = """
import sys
from pathlib import Path
from retrieval.errors import StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from tests.disks import filled
from tests.operations import GONE, HARMLESS, add, contents, tiny_model

disk = Path(sys.argv[1])
with Gallery.create(disk / "gallery", tiny_model(disk / "model")) as gallery:
    add(gallery, range(30))
    enrolled, failures = 30, 0
    for room in range(0, 200_000, 5_000):
        with filled(disk, room=room):
            try:
                add(gallery, range(enrolled, enrolled + 3))
                enrolled += 3
            except StorageError as error:
                assert str(error).endswith("."), error
                failures += 1
            found = verify(gallery.folder).findings
            assert {finding.trouble for finding in found} <= HARMLESS, found
            assert len(contents(gallery.folder)) == enrolled
    assert 0 < failures < 40, failures
    add(gallery, range(enrolled, enrolled + 3))
    assert verify(gallery.folder).whole
    assert gallery.forget(GONE).faces == (enrolled + 3) // 3
    assert verify(gallery.folder).whole
print("enrolled", enrolled, "failures", failures)
"""


def test_a_full_disk_stops_a_batch_with_a_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """Whatever of a batch still fits: the gallery is whole, and goes on when there is room again."""
    done = on_small_disk(tmp_path, PROGRAM, size="4m")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("enrolled ")
