"""The commands that look after a gallery, as a user types them."""

import json
import shutil
from pathlib import Path

import pytest

from retrieval.database.records import NewFace
from retrieval.models.bundle import ModelBundle
from retrieval.transfer.vector_files import write_embeddings
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import GONE, PEOPLE, tiny_model, vector_of, write_photos

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine photos of three people."""
    write_photos(tmp_path / "photos", range(9))
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path) -> ModelBundle:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def gallery(faceprint: Faceprint, photos: Path, model: ModelBundle, tmp_path: Path) -> Path:
    """A gallery that `faceprint ingest` made of them."""
    status, _, err = faceprint("ingest", tmp_path / "gallery", photos, "--model", model.folder)
    assert status == 0, err
    return tmp_path / "gallery"


def faces_in(faceprint: Faceprint, gallery: Path) -> int:
    return int(json.loads(faceprint("info", gallery, "--json")[1])["faces"])


def test_verify_says_whole_and_names_the_file_that_is_not(faceprint: Faceprint, gallery: Path) -> None:
    status, out, _ = faceprint("verify", gallery)
    assert (status, out.split()[0]) == (0, "whole:")
    (segment,) = (gallery / "vectors").glob("*.faiss")
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    status, out, err = faceprint("verify", gallery, "--json")
    assert status == 1
    assert [finding["file"] for finding in json.loads(out)["findings"]] == [f"vectors/{segment.name}"]
    assert err == (
        f"faceprint: {gallery} is not what was written (1 finding); "
        f"see what `faceprint repair {gallery}` can mend.\n"
    )


def test_repair_makes_a_lost_folder_of_vectors_private(faceprint: Faceprint, gallery: Path) -> None:
    shutil.rmtree(gallery / "vectors")
    assert faceprint("repair", gallery)[0] == 0
    modes = {path.stat().st_mode & 0o077 for path in [gallery / "vectors", *(gallery / "vectors").iterdir()]}
    assert modes == {0}


def test_repair_embeds_again_and_lists_whose_photo_is_gone(
    faceprint: Faceprint, gallery: Path, photos: Path
) -> None:
    (segment,) = (gallery / "vectors").glob("*.faiss")
    segment.write_bytes(segment.read_bytes()[:-1])
    gone = photos / "Kim" / "Kim_4.png"
    aside = gone.rename(photos.parent / "aside.png")
    status, out, err = faceprint("repair", gallery)
    assert status == 1
    assert str(gone) in out
    assert "The photos of 1 face are gone or have changed" in err
    aside.rename(gone)
    status, out, err = faceprint("repair", gallery)
    assert (status, err) == (0, "")
    assert "9 vectors embedded again" in out
    (answer,) = json.loads(faceprint("search", gallery, gone, "-k", 1, "--json")[1])
    assert [(match["identity"], match["distance"]) for match in answer["matches"]] == [("Kim", 0.0)]


def test_repair_of_a_whole_gallery_does_nothing(faceprint: Faceprint, gallery: Path) -> None:
    status, out, _ = faceprint("repair", gallery)
    assert status == 0
    assert out.startswith("0 findings, 0 mended")


def test_forget_prints_a_receipt_without_the_name_and_the_person_is_gone(
    faceprint: Faceprint, gallery: Path, tmp_path: Path
) -> None:
    status, out, _ = faceprint("forget", gallery, "--identity", GONE, "--receipt", tmp_path / "r.json")
    assert status == 0
    assert out.startswith("forgot 3 faces; receipt ")
    receipt = (tmp_path / "r.json").read_text()
    assert GONE not in out + receipt
    assert json.loads(receipt)["id"] in faceprint("audit-log", gallery, "--receipts")[1]
    data = b"\0".join(path.read_bytes() for path in gallery.rglob("*") if path.is_file())
    assert GONE.encode() not in data
    status, _, err = faceprint("forget", gallery, "--identity", GONE)
    assert (status, err) == (2, f"faceprint: There is no identity {GONE} in {gallery}.\n")


def test_forget_takes_a_face_or_a_file_and_wants_one_of_the_three(
    faceprint: Faceprint, gallery: Path, photos: Path
) -> None:
    assert faceprint("forget", gallery, "--face", 1)[0] == 0
    assert faceprint("forget", gallery, "--path", photos / "Kim" / "Kim_1.png")[0] == 0
    assert faces_in(faceprint, gallery) == 7
    assert faceprint("forget", gallery)[0] == 2
    assert faceprint("forget", gallery, "--face", 1, "--identity", "Kim")[0] == 2
    assert faceprint("forget", gallery, "--face", 99)[2] == f"faceprint: There is no face 99 in {gallery}.\n"


def test_a_receipt_is_never_written_over_another_file(
    faceprint: Faceprint, gallery: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text("precious")
    status, _, err = faceprint("forget", gallery, "--identity", GONE, "--receipt", tmp_path / "r.json")
    assert status == 2
    assert "exists already" in err
    assert faces_in(faceprint, gallery) == 9


def test_a_receipt_that_cannot_be_written_is_named_and_kept_by_the_gallery(
    faceprint: Faceprint, gallery: Path
) -> None:
    """Nothing can be made below /proc, which only shows when it is tried."""
    status, out, err = faceprint("forget", gallery, "--identity", GONE, "--receipt", "/proc/receipt.json")
    (receipt,) = json.loads(faceprint("audit-log", gallery, "--receipts", "--json")[1])
    assert status == 1
    assert out.startswith(f"forgot 3 faces; receipt {receipt['id']}, ")
    assert err.startswith(
        f"faceprint: 3 faces of {gallery} are erased, but receipt {receipt['id']} cannot be written to "
        "/proc/receipt.json: "
    )
    assert err.endswith(f"; `faceprint audit-log {gallery} --receipts --json` has it.\n")
    assert faces_in(faceprint, gallery) == 6


def test_what_was_forgotten_stays_forgotten_when_an_older_backup_comes_back(
    faceprint: Faceprint, gallery: Path, tmp_path: Path
) -> None:
    """In place by the gallery's own tombstone, in a new folder by the receipt."""
    status, out, _ = faceprint("backup", gallery, tmp_path / "backup")
    assert status == 0
    assert "backed up 9 faces" in out
    assert faceprint("verify", tmp_path / "backup")[0] == 0
    faceprint("forget", gallery, "--identity", GONE, "--receipt", tmp_path / "r.json")
    status, out, _ = faceprint("restore", tmp_path / "backup", gallery)
    assert status == 0
    assert "restored 6 faces" in out
    assert "3 that were forgotten since stay so" in out
    new = tmp_path / "new"
    assert faceprint("restore", tmp_path / "backup", new, "--receipt", tmp_path / "r.json")[0] == 0
    assert faces_in(faceprint, new) == 6
    data = b"\0".join(path.read_bytes() for path in new.rglob("*") if path.is_file())
    assert GONE.encode() not in data


def test_a_backup_is_no_gallery_and_a_gallery_is_no_backup(
    faceprint: Faceprint, gallery: Path, photos: Path, tmp_path: Path
) -> None:
    faceprint("backup", gallery, tmp_path / "backup")
    status, _, err = faceprint("search", tmp_path / "backup", photos / "Adi" / "Adi_0.png")
    assert status == 2
    assert "is a backup; make a gallery of it with `faceprint restore" in err
    status, _, err = faceprint("restore", gallery, tmp_path / "new")
    assert status == 2
    assert "is not a backup" in err
    assert not (tmp_path / "new").exists()


def test_people_are_renamed_and_merged_and_their_folders_are_no_conflict(
    faceprint: Faceprint, gallery: Path, photos: Path
) -> None:
    assert faceprint("rename-identity", gallery, "Kim", "Kimberly")[1] == "Kim is Kimberly now (3 faces)\n"
    status, out, _ = faceprint("ingest", gallery, photos)
    assert status == 0
    assert "already known 9" in out
    said, undo = faceprint("merge-identities", gallery, "Kimberly", "Adi")[1].splitlines()
    assert said == "3 faces of Kimberly are Adi's now"
    number = undo.split()[-1]
    assert undo == f"to undo it: faceprint undo-merge {gallery} {number}"
    assert "already known 9" in faceprint("ingest", gallery, photos)[1]
    status, _, err = faceprint("rename-identity", gallery, "Adi", GONE)
    assert status == 2
    assert "merge the two" in err
    (listed,) = faceprint("undo-merge", gallery, "--list")[1].splitlines()
    assert (listed.split()[0], listed.split("  ")[-1]) == (number, "3 faces of Kimberly into Adi")
    assert [one["faces"] for one in json.loads(faceprint("undo-merge", gallery, "--list", "--json")[1])] == [
        3
    ]
    assert faceprint("undo-merge", gallery, number, "--list")[0] == 2
    assert faceprint("undo-merge", gallery)[1] == "Kimberly is a person again, with 3 of 3 faces.\n"
    assert faceprint("undo-merge", gallery, "--list")[1] == "No merge can be undone.\n"
    status, _, err = faceprint("undo-merge", gallery, number)
    assert (status, f"Merge {number} was undone already" in err) == (2, True)
    assert "already known 9" in faceprint("ingest", gallery, photos)[1]


def test_sync_lists_first_and_then_removes_what_is_gone(
    faceprint: Faceprint, gallery: Path, photos: Path
) -> None:
    (photos / "Kim" / "Kim_4.png").unlink()
    (photos / "Adi" / "Adi_3.png").rename(photos / "Adi" / "renamed.png")
    status, out, _ = faceprint("ingest", gallery, photos, "--sync", "--dry-run")
    assert status == 0
    assert "2 files gone from the sources; 1 face would go with them, 1 would be found at another path" in out
    assert faces_in(faceprint, gallery) == 9
    status, out, _ = faceprint("ingest", gallery, photos, "--sync")
    assert status == 0
    assert "already known 8 + duplicate 0" in out
    assert "2 files gone from the sources; 1 face went with them, 1 found at another path" in out
    assert faces_in(faceprint, gallery) == 8


def test_sync_refuses_a_source_without_photos(faceprint: Faceprint, gallery: Path, photos: Path) -> None:
    for path in photos.rglob("*.png"):
        path.unlink()
    status, _, err = faceprint("ingest", gallery, photos, "--sync", "--dry-run")
    assert status == 2
    assert "is it mounted?" in err
    assert faceprint("ingest", gallery, photos, "--sync")[0] == 2
    assert faces_in(faceprint, gallery) == 9


def test_rejected_files_are_tried_again_from_the_report(
    faceprint: Faceprint, gallery: Path, photos: Path, tmp_path: Path
) -> None:
    """Mended, they are enrolled under the identity that the report has."""
    broken = photos / "Zoë" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes(b"")
    report = tmp_path / "report.jsonl"
    assert faceprint("ingest", gallery, photos, "--report", report)[0] == 0
    shutil.copy(photos / "Kim" / "Kim_1.png", broken)
    status, out, _ = faceprint("ingest", gallery, "--retry", report, "--report", tmp_path / "again.jsonl")
    assert "found 1 = enrolled 0 + already known 0 + duplicate 0 + rejected 1" in out
    assert (status, json.loads((tmp_path / "again.jsonl").read_text())["reason"]) == (2, "identity-conflict")
    write_photos(tmp_path / "new", range(50, 51))
    shutil.copy(next((tmp_path / "new").rglob("*.png")), broken)
    status, out, _ = faceprint("ingest", gallery, "--retry", report)
    assert (status, "found 1 = enrolled 1" in out) == (0, True)
    assert "Zoë" in faceprint("search", gallery, broken, "-k", 1)[1]
    assert faceprint("ingest", gallery, "--retry", broken)[0] == 2


@pytest.mark.parametrize(
    "arguments", [[], ["--retry", "r", "photos"], ["--sync", "--retry", "r"], ["photos", "--dry-run"]]
)
def test_ingest_wants_one_kind_of_source(faceprint: Faceprint, gallery: Path, arguments: list[str]) -> None:
    status, _, err = faceprint("ingest", gallery, *arguments)
    assert status == 2
    assert err.startswith("faceprint: ")


def test_embeddings_become_faces_when_somebody_says_whose_they_are(
    faceprint: Faceprint, gallery: Path, model: ModelBundle, tmp_path: Path
) -> None:
    faces = [NewFace("Ann", None, f"{number:064x}") for number in range(5)]
    vectors = [vector_of(face.sha256) for face in faces]
    write_embeddings(
        tmp_path / "e.parquet", [(faces, vectors)], fingerprint=model.fingerprint, dimension=model.dimension
    )
    status, out, _ = faceprint("ingest", gallery, "--embeddings", tmp_path / "e.parquet")
    assert (status, "found 5 = enrolled 5" in out) == (0, True)
    other = tiny_model(tmp_path / "other", seed=1)
    write_embeddings(
        tmp_path / "o.parquet", [(faces, vectors)], fingerprint=other.fingerprint, dimension=other.dimension
    )
    assert faceprint("ingest", gallery, "--embeddings", tmp_path / "o.parquet")[0] == 2
    assert faces_in(faceprint, gallery) == 14


def test_an_export_is_imported_into_a_new_gallery(
    faceprint: Faceprint, gallery: Path, model: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    assert "exported 9 faces" in faceprint("export", gallery, tmp_path / "out")[1]
    assert faceprint("export", gallery, tmp_path / "out")[0] == 2
    assert faceprint("import", tmp_path / "out", tmp_path / "new")[0] == 2
    status, out, _ = faceprint("import", tmp_path / "out", tmp_path / "new", "--model", model.folder)
    assert (status, "found 9 = enrolled 9" in out) == (0, True)
    query = photos / "Kim" / "Kim_1.png"
    assert (
        faceprint("search", gallery, query, "--json")[1]
        == faceprint("search", tmp_path / "new", query, "--json")[1]
    )


def test_reembed_shows_the_drift_switches_goes_back_and_drops(
    faceprint: Faceprint, gallery: Path, model: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    other, query = tiny_model(tmp_path / "other", seed=1), photos / "Kim" / "Kim_1.png"
    before = faceprint("search", gallery, query, "--json")[1]
    status, out, _ = faceprint("reembed", gallery, "--model", other.folder, "--no-switch")
    assert status == 0
    assert "the old model goes on to answer" in out
    assert faceprint("search", gallery, query, "--json")[1] == before
    status, out, _ = faceprint("reembed", gallery, "--model", other.folder)
    assert status == 0
    assert "embedded 0 of 9 faces in this run, 0 lost" in out
    assert "drift, on 9 faces: of the 8 nearest, 100.0% are the same" in out
    assert "the new model answers from now on" in out
    assert faceprint("search", gallery, query, "--json")[1] != before
    assert faceprint("ingest", gallery, photos, "--model", model.folder)[0] == 2
    assert faceprint("reembed", gallery, "--back")[0] == 0
    assert faceprint("search", gallery, query, "--json")[1] == before
    assert faceprint("reembed", gallery, "--drop-other")[1] == "deleted the other model and its 9 vectors\n"
    assert faceprint("reembed", gallery, "--back")[0] == 2
    assert faceprint("verify", gallery)[0] == 0


def test_reembed_stays_where_a_photo_is_gone_unless_it_is_given_up(
    faceprint: Faceprint, gallery: Path, photos: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    (photos / "Kim" / "Kim_4.png").unlink()
    report = tmp_path / "lost.jsonl"
    status, out, err = faceprint("reembed", gallery, "--model", other.folder, "--report", report)
    assert status == 1
    assert "1 lost" in out
    assert "stays with its model" in err
    assert json.loads(report.read_text())["paths"] == [str(photos / "Kim" / "Kim_4.png")]
    assert faceprint("reembed", gallery, "--model", other.folder, "--give-up")[0] == 0
    assert faces_in(faceprint, gallery) == 8
    assert faceprint("verify", gallery)[0] == 0


def test_the_audit_log_says_who_did_what_by_which_command(faceprint: Faceprint, gallery: Path) -> None:
    faceprint("rename-identity", gallery, "Kim", "Kimberly")
    faceprint("compact", gallery)
    entries = json.loads(faceprint("audit-log", gallery, "--json")[1])
    assert [(entry["via"], entry["action"], entry["faces"]) for entry in entries] == [
        ("faceprint ingest", "enroll", 9),
        ("faceprint rename-identity", "rename-identity", 3),
        ("faceprint compact", "compact", 0),
    ]
    assert not any(name in json.dumps(entries) for name in PEOPLE)
    assert "faceprint compact" in faceprint("audit-log", gallery)[1]


@pytest.mark.parametrize(
    "command",
    [
        ["verify"],
        ["repair"],
        ["forget", "--face", "1"],
        ["compact"],
        ["rename-identity", "a", "b"],
        ["merge-identities", "a", "b"],
        ["undo-merge"],
        ["backup", "b"],
        ["export", "e"],
        ["audit-log"],
        ["reembed", "--back"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_says_that_there_is_no_gallery(
    command: list[str], faceprint: Faceprint, tmp_path: Path
) -> None:
    name, *rest = command
    status, out, err = faceprint(name, tmp_path / "none", *rest)
    assert (status, out) == (2, "")
    assert err == f"faceprint: There is no gallery {tmp_path / 'none'}; make one with `faceprint ingest`.\n"
    assert list(tmp_path.iterdir()) == []
