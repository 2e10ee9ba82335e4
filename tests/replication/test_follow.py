"""Publishing and following: each state whole, one line of states, and everything that is refused."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.errors import DataError, FaceprintError, GalleryBusy, GalleryError, InputError, OutOfDate
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from retrieval.gallery.repair import repair
from retrieval.models.bundle import ModelBundle
from retrieval.replication.follow import FollowerFolder
from retrieval.replication.objects import FolderObjects, open_objects
from retrieval.replication.publish import Publisher
from retrieval.replication.states import (
    Stored,
    head_key,
    head_numbers,
    newest_head,
    read_head,
    read_manifest,
    to_json,
)
from retrieval.replication.status import publication_status, remove_follower
from retrieval.storage.following import read_follower, write_follower
from tests.operations import GONE, add, contents, face, photo, tiny_model, vector_of
from tests.replication.publications import (
    COPY,
    GALLERY,
    STORE,
    Shim,
    address,
    follow,
    publish,
    scan,
)


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery, state 1 of it in a store, and a follower that has it; no test changes them."""
    root = tmp_path_factory.mktemp("published")
    with Gallery.create(root / GALLERY, tiny_model(root / "model")) as gallery:
        add(gallery, range(4))
        add(gallery, range(4, 7))
    publish(root)
    follow(root)
    return root


@pytest.fixture
def root(laid: Path, tmp_path: Path) -> Path:
    """A copy of these."""
    copy = Path(shutil.copytree(laid, tmp_path / "root"))
    follow(copy)
    return copy


@pytest.fixture
def shim() -> Iterator[type[Shim]]:
    yield Shim
    Shim.before = staticmethod(lambda number, call, path: None)


def grow(root: Path, numbers: range) -> None:
    with Gallery.open(root / GALLERY) as gallery:
        add(gallery, numbers)


def test_an_open_gallery_answers_from_the_next_state_once_its_folder_has_it(root: Path) -> None:
    """Its searches before are of the state before, also while the next one lies there in part."""
    query = vector_of(face(11).sha256)[None]
    with Gallery.open(root / COPY) as copy, Gallery.open(root / GALLERY) as gallery:
        before = copy.search_by_vectors(query, 3)[0]
        add(gallery, range(9, 12))
        assert copy.search_by_vectors(query, 3)[0] == before
        publish(root)
        follow(root)
        found = copy.search_by_vectors(query, 3)[0]
        assert found == gallery.search_by_vectors(query, 3)[0] != before
        assert found[0].distance == 0
    assert contents(root / COPY) == contents(root / GALLERY)


def test_searches_go_on_while_states_are_switched_and_each_is_of_one_state(root: Path) -> None:
    """A search by many vectors gives the faces of one state, whatever is switched meanwhile."""
    allowed, seen, ended = {7}, set(), threading.Event()
    failed: list[BaseException] = []

    def search() -> None:
        with Gallery.open(root / COPY) as copy:
            while not ended.is_set():
                try:
                    seen.update(
                        len(found) for found in copy.search_by_vectors([vector_of(face(1).sha256)] * 3, 1000)
                    )
                except BaseException as error:
                    failed.append(error)
                    return

    threads = [threading.Thread(target=search) for _ in range(2)]
    for one in threads:
        one.start()
    with (
        Gallery.open(root / GALLERY) as gallery,
        FollowerFolder(address(root), root / COPY) as following,
    ):
        publisher = Publisher(gallery.vault, address(root))
        for number in range(20, 26):
            add(gallery, range(number, number + 1))
            publisher.publish()
            allowed.add(following.sync().faces)
    ended.set()
    for one in threads:
        one.join()
    assert not failed
    assert seen <= allowed == set(range(7, 14))
    assert len(seen) > 1


def test_only_what_is_new_travels(root: Path) -> None:
    grow(root, range(9, 10))
    done = publish(root)
    got = follow(root)
    # A segment, the database (which has one chunk), and the manifest.
    assert (done.objects_written, got.objects_fetched) == (3, 2)
    again = publish(root)
    assert (again.changed, again.number, again.bytes_written) == (False, 3, 0)
    same = follow(root)
    assert (same.changed, same.number, same.objects_fetched) == (False, 3, 0)


def test_a_gallery_that_was_brought_up_to_date_is_published_again(root: Path) -> None:
    """Its revision is the same; followers of this version cannot open the tables of the former state."""
    objects = open_objects(address(root))
    head = newest_head(objects)
    assert head is not None
    older = to_json(replace(read_manifest(objects, head), schema="0010"))
    stored = Stored(hashlib.sha256(older).hexdigest(), len(older), head.number)
    objects.put(stored.key, older)
    objects.put(head_key(head.number), to_json(replace(head, manifest=stored)))
    done = publish(root)
    assert (done.changed, done.number, done.revision) == (True, head.number + 1, head.revision)
    newest = newest_head(objects)
    assert newest is not None
    assert read_manifest(objects, newest).schema == SCHEMA_VERSION
    assert not publish(root).changed
    follow(root)
    assert verify(root / COPY).whole


def test_every_change_of_a_copy_is_refused_by_a_sentence_that_names_the_publisher(root: Path) -> None:
    before = contents(root / COPY)
    with Gallery.open(root / COPY) as copy:
        works = [
            lambda: add(copy, range(30, 31)),
            lambda: copy.enroll([(photo(1), None)]),
            lambda: copy.forget(GONE),
            lambda: copy.rename_identity("Kim", "Joe"),
            lambda: copy.merge_identities("Kim", "Adi"),
            lambda: copy.annotate(identities={"Kim": {"a": 1}}),
            lambda: copy.calibrate(0.5),
            lambda: copy.compact(),
            lambda: copy.optimize(anew=True),
            lambda: copy.relocate("/photos", "/other"),
            lambda: copy.reembed(ModelBundle.load(root / "model")),
            lambda: repair(root / COPY),
            lambda: Publisher(copy.vault, str(root / "elsewhere")),
            lambda: Gallery.restore(_backup(root), root / COPY),
        ]
        for number, work in enumerate(works):
            with pytest.raises(InputError, match="copy of") as caught:
                work()
            assert os.fspath(root / COPY) in str(caught.value), number
            assert address(root) in str(caught.value), number
        with pytest.raises(InputError, match=str(root.name) + ".*" + GALLERY):
            copy.compact()
    assert contents(root / COPY) == before
    assert verify(root / COPY).whole
    assert not (root / "elsewhere").exists()


def _backup(root: Path) -> Path:
    with Gallery.open(root / GALLERY, read_only=True) as gallery:
        gallery.backup(root / "backup")
    return root / "backup"


def test_a_copy_can_be_backed_up_and_restored(root: Path) -> None:
    """As when the machine of the gallery is lost."""
    with Gallery.open(root / COPY) as copy:
        copy.backup(root / "backup")
    Gallery.restore(root / "backup", root / "restored")
    assert contents(root / "restored") == contents(root / GALLERY)


def test_a_copy_that_is_older_than_it_may_be_refuses_searches_and_says_its_age(root: Path) -> None:
    with FollowerFolder(address(root), root / COPY, max_age=3600) as following:
        following.sync()
    query = vector_of(face(1).sha256)[None]
    with Gallery.open(root / COPY) as copy:
        assert copy.search_by_vectors(query, 1)[0]
        card = read_follower(root / COPY)
        assert card is not None
        old = "2026-01-01T00:00:00.000+00:00"
        write_follower(root / COPY, _with(card, current_at=old))
        for search in (copy.search_by_vectors, copy.search_people_by_vectors):
            with pytest.raises(OutOfDate, match=r"3,600 s are allowed"):
                search(query, 1)
        with pytest.raises(OutOfDate):
            copy.search_by_face(1, 1)
        follows = copy.info().follows
        assert follows is not None
        assert follows["age_seconds"] > 3600
        assert follows["address"] == address(root)
        publish(root)
        with FollowerFolder(address(root), root / COPY, max_age=3600) as following:
            following.sync()
        assert copy.search_by_vectors(query, 1)[0]


def _with(card: object, **changes: object) -> object:
    from dataclasses import replace

    return replace(card, **changes)  # type: ignore[type-var]


def test_two_publishers_make_one_line_of_states(root: Path, shim: type[Shim]) -> None:
    """The second one creates the head that the first is about to create: the first makes the next one."""
    (root / "shimmed").touch()
    with Gallery.open(root / GALLERY) as gallery:
        first, second = (Publisher(gallery.vault, address(root)) for _ in range(2))
        add(gallery, range(9, 10))
        raced = []

        def race(number: int, call: str, path: str) -> None:
            if call == "create" and not raced:
                raced.append(path)
                add(gallery, range(10, 11))
                raced.append(second.publish())

        shim.before = staticmethod(race)
        done = first.publish()
    assert raced[0].endswith(head_key(2))
    assert (raced[1].number, done.number) == (2, 3)
    objects = open_objects(address(root))
    assert [read_head(objects, number).revision for number in (2, 3)] == [raced[1].revision] * 2
    follow(root)
    assert contents(root / COPY) == contents(root / GALLERY)


def test_a_publisher_with_an_earlier_state_does_not_replace_a_later_one(root: Path) -> None:
    shutil.copytree(root / GALLERY, root / "older")
    grow(root, range(9, 10))
    publish(root)
    with pytest.raises(InputError, match="two copies of the gallery were changed"):
        publish(root, "older")
    # A copy that was changed in another way, and more often.
    with Gallery.open(root / "older") as older:
        for number in range(3):
            older.rename_identity("Kim", f"Kim {number}")
            older.rename_identity(f"Kim {number}", "Kim")
    with pytest.raises(InputError, match="two copies of the gallery were changed"):
        publish(root, "older")
    with Gallery.create(root / "other", tiny_model(root / "model-2")) as other:
        add(other, range(2))
    with pytest.raises(InputError, match="Another gallery is published"):
        publish(root, "other")
    Gallery.restore(_backup(root), root / "restored")
    with pytest.raises(InputError, match="was restored to another folder"):
        publish(root, "restored")
    assert follow(root).faces == 8


def test_a_forgotten_person_is_gone_from_the_store_and_from_each_follower_that_says_so(root: Path) -> None:
    """One is away and comes back, one is new, and one is gone for good."""
    for name in ("away", "gone"):
        follow(root, f"{name}.gallery")
    with Gallery.open(root / GALLERY) as gallery:
        receipt = gallery.forget(GONE)
    done = publish(root)
    assert done.erasures == (receipt.id,)
    scan(root / STORE)
    objects = open_objects(address(root))
    assert len(head_numbers(objects)) == 1

    def said() -> tuple[tuple[str, ...], tuple[str, ...]]:
        [erasure] = publication_status(objects).erasures
        assert erasure.receipt == receipt.id
        return erasure.confirmed, erasure.waiting

    assert said() == ((), ("away", "copy", "gone"))
    follow(root)
    follow(root, "fresh.gallery")
    assert said() == (("copy", "fresh"), ("away", "gone"))
    grow(root, range(9, 10))
    publish(root)
    assert said() == (("copy", "fresh"), ("away", "gone"))
    follow(root, "away.gallery")
    remove_follower(objects, "gone")
    assert said() == (("away", "copy", "fresh"), ())
    for name in (COPY, "away.gallery", "fresh.gallery"):
        scan(root / name)
    with pytest.raises(FaceprintError, match="No follower 'gone'"):
        remove_follower(objects, "gone")
    with pytest.raises(FaceprintError, match="No follower"):
        remove_follower(objects, "../heads/000000000001")


def test_a_follower_is_in_the_list_before_it_has_a_byte_of_anybody(root: Path) -> None:
    with FollowerFolder(address(root), root / "new.gallery", name="new"):
        assert [one.number for one in publication_status(open_objects(address(root))).followers] == [1, 0]
        with pytest.raises(GalleryError, match="unfinished copy"):
            Gallery.open(root / "new.gallery")


def test_another_model_is_followed_and_the_former_one_removed(root: Path) -> None:
    """The open copy answers by the new model, as a gallery does after `reembed`."""
    folder = root / "photo.gallery"
    with Gallery.create(folder, ModelBundle.load(root / "model")) as gallery:
        paths = []
        for number in range(3):
            paths.append(root / f"{number}.png")
            photo(number).save(paths[-1])
        gallery.enroll([(path, "Adi") for path in paths])
        publisher = Publisher(gallery.vault, str(root / "store-2"))
        publisher.publish()
        with (
            FollowerFolder(str(root / "store-2"), root / "copy-2") as following,
            ExitStack() as stack,
        ):
            following.sync()
            copy = stack.enter_context(Gallery.open(root / "copy-2"))
            assert copy.search(paths[0], 1).matches[0].distance == 0
            other = tiny_model(root / "other-model", seed=1)
            gallery.reembed(other)
            publisher.publish()
            following.sync()
            assert copy.search(paths[0], 1).matches[0].distance == 0
            assert copy.bundle.fingerprint == other.fingerprint
            gallery.drop_other_model()
            publisher.publish()
            following.sync()
            assert sorted(path.name for path in (root / "copy-2").glob("model*")) == ["model-2"]
    assert verify(root / "copy-2").whole


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_object_is_never_taken_over(damage: str, root: Path) -> None:
    grow(root, range(9, 12))
    publish(root)
    before = contents(root / COPY)
    objects = FolderObjects(root / STORE)
    head = newest_head(objects)
    assert head is not None
    for name in objects.sizes("objects/000000000002"):
        path = root / STORE / name
        data = path.read_bytes()
        path.unlink()
        if damage != "remove":
            path.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1]}[damage])
        with pytest.raises(DataError, match=r"publish again|as published|newer version"):
            follow(root)
        assert contents(root / COPY) == before
        assert verify(root / COPY).whole or [one.trouble for one in verify(root / COPY).findings] == [
            Trouble.LEFTOVER
        ]
        path.write_bytes(data)
    follow(root)
    check_same(root)


def check_same(root: Path) -> None:
    assert contents(root / COPY) == contents(root / GALLERY)
    assert verify(root / COPY).whole


def test_a_damaged_file_of_a_copy_is_fetched_again(root: Path) -> None:
    names = ["gallery.db", "model/model.onnx", "model/bundle.json"]
    for path in [*(root / COPY / name for name in names), *(root / COPY / "vectors").glob("*.faiss")]:
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    path.unlink()
    assert not verify(root / COPY).whole
    follow(root)
    check_same(root)


def test_a_folder_that_is_no_copy_is_refused_and_stays_as_it_is(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "text").write_text("mine")
    for name in ("mine", GALLERY):
        before = sorted(path.name for path in (root / name).iterdir())
        with pytest.raises(InputError, match="follows nothing"):
            follow(root, name)
        assert sorted(path.name for path in (root / name).iterdir()) == before
    with (
        pytest.raises(InputError, match="No gallery is published"),
        FollowerFolder(str(root / "empty"), root / "new"),
    ):
        pass
    assert not (root / "new").exists()
    with (
        pytest.raises(InputError, match="in the gallery itself"),
        Gallery.open(root / GALLERY) as gallery,
    ):
        Publisher(gallery.vault, str(root / GALLERY / "store"))


def test_one_process_follows_into_a_folder(root: Path) -> None:
    with (
        FollowerFolder(address(root), root / COPY),
        pytest.raises(GalleryBusy, match="Another process follows"),
        FollowerFolder(address(root), root / COPY),
    ):
        pass


def test_a_card_of_a_follower_that_is_damaged_is_refused_by_a_sentence(root: Path) -> None:
    path = root / COPY / "follower.json"
    said = json.loads(path.read_text())
    for text in (
        "",
        "{}",
        "[]",
        json.dumps({**said, "current_at": "x"}),
        json.dumps({**said, "number": "1"}),
    ):
        path.write_text(text)
        with pytest.raises(GalleryError, match="damaged"):
            Gallery.open(root / COPY)
    path.write_text(json.dumps({**said, "format": 2}))
    with pytest.raises(GalleryError, match="newer version"):
        Gallery.open(root / COPY)


def test_a_store_that_creates_twice_is_refused(root: Path, shim: type[Shim]) -> None:
    (root / "shimmed").touch()

    def overwrite(number: int, call: str, path: str) -> None:
        if call == "create" and Path(shim._strip_protocol(path)).exists():
            Path(shim._strip_protocol(path)).unlink()

    shim.before = staticmethod(overwrite)
    with pytest.raises(InputError, match="conditional write"):
        publish(root)


def test_a_gallery_that_moves_to_another_store_is_followed_there(root: Path) -> None:
    (root / STORE).rename(root / "former")
    publish(root)
    assert follow(root).number == 1
    check_same(root)
