"""The undo of merges: what is restored, what is left, and that nothing of the forgotten stays."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from retrieval.database.tables import merge_face_table, merge_label_table, merge_name_table, merge_table
from retrieval.errors import InputError, NotFound
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.identities import rename_together
from retrieval.gallery.integrity import verify
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.transfer.export_reader import read_export
from tests.gallery.test_identities import contents, enroll, everybody, files_with, labels_on_disk, new, sha256


@pytest.fixture
def labelled(bundle: ModelBundle, tmp_path: Path) -> ModelBundle:
    """The tests' model as if it had been trained on Ana and Kim, with photos of the same names."""
    split = {"train": ["Kim/1.jpg", "Ana/1.jpg", "Ana/2.jpg"], "validation": ["Ana/3.jpg"]}
    labels = ("Ana", "Kim", *bundle.labels[2:])
    made = dataclasses.replace(bundle.save(tmp_path / "labelled"), labels=labels, split=split)
    made.rewrite_card()
    return made


@pytest.fixture
def people(labelled: ModelBundle, tmp_path: Path) -> Iterator[Gallery]:
    """Two faces of Ana (once Annabel), two of Kim and one of Adi; Ana and Kim with metadata."""
    with Gallery.create(tmp_path / "people.gallery", labelled) as gallery:
        enroll(gallery, new("Annabel", 1), new("Annabel", 2), new("Kim", 3), new("Kim", 4), new("Adi", 5))
        gallery.rename_identity("Annabel", "Ana")
        gallery.annotate(identities={"Ana": {"badge": "AN-7", "team": "red"}, "Kim": {"team": "blue"}})
        yield gallery


def rows(gallery: Gallery) -> dict[str, Any]:
    """Everything that a merge changes: people with ids, names and metadata, the faces of each, the labels."""
    with gallery.vault.store.read() as reader:
        found = reader.people(limit=100)
        names = {one.id: sorted(reader.names_of([one.id])) for one in found}
        assert reader.counter_problems() == []
        bundle = gallery.vault.bundle(reader, gallery.vault.serving(reader))
    split = {part: sorted(photos) for part, photos in bundle.split.items()}
    return {"people": found, "names": names, "faces": contents(gallery), "card": (bundle.labels, split)}


def test_an_undone_merge_leaves_everything_as_it_was(people: Gallery) -> None:
    """Id, names, metadata, faces, labels, and the photos of each in the split of the model."""
    before = rows(people)
    assert people.merge_identities("Ana", "Kim") == 2
    (merge,) = people.merges()
    assert (merge.name, merge.into, merge.faces, merge.filled) == ("Ana", "Kim", 2, ("badge",))
    assert labels_on_disk(people)[:2] == ["Kim", "Kim"]
    done = people.undo_merge(merge.id)
    assert (done.merge, done.face_ids, done.former_names) == (merge, (1, 2), ("Annabel",))
    assert done.sentences() == ["Ana is a person again, with 2 of 2 faces."]
    assert rows(people) == before
    assert people.merges() == []
    assert verify(people.folder).whole
    people.merge_identities("Ana", "Kim")
    people.undo_merge()
    assert rows(people) == before


def test_what_changed_since_a_merge_stays(people: Gallery) -> None:
    people.merge_identities("Ana", "Kim")
    people.rename_identity("Kim", "Kimberly")
    people.annotate(identities={"Kimberly": {"badge": "KI-1", "team": "blue"}})
    people.assign_identity([2], "Adi")
    enroll(people, new("Ana", 6))
    people.rename_identity("Adi", "Annabel")
    done = people.undo_merge()
    assert (done.face_ids, done.elsewhere, done.forgotten) == ((1,), (2,), 0)
    assert (done.former_names, done.lost_names, done.kept_keys) == ((), ("Annabel",), ("badge",))
    assert done.sentences() == [
        "Ana is a person again, with 1 of 2 faces; given to others since and left there: 1.",
        "Not restored, as Kimberly has them no more: Annabel.",
        "Kimberly keeps metadata that were changed since the merge: badge.",
    ]
    faces = {number: face.identity for number, face in everybody(people).items()}
    assert faces == {1: "Ana", 2: "Annabel", 3: "Kimberly", 4: "Kimberly", 5: "Annabel", 6: "Kimberly"}
    metadata = people.identity_metadata(["Ana", "Kimberly"])
    assert metadata == {
        "Ana": {"badge": "AN-7", "team": "red"},
        "Kimberly": {"badge": "KI-1", "team": "blue"},
    }
    assert labels_on_disk(people)[:2] == ["Ana", "Kimberly"]


def test_merges_are_undone_in_any_order_or_the_one_before_is_named(people: Gallery) -> None:
    before = rows(people)
    people.merge_identities("Ana", "Kim")
    people.merge_identities("Kim", "Adi")
    second, first = people.merges()
    assert (first.into, second.into, second.former_names) == ("Kim", "Adi", ("Ana", "Annabel"))
    with pytest.raises(InputError, match=f"was merged into Adi since; undo that first: merge {second.id}"):
        people.undo_merge(first.id)
    people.undo_merge(second.id)
    people.undo_merge(first.id)
    assert rows(people) == before
    people.merge_identities("Ana", "Kim")
    people.merge_identities("Adi", "Kim")
    second, first = people.merges()
    people.undo_merge(first.id)
    people.undo_merge(second.id)
    assert rows(people) == before


def test_a_merge_that_cannot_be_undone_is_refused_and_changes_nothing(people: Gallery) -> None:
    people.merge_identities("Ana", "Kim")
    (merge,) = people.merges()
    people.rename_identity("Adi", "Ana")
    before = rows(people)
    with pytest.raises(InputError, match=f"Another person is called Ana by now; .* undo merge {merge.id}"):
        people.undo_merge()
    people.rename_identity("Ana", "Adi")
    people.assign_identity([1, 2], "Adi")
    with pytest.raises(InputError, match="None of the faces that merge"):
        people.undo_merge()
    people.assign_identity([1, 2], "Kim")
    assert rows(people)["faces"] == before["faces"] | {sha256(5): ("Adi", ("/photos/5.jpg",))}
    people.undo_merge()
    with pytest.raises(NotFound, match=f"Merge {merge.id} was undone already"):
        people.undo_merge(merge.id)
    for number in (0, -1, 99, 2**70):
        with pytest.raises(NotFound, match=f"Merge {number} is not one that can be undone"):
            people.undo_merge(number)
    with pytest.raises(NotFound, match="has no merge that can be undone"):
        people.undo_merge()


def test_a_sync_that_merges_the_other_person_leads_an_undo_there(people: Gallery) -> None:
    """What the sync merged was not kept, and would come again."""
    people.merge_identities("Ana", "Kim")
    with people.vault.writing() as writer:
        rename_together(people.vault, writer, {"Kim": "Adi"})
    (merge,) = people.merges()
    assert merge.into == "Adi"
    done = people.undo_merge()
    assert (done.into, done.face_ids) == ("Adi", (1, 2))
    assert {number: face.identity for number, face in everybody(people).items()} == {
        **dict.fromkeys((1, 2), "Ana"),
        **dict.fromkeys((3, 4, 5), "Adi"),
    }


# Erasing

SECRETS = ["AN-7", '"Ana"', "Annabel", "Ana/"]


def merge_rows(gallery: Gallery) -> int:
    tables = (merge_table, merge_face_table, merge_name_table, merge_label_table)
    with gallery.vault.store.read() as reader:
        return sum(len(part) for table in tables for part in reader.rows(table))


FORGETTING = {
    "the whole person": lambda gallery: gallery.forget("Kim"),
    "every photo": lambda gallery: [gallery.forget(path=f"/photos/{n}.jpg") for n in (1, 2, 3, 4)],
    "the merged faces, given to another": lambda gallery: (
        gallery.assign_identity([1, 2], "Eve"),
        gallery.forget("Eve"),
        gallery.forget("Kim"),
    ),
    "both, after a second merge": lambda gallery: (
        gallery.merge_identities("Kim", "Adi"),
        gallery.forget("Adi"),
    ),
    "the restored person": lambda gallery: (gallery.undo_merge(), gallery.forget("Ana")),
    "the restored person of two merges": lambda gallery: (
        gallery.merge_identities("Kim", "Adi"),
        gallery.undo_merge(),
        gallery.undo_merge(),
        gallery.forget("Ana"),
    ),
}


@pytest.mark.parametrize("way", FORGETTING)
def test_no_byte_of_the_forgotten_stays_in_what_would_undo_a_merge(way: str, people: Gallery) -> None:
    people.merge_identities("Ana", "Kim")
    assert files_with(people.folder, "AN-7") != []
    assert merge_rows(people) > 0
    FORGETTING[way](people)
    assert merge_rows(people) == 0
    assert people.merges() == []
    assert [secret for secret in SECRETS if files_with(people.folder, secret)] == []
    people.close()
    assert verify(people.folder).whole


def test_forgotten_faces_are_not_restored(people: Gallery) -> None:
    people.merge_identities("Ana", "Kim")
    people.forget(face_id=1)
    done = people.undo_merge()
    assert (done.face_ids, done.forgotten) == ((2,), 1)
    assert done.sentences() == ["Ana is a person again, with 1 of 2 faces; no longer in the gallery: 1."]


def test_without_an_alias_no_byte_of_a_name_stays_in_merges(people: Gallery) -> None:
    """Neither of a merged person's name nor of a former one; the name of the photos' folder goes too."""
    people.merge_identities("Ana", "Kim")
    people.rename_identity("Kim", "Annabel")
    people.rename_identity("Annabel", "Zoë", keep_alias=False)
    assert [merge.former_names for merge in people.merges()] == [()]
    assert files_with(people.folder, "Annabel") == files_with(people.folder, "Kim/") == []
    people.rename_identity("Zoë", "Ana")
    people.rename_identity("Ana", "Zoë", keep_alias=False)
    assert merge_rows(people) == 0
    assert files_with(people.folder, '"Ana"') == []


@pytest.mark.parametrize("later", ["alone", "merged again"])
@pytest.mark.parametrize("anew", [False, True])
def test_a_backup_with_a_merge_does_not_bring_the_forgotten_back(
    later: str, anew: bool, people: Gallery, tmp_path: Path
) -> None:
    """The merge was undone since, and the restored person forgotten."""
    people.merge_identities("Ana", "Kim")
    if later == "merged again":
        people.merge_identities("Kim", "Adi")
    people.backup(tmp_path / "backup")
    while people.merges():
        people.undo_merge()
    receipt = people.forget("Ana")
    target = tmp_path / "again.gallery" if anew else people.folder
    people.close()
    Gallery.restore(tmp_path / "backup", target, receipts=[receipt])
    with Gallery.open(target) as gallery:
        owner = "Kim" if later == "alone" else "Adi"
        faces = {number: face.identity for number, face in everybody(gallery).items()}
        assert faces == {3: owner, 4: owner, 5: "Adi"}
        assert gallery.identity_metadata([owner])[owner] == {"team": "blue"}
        assert len(gallery.merges()) == (later != "alone")
        assert gallery.bundle.split["validation"] == []
    assert [secret for secret in SECRETS if files_with(target, secret)] == []
    assert verify(target).whole


# What a merge survives


def test_a_merge_is_undone_after_a_compaction_and_in_a_restored_backup(
    people: Gallery, tmp_path: Path
) -> None:
    before = rows(people)
    people.merge_identities("Ana", "Kim")
    people.compact()
    people.backup(tmp_path / "backup")
    people.undo_merge()
    people.close()
    Gallery.restore(tmp_path / "backup", people.folder)
    Gallery.restore(tmp_path / "backup", tmp_path / "again.gallery")
    for folder in (people.folder, tmp_path / "again.gallery"):
        with Gallery.open(folder) as gallery:
            gallery.undo_merge()
            assert rows(gallery) == before


def test_a_merge_is_undone_after_a_switch_to_another_model(
    labelled: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """The labels that the merge changed are restored; those of the later model were never changed."""
    later = another(labelled, tmp_path / "later")
    with Gallery.create(tmp_path / "switched.gallery", labelled) as gallery:
        photos = sorted(faces.glob("*/*_0001.jpg"))
        gallery.enroll(zip(photos, ["Ana", "Kim", "Ana"], strict=False))
        gallery.merge_identities("Ana", "Kim")
        assert gallery.reembed(later).switched
        assert gallery.undo_merge().face_ids == (1, 3)
        with gallery.vault.store.read() as reader:
            bundles = [gallery.vault.bundle(reader, one) for one in reader.generations().values()]
        assert [bundle.labels[:2] for bundle in bundles] == [("Ana", "Kim")] * 2
        assert [bundle.split for bundle in bundles] == [labelled.split] * 2
        assert gallery.verify().whole


def another(bundle: ModelBundle, folder: Path) -> ModelBundle:
    """A model that differs by its preprocessing."""
    fields = {field.name: getattr(bundle, field.name) for field in dataclasses.fields(bundle)}
    for name in ("folder", "fingerprint", "files"):
        del fields[name]
    fields["preprocessing"] = Preprocessing(size=32, crop=0.5)
    tensors, graph = load_file(bundle.weights_path), bundle.graph_path.read_bytes()
    return ModelBundle.create(folder, tensors=tensors, graph=graph, **fields)


def test_an_export_has_no_merges(people: Gallery, tmp_path: Path) -> None:
    people.merge_identities("Ana", "Kim")
    people.export(tmp_path / "exported")
    assert files_with(tmp_path / "exported", "merge_face") == []
    with Gallery.create(tmp_path / "imported.gallery", people.bundle) as gallery:
        gallery.import_export(read_export(tmp_path / "exported"))
        assert gallery.merges() == []


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("UPDATE merge SET identity_id = 1", "has no faces, or not the identities of a merge"),
        ("DELETE FROM merge_face", "has no faces, or not the identities of a merge"),
        ("UPDATE merge SET into_id = 'x'", "a value in the table merge has another type"),
        ("UPDATE merge SET filled = '[1]'", "a merge that cannot be read"),
        ("UPDATE merge_label SET photos = '['", "a merge that cannot be read"),
        ("INSERT INTO doubt (id, state) VALUES ('hub.f1', 'undecided')", "a doubt that cannot be read"),
        ("INSERT INTO doubt (id, state) VALUES ('Ana', 'open')", "a doubt that cannot be read"),
        ("UPDATE merge_face SET merge_id = 99", "a row of merge_face refers to nothing"),
    ],
)
def test_a_damaged_merge_is_found(damage: str, finding: str, people: Gallery) -> None:
    people.merge_identities("Ana", "Kim")
    with people.vault.store.file.driver() as driver:
        driver.execute("PRAGMA foreign_keys = OFF")
        driver.execute(damage)
        driver.commit()
        driver.execute("PRAGMA foreign_keys = ON")
    people.close()
    found = verify(people.folder)
    assert any(finding in one.detail for one in found.findings), found.findings
