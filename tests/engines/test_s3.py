"""Publishing in a real S3 server, and following it."""

import threading
from pathlib import Path

import pytest

from retrieval.errors import InputError, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.replication.follow import FollowerFolder
from retrieval.replication.objects import ObjectMissing, open_objects
from retrieval.replication.publish import Published, Publisher
from retrieval.replication.states import head_numbers, newest_head, read_head
from retrieval.replication.status import publication_status
from tests.operations import _TRACES, GONE, add, contents, tiny_model


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    with Gallery.create(tmp_path / "people.gallery", tiny_model(tmp_path / "model")) as made:
        add(made, range(6))
        add(made, range(6, 9))
    return tmp_path / "people.gallery"


def test_a_bucket_has_one_line_of_states_and_forgets(bucket: str, gallery: Path, tmp_path: Path) -> None:
    """Five followers: one is away while a person is forgotten, and comes back."""
    address = f"s3://{bucket}/gallery"
    names = [f"follower-{number}" for number in range(5)]

    def follow(name: str) -> None:
        with FollowerFolder(address, tmp_path / name, name=name) as following:
            following.sync()

    with Gallery.open(gallery) as opened:
        publisher = Publisher(opened.vault, address)
        assert publisher.publish().number == 1
        for name in names:
            follow(name)
            assert contents(tmp_path / name) == contents(gallery)
        receipt = opened.forget(GONE)
        done = publisher.publish()
        assert done.erasures == (receipt.id,)
        assert done.objects_deleted > 0
        for name in names[1:]:
            follow(name)
        [erasure] = publication_status(open_objects(address)).erasures
        assert (erasure.confirmed, erasure.waiting) == (tuple(names[1:]), ("follower-0",))
        objects = open_objects(address)
        stored = objects.sizes("")
        assert stored
        for name in stored:
            data = objects.get(name)
            assert not [trace for trace in _TRACES if trace in data], name
        follow("follower-0")
        assert not publication_status(objects).waiting
    for name in names:
        assert contents(tmp_path / name) == contents(gallery)
        assert verify(tmp_path / name).whole


def test_publishers_that_race_make_one_line_of_states(bucket: str, gallery: Path) -> None:
    """Four at a time, while the gallery changes: every head is created once, and none is of the past."""
    address = f"s3://{bucket}/gallery"
    done: list[Published] = []
    failed: list[BaseException] = []

    def publish() -> None:
        try:
            with Gallery.open(gallery) as opened:
                publisher = Publisher(opened.vault, address)
                done.extend(publisher.publish() for _ in range(3))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for one in threads:
        one.start()
    with Gallery.open(gallery) as opened:
        for number in range(20, 26):
            add(opened, range(number, number + 1))
    for one in threads:
        one.join()
    assert not failed
    assert sorted(one.number for one in done) == list(range(1, 13))
    revisions = [one.revision for one in sorted(done, key=lambda one: one.number)]
    assert revisions == sorted(revisions)
    objects = open_objects(address)
    assert [read_head(objects, number).number for number in head_numbers(objects)] == head_numbers(objects)
    head = newest_head(objects)
    assert head is not None
    assert head.number == 12


def test_a_bucket_that_keeps_versions_is_refused(bucket: str, gallery: Path) -> None:
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    for status in ("Enabled", "Suspended"):
        files.call_s3("put_bucket_versioning", Bucket=bucket, VersioningConfiguration={"Status": status})
        with Gallery.open(gallery) as opened, pytest.raises(InputError, match="keeps versions"):
            Publisher(opened.vault, f"s3://{bucket}/gallery")


def test_a_bucket_that_is_not_there_is_one_sentence(s3: str, gallery: Path, tmp_path: Path) -> None:
    with Gallery.open(gallery) as opened, pytest.raises((StorageError, InputError), match="absent-bucket"):
        Publisher(opened.vault, "s3://absent-bucket/gallery").publish()
    with (
        pytest.raises(InputError, match="No gallery is published"),
        FollowerFolder("s3://absent-bucket/gallery", tmp_path / "copy"),
    ):
        pass
    with pytest.raises(ObjectMissing):
        open_objects("s3://absent-bucket/gallery").get("heads/000000000001.json")
