"""Photos that move on disk: `ingest --sync` and `--relabel` against a plain model of what ought to be."""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from retrieval.bulk.ingest import ingest
from retrieval.bulk.reports import IngestReport
from retrieval.database.filters import Where
from retrieval.database.records import Face
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.gallery.relocation import Relocated
from retrieval.gallery.sync import Missing
from retrieval.models.bundle import ModelBundle, Relabel
from retrieval.sources.photos import scan
from retrieval.system.archive_paths import first_present
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import GONE, face, photo, tiny_model, vector_of

__all__ = ["faceprint"]  # pytest finds the fixture by its name

# Nothing here is about what survives a crash, and commits are free where the file system is in memory.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def model(tmp_path: Path) -> ModelBundle:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three photos of A, two of B, one of C."""
    for number, name in enumerate("AAABBC"):
        save(tmp_path / "lib" / name / f"{number}.png", number)
    return tmp_path / "lib"


@pytest.fixture
def gallery(tmp_path: Path, library: Path, model: ModelBundle) -> Iterator[Gallery]:
    with Gallery.create(tmp_path / "gallery", model) as made:
        ingest(made, [library])
        made.annotate(
            identities={"A": {"badge": 1}, "B": {"badge": 2, "floor": 3}}, faces={1: {"year": 2020}}
        )
        yield made


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(number).resize((16, 16)).save(path)


def faces_of(gallery: Gallery) -> list[Face]:
    with gallery.vault.store.read() as reader:
        return [face for part in reader.all_faces() for face in part]


def found(gallery: Gallery, library: Path) -> dict[str, tuple[int, str | None]]:
    """Face and identity of each known path, relative to the library."""
    return {
        os.path.relpath(path, library): (face.id, face.identity)
        for face in faces_of(gallery)
        for path in face.paths
    }


def sync(gallery: Gallery, library: Path) -> tuple[Missing, IngestReport]:
    """As `faceprint ingest --sync`; the dry run says beforehand what is done."""
    expected = gallery.missing_files([library])
    done = gallery.remove_missing([library])
    assert done == expected
    report = ingest(gallery, [library])
    assert report.found == report.enrolled + report.known + report.duplicate + report.rejected
    return done, report


def test_a_person_whose_folder_was_renamed_is_renamed_with_everything_that_was_said(
    gallery: Gallery, library: Path
) -> None:
    (library / "A").rename(library / "D")
    done, report = sync(gallery, library)
    assert [(one.name, one.new_name, one.faces, one.merged) for one in done.renamed] == [("A", "D", 3, False)]
    assert (len(done.paths), done.faces, len(done.moved), done.kept) == (3, (), 3, ())
    assert (report.known, report.rejected, report.enrolled) == (6, 0, 0)
    assert found(gallery, library) == {
        **{f"D/{n}.png": (n + 1, "D") for n in range(3)},
        **{f"B/{n}.png": (n + 1, "B") for n in (3, 4)},
        "C/5.png": (6, "C"),
    }
    assert gallery.identity_metadata(["D", "A"]) == {"D": {"badge": 1}}
    assert faces_of(gallery)[0].metadata == {"year": 2020}


@pytest.mark.parametrize("name", [os.fsdecode(b"D\xff"), "D\tE"])
def test_bytes_that_lie_where_nothing_can_be_enrolled_are_not_erased(
    name: str, gallery: Gallery, library: Path
) -> None:
    """Their name is not UTF-8, or has a control character; the faces stay until somebody mends that."""
    before = found(gallery, library)
    (library / "A").rename(library / name)
    done, report = sync(gallery, library)
    assert ([one.face.id for one in done.kept], done.faces, done.moved) == ([1, 2, 3], (), ())
    assert report.rejected == 3
    assert found(gallery, library) == before
    (library / name).rename(library / "D")
    done, report = sync(gallery, library)
    assert ([one.new_name for one in done.renamed], report.rejected) == (["D"], 0)


def barred(monkeypatch: pytest.MonkeyPatch, folder: Path, error: int) -> None:
    """Lets a folder not be listed: permissions do not stop root, and no disk here fails on demand."""
    real = os.scandir

    def scandir(path: str | os.PathLike[str]) -> Any:
        if os.fspath(path) == str(folder):
            raise OSError(error, os.strerror(error), str(folder))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_faces_are_held_back_where_a_folder_cannot_be_listed(
    error: int, gallery: Gallery, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files were renamed in it, one was moved into it, another is gone, and another follows its bytes."""
    before = found(gallery, library)
    for number in (0, 1):
        (library / "A" / f"{number}.png").rename(library / "A" / f"new {number}.png")
    (library / "B" / "3.png").rename(library / "A" / "3.png")
    (library / "C" / "5.png").unlink()
    (library / "B" / "4.png").rename(library / "B" / "new.png")
    with monkeypatch.context() as patched:
        barred(patched, library / "A", error)
        done, report = sync(gallery, library)
    assert ([one.id for one in done.held], done.faces, done.kept) == ([1, 2, 4, 6], (), ())
    assert [one.path for one in done.unseen] == [str(library / "A")]
    assert ([one.id for one in done.moved], report.rejected) == ([5], 1)
    after = {**before, "B/new.png": before["B/4.png"]}
    del after["B/4.png"]
    assert found(gallery, library) == after
    (library / "A" / "3.png").rename(library / "B" / "3.png")
    done, report = sync(gallery, library)
    assert ([one.id for one in done.faces], [one.id for one in done.moved]) == ([6], [1, 2])
    assert (done.held, done.unseen, report.rejected) == ((), (), 0)
    assert faces_of(gallery)[0].metadata == {"year": 2020}


@pytest.mark.parametrize("target", ["nowhere.png", "x" * 300])
def test_faces_are_held_back_where_a_file_cannot_be_read(
    target: str, gallery: Gallery, library: Path
) -> None:
    """A link to a disk that is not mounted, say, also at a known path; a person is renamed meanwhile."""
    (library / "A" / "0.png").unlink()
    (library / "A" / "0.png").symlink_to(target)
    (library / "C" / "5.png").unlink()
    (library / "B").rename(library / "D")
    done, report = sync(gallery, library)
    # A link with too long a target cannot be looked at, so its own face is not lost; 6 may have moved there.
    assert ([one.id for one in done.held], done.faces) == ([6] if len(target) > 99 else [1, 6], ())
    assert [one.path for one in done.unseen] == [str(library / "A" / "0.png")]
    assert ([one.new_name for one in done.renamed], report.rejected) == (["D"], 1)
    assert found(gallery, library)["A/0.png"] == (1, "A")
    (library / "A" / "0.png").unlink()
    done, _ = sync(gallery, library)
    assert ([one.id for one in done.faces], done.held) == ([1, 6], ())


def test_a_file_that_the_disk_does_not_read_holds_back_what_may_have_its_bytes(
    gallery: Gallery, library: Path
) -> None:
    """By their number, where that is known of every face that would go."""
    if not Path("/proc/self/mem").is_file():
        pytest.skip("there is no /proc/self/mem, a regular file whose first byte cannot be read")
    (library / "B" / "x.png").symlink_to("/proc/self/mem")  # of no bytes
    (library / "A" / "0.png").unlink()
    done = gallery.missing_files([library])
    assert ([one.id for one in done.held], done.faces) == ([1], ())
    assert [(one.path, one.why) for one in done.unseen] == [
        (str(library / "B" / "x.png"), "Input/output error")
    ]
    save(library / "A" / "0.png", 0)
    for path in library.rglob("[0-9].png"):
        os.utime(path, (1e9, 1e9))
    ingest(gallery, [library])
    (library / "A" / "0.png").unlink()
    done = gallery.missing_files([library])
    assert ([one.id for one in done.faces], done.held, done.unseen) == ([1], (), ())


def test_faces_are_held_back_where_an_archive_or_a_member_of_it_is_damaged(
    gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(library / "B" / "3.png", "3.png")
    whole = packed.read_bytes()
    (library / "A" / "0.png").unlink()
    assert [one.id for one in gallery.missing_files([library, packed]).faces] == [1]
    first = (library / "B" / "3.png").read_bytes()
    for damaged, place in (
        (whole[:-9], packed),
        (whole.replace(first, bytes(len(first))), packed / "3.png"),
    ):
        assert damaged != whole
        packed.write_bytes(damaged)
        done = gallery.missing_files([library, packed])
        assert ([one.id for one in done.held], done.faces) == ([1], ())
        assert [one.path for one in done.unseen] == [str(place)]


def test_a_source_that_a_stray_file_hides_as_a_whole_is_refused_with_the_reason(
    gallery: Gallery, library: Path
) -> None:
    (library / "backup.json").touch()
    with pytest.raises(InputError, match="7 files in 1 folder of models, galleries and backups"):
        gallery.missing_files([library])


@pytest.mark.parametrize("stray", ["backup.json", "bundle.json", "gallery.db"])
def test_photos_that_a_stray_file_hides_are_kept_wherever_they_were_moved(
    stray: str, gallery: Gallery, library: Path
) -> None:
    """Within the folder, into it, together with it; also below it. What is gone goes."""
    before = found(gallery, library)
    (library / "A" / "0.png").rename(library / "A" / "new.png")
    (library / "B" / "3.png").rename(library / "A" / "3.png")
    (library / "A" / "below").mkdir()
    (library / "A" / "1.png").rename(library / "A" / "below" / "1.png")
    (library / "C" / "5.png").unlink()
    (library / "A" / stray).write_text("{}")
    done, _ = sync(gallery, library)
    assert [(one.face.id, one.paths) for one in done.kept] == [
        (1, (str(library / "A" / "new.png"),)),
        (2, (str(library / "A" / "below" / "1.png"),)),
        (4, (str(library / "A" / "3.png"),)),
    ]
    assert ([one.id for one in done.faces], done.held) == ([6], ())
    del before["C/5.png"]
    assert found(gallery, library) == before
    (library / "A" / stray).unlink()
    done, _ = sync(gallery, library)
    assert ([one.id for one in done.moved], done.faces) == ([1, 2], ())


def test_paths_that_patterns_pass_over_say_nothing_until_they_are_looked_at(
    gallery: Gallery, library: Path
) -> None:
    """What exists there stays, what is gone is held back; what is moved into a recycle bin is gone."""
    before = found(gallery, library)
    (library / "A" / "0.png").unlink()
    (library / "C" / "@Recycle").mkdir()
    (library / "C" / "5.png").rename(library / "C" / "@Recycle" / "5.png")
    (library / ".faceprintignore").write_text("/A\n")
    done, report = sync(gallery, library)
    assert [one.id for one in done.held] == [1]
    assert [(one.path, one.rule) for one in done.unseen] == [(str(library / "A" / "0.png"), "/A")]
    assert ([one.id for one in done.faces], report.found) == ([6], 2)
    del before["C/5.png"]
    assert found(gallery, library) == before
    assert [one.id for one in gallery.missing_files([library], gone=[library / "A"]).faces] == [1]
    (library / ".faceprintignore").unlink()
    done, _ = sync(gallery, library)
    assert ([one.id for one in done.faces], done.held) == ([1], ())


def test_the_command_says_what_could_not_be_looked_at_and_how_to_go_on(
    faceprint: Faceprint, gallery: Gallery, library: Path
) -> None:
    (library / "A" / "0.png").unlink()
    (library / "D").symlink_to("not mounted")
    arguments = ("ingest", gallery.folder, library, "--sync")
    expected = [
        "0 files gone from the sources; 0 faces would go with them",
        "  would be held back: face 1, A, " + str(library / "A" / "0.png"),
        "1 face would be held back, because the photos may be where nothing could be looked at: "
        f"{library / 'D'} (there is no such file); make that readable, or leave it out with --exclude, "
        "and run this again; or remove them with `faceprint forget`",
    ]
    assert faceprint(*arguments, "--dry-run")[1].splitlines() == expected
    out = faceprint(*arguments, "--log-json")[1]
    (event,) = [json.loads(line) for line in out.splitlines() if '"event": "sync"' in line]
    assert [face["id"] for face in event["held"]] == [1]
    assert event["unseen"] == {str(library / "D"): "there is no such file"}
    status, out, _ = faceprint(*arguments, "--exclude", "/D")
    assert (status, "1 file gone from the sources; 1 face went with them" in out) == (0, True)


def test_two_people_whose_folders_exchanged_names_exchange_their_names(
    gallery: Gallery, library: Path
) -> None:
    """Also where the names of their files are the same, so that no path is gone."""
    (library / "B" / "3.png").rename(library / "B" / "0.png")
    (library / "B" / "4.png").rename(library / "B" / "1.png")
    sync(gallery, library)
    for name, new_name in (("A", "x"), ("B", "A"), ("x", "B")):
        (library / name).rename(library / new_name)
    done, _ = sync(gallery, library)
    assert [(one.name, one.new_name, one.merged) for one in done.renamed] == [
        ("A", "B", False),
        ("B", "A", False),
    ]
    assert found(gallery, library) == {
        **{f"B/{n}.png": (n + 1, "B") for n in range(3)},
        **{f"A/{n}.png": (n + 4, "A") for n in (0, 1)},
        "C/5.png": (6, "C"),
    }
    assert gallery.identity_metadata(["A", "B"]) == {"B": {"badge": 1}, "A": {"badge": 2, "floor": 3}}


def test_labels_that_are_exchanged_take_the_photos_of_their_people_along(model: ModelBundle) -> None:
    """Also where it is done again, after a crash."""
    split = {"train": ["Adi/1.png", "Kim/2.png", "Kimberly/3.png"]}
    changes = {0: Relabel("Kim", keep_photos=True), 1: Relabel("Adi", keep_photos=True)}
    changed = dataclasses.replace(model, split=split).relabelled(changes)
    assert changed.labels == ("Kim", "Adi", GONE)
    assert changed.split == {"train": ["Kim/1.png", "Adi/2.png", "Kimberly/3.png"]}
    assert changed.relabelled(changes) == changed


def test_a_chain_of_renamed_folders_is_followed_at_once(gallery: Gallery, library: Path) -> None:
    for name, new_name in (("C", "D"), ("B", "C"), ("A", "B")):
        (library / name).rename(library / new_name)
    done, _ = sync(gallery, library)
    assert [(one.name, one.new_name) for one in done.renamed] == [("A", "B"), ("B", "C"), ("C", "D")]
    assert dict(found(gallery, library).values()) == {
        **dict.fromkeys((1, 2, 3), "B"),
        **dict.fromkeys((4, 5), "C"),
        6: "D",
    }


@pytest.mark.parametrize("target", ["B", "D"])
def test_folders_that_became_one_are_one_person(target: str, gallery: Gallery, library: Path) -> None:
    """Of B, who keeps the name, the metadata win; of two who both get a new one, those of the older."""
    (library / target).mkdir(exist_ok=True)
    for name in {"A", "B"} - {target}:
        for path in (library / name).iterdir():
            path.rename(library / target / path.name)
        (library / name).rmdir()
    done, _ = sync(gallery, library)
    assert done.kept == done.faces == ()
    names = dict(found(gallery, library).values())
    assert names == {**dict.fromkeys(range(1, 6), target), 6: "C"}
    badge = 2 if target == "B" else 1
    assert gallery.identity_metadata([target]) == {target: {"badge": badge, "floor": 3}}


def test_part_of_a_person_under_another_name_stays_and_is_said(gallery: Gallery, library: Path) -> None:
    (library / "D").mkdir()
    (library / "A" / "0.png").rename(library / "D" / "0.png")
    for _ in range(2):
        done, report = sync(gallery, library)
        assert (done.paths, done.faces, done.renamed, done.moved) == ((), (), (), ())
        assert [(one.face.id, one.paths, one.identities) for one in done.kept] == [
            (1, (str(library / "D" / "0.png"),), ("D",))
        ]
        assert (report.known, report.rejected) == (5, 1)
        assert found(gallery, library)["A/0.png"] == (1, "A")
    relabelled = gallery.relabel(scan([library]))
    assert [(face.id, name) for face, name in zip(relabelled.faces, relabelled.identities, strict=True)] == [
        (1, "D")
    ]
    done, report = sync(gallery, library)
    assert (done.kept, len(done.moved), report.known) == ((), 1, 6)
    assert found(gallery, library)["D/0.png"] == (1, "D")
    assert "A/0.png" not in found(gallery, library)


def test_photos_that_were_exchanged_across_people_go_when_their_files_are_deleted(
    gallery: Gallery, library: Path
) -> None:
    a, b = library / "A" / "0.png", library / "B" / "3.png"
    a.rename(library / "spare")
    b.rename(a)
    (library / "spare").rename(b)
    done, report = sync(gallery, library)
    assert [(one.face.id, one.paths, one.identities) for one in done.kept] == [
        (1, (str(b),), ("B",)),
        (4, (str(a),), ("A",)),
    ]
    assert report.rejected == 2
    assert (found(gallery, library)["B/3.png"], found(gallery, library)["A/0.png"]) == ((1, "A"), (4, "B"))
    _, report = sync(gallery, library)
    assert report.rejected == 2
    a.unlink()
    b.unlink()
    done, _ = sync(gallery, library)
    assert [face.id for face in done.faces] == [1, 4]
    assert [face.id for face in faces_of(gallery)] == [2, 3, 5, 6]


def test_bytes_that_a_run_saw_are_not_erased_when_their_path_is_given_to_others(
    gallery: Gallery, library: Path
) -> None:
    """The conflict comes first, in the order of the names; the replacement in another batch."""
    (library / "0").mkdir()
    (library / "A" / "0.png").rename(library / "0" / "0.png")
    save(library / "A" / "0.png", 50)
    report = ingest(gallery, [library], batch_size=1)
    assert (report.enrolled, report.rejected) == (1, 1)
    assert {face.id: face.identity for face in faces_of(gallery)}[1] == "A"


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("turn", [1, 2])
def test_files_that_were_renamed_in_a_circle_keep_their_faces_without_sync(
    turn: int, batch_size: int, gallery: Gallery, library: Path
) -> None:
    """In either direction; a photo that another one was renamed onto, and that lies nowhere, goes."""
    said = [{"year": 2020}, {"year": 2021}, {"year": 2022}]
    gallery.annotate(faces=dict(enumerate(said, 1)))
    for number in range(3):
        (library / "A" / f"{number}.png").rename(library / "A" / f"{number}.moved")
    for number in range(3):
        (library / "A" / f"{number}.moved").rename(library / "A" / f"{(number + turn) % 3}.png")
    (library / "B" / "4.png").rename(library / "B" / "3.png")
    report = ingest(gallery, [library], batch_size=batch_size)
    assert (report.enrolled, report.rejected) == (0, 0)
    assert {path: number for path, (number, _) in found(gallery, library).items() if path != "B/4.png"} == {
        **{f"A/{(number + turn) % 3}.png": number + 1 for number in range(3)},
        "B/3.png": 5,
        "C/5.png": 6,
    }
    assert [one.metadata for one in faces_of(gallery)] == [*said, {}, {}]


def test_what_is_gone_below_a_folder_that_is_gone_is_removed_only_when_it_is_named(
    gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    save(tmp_path / "other" / "E" / "e.png", 70)
    ingest(gallery, [tmp_path / "other"])
    shutil.rmtree(library)
    assert gallery.remove_missing([tmp_path / "other"]).paths == ()
    done = gallery.remove_missing([tmp_path / "other"], gone=[library])
    assert (len(done.paths), len(done.faces)) == (6, 6)
    assert [face.identity for face in faces_of(gallery)] == ["E"]


def test_a_wrong_layout_is_put_right_by_relabelling_and_back(
    tmp_path: Path, library: Path, model: ModelBundle
) -> None:
    """The people come from the wrong folder, then from the right one, then from the wrong one again."""
    top = tmp_path / "top"
    top.mkdir()
    library.rename(top / "people")
    with Gallery.create(tmp_path / "gallery", model) as gallery:
        ingest(gallery, [top])
        assert gallery.info().largest == (("people", 6),)
        assert ingest(gallery, [top / "people"]).rejected == 6
        listed = gallery.relabel(scan([top / "people"]), dry_run=True)
        assert gallery.info().largest == (("people", 6),)
        assert gallery.relabel(scan([top / "people"])) == listed
        assert gallery.info().largest == (("A", 3), ("B", 2), ("C", 1))
        assert ingest(gallery, [top / "people"]).known == 6
        assert len(gallery.relabel(scan([top])).faces) == 6
        assert gallery.info().largest == (("people", 6),)
        assert [entry.action for entry in gallery.audit_log()].count("relabel") == 2
    assert verify(tmp_path / "gallery").whole


def test_a_photo_that_lies_under_both_names_is_not_relabelled(gallery: Gallery, library: Path) -> None:
    shutil.copy(library / "A" / "0.png", library / "B" / "copy.png")
    done = gallery.relabel(scan([library]))
    assert (done.faces, [one.face.id for one in done.kept]) == ((), [1])


def test_of_the_paths_of_a_photo_one_that_exists_is_shown(
    gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    """In answers and in what is said of duplicates, also where a search is for those below a folder."""
    shutil.copytree(library, tmp_path / "lib2")
    ingest(gallery, [tmp_path / "lib2"])
    probe = photo(0).resize((16, 16))
    assert gallery.search(probe, 1).matches[0].face.path == str(library / "A" / "0.png")
    below = Where(path_prefixes=(str(tmp_path / "lib2"),))
    assert gallery.search(probe, 1, where=below).matches[0].face.path == str(tmp_path / "lib2/A/0.png")
    (person,) = gallery.search_people([probe], 1, where=below)[0].people
    assert person.matches[0].face.path == str(tmp_path / "lib2/A/0.png")
    shutil.copytree(tmp_path / "lib2" / "A", tmp_path / "lib2" / "A" / "copies")
    ingest(gallery, [tmp_path / "lib2"])
    shutil.rmtree(library)
    assert gallery.search(probe, 1).matches[0].face.path == str(tmp_path / "lib2/A/0.png")
    # Of the paths that were asked for one that exists, and one that does not before any other.
    (tmp_path / "lib2" / "A" / "0.png").unlink()
    assert gallery.search(probe, 1, where=below).matches[0].face.path == str(tmp_path / "lib2/A/copies/0.png")
    gone = Where(path_prefixes=(str(library),))
    assert gallery.search(probe, 1, where=gone).matches[0].face.path == str(library / "A" / "0.png")
    (person,) = gallery.search_people([probe], 1, where=gone)[0].people
    assert person.matches[0].face.path == str(library / "A" / "0.png")
    assert gallery.search(probe, 1).matches[0].face.path == str(tmp_path / "lib2/A/copies/0.png")
    shutil.rmtree(tmp_path / "lib2")
    assert gallery.search(probe, 1).matches[0].face.path == str(library / "A" / "0.png")


def test_an_address_is_shown_after_files_that_exist_and_is_not_fetched(tmp_path: Path) -> None:
    """So are members of archives that are there."""
    (tmp_path / "a.png").touch()
    (tmp_path / "b.tar").touch()
    url, gone = "https://example.invalid/a.png", str(tmp_path / "gone.png")
    assert first_present([url, gone]) == url
    assert first_present([gone, url]) == url
    assert first_present([url, gone, str(tmp_path / "a.png")]) == str(tmp_path / "a.png")
    assert first_present([gone, str(tmp_path / "b.tar" / "x.png")]) == str(tmp_path / "b.tar" / "x.png")
    assert first_present([gone, str(tmp_path / "a.png" / "x.png")]) == gone
    assert first_present([]) is None


def test_a_library_that_was_moved_is_relocated_and_known_without_being_read(
    gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    for path in library.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    ingest(gallery, [library])
    library.rename(tmp_path / "moved")
    before = found(gallery, library)
    listed = gallery.relocate(library, tmp_path / "moved", dry_run=True)
    assert found(gallery, library) == before
    assert gallery.relocate(library, tmp_path / "moved") == listed == Relocated(6, 6, 6, ())
    assert found(gallery, tmp_path / "moved") == before
    assert all(gallery.recognize(list(scan([tmp_path / "moved"]))))
    assert gallery.audit_log()[-1].detail == {"files": 6, "left": 0}
    gallery.relocate(tmp_path / "moved", library)
    assert found(gallery, library) == before


def test_a_copied_library_is_read_again_after_it_was_relocated(
    gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    for path in library.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    ingest(gallery, [library])
    shutil.copytree(library, tmp_path / "copy")
    assert gallery.relocate(library, tmp_path / "copy").present == 6
    assert not any(gallery.recognize(list(scan([tmp_path / "copy"]))))
    assert ingest(gallery, [tmp_path / "copy"]).known == 6


def test_relocating_changes_paths_at_the_boundary_of_folders_only(tmp_path: Path, model: ModelBundle) -> None:
    """Below each other, into known places of the same face and of others, and members of archives."""
    paths = ["/a/1.png", "/a/b/2.png", "/a/b/b/3.png", "/ab/4.png", "/a/x.tar/5.png", "/c/1.png", "/c/6.png"]
    with Gallery.create(tmp_path / "gallery", model) as gallery:
        add_paths(gallery, {path: number for number, path in enumerate(paths)})
        gallery.relocate("/a", "/a/b")
        assert all_paths(gallery) == {
            0: {"/a/b/1.png"},
            1: {"/a/b/b/2.png"},
            2: {"/a/b/b/b/3.png"},
            3: {"/ab/4.png"},
            4: {"/a/b/x.tar/5.png"},
            5: {"/c/1.png"},
            6: {"/c/6.png"},
        }
        gallery.relocate("/a/b/", "/a/")
        assert all_paths(gallery) == {number: {path} for number, path in enumerate(paths)}
        add_paths(gallery, {"/a/6.png": 6})
        assert gallery.relocate("/a", "/c") == Relocated(4, 4, 0, ("/a/1.png",))
        assert all_paths(gallery) == {
            0: {"/a/1.png"},
            1: {"/c/b/2.png"},
            2: {"/c/b/b/3.png"},
            3: {"/ab/4.png"},
            4: {"/c/x.tar/5.png"},
            5: {"/c/1.png"},
            6: {"/c/6.png"},
        }
        with pytest.raises(InputError, match="knows no file /nowhere and none below it"):
            gallery.relocate("/nowhere", "/c")
        with pytest.raises(InputError, match="both the old root and the new one"):
            gallery.relocate("/c", "/c/")


def add_paths(gallery: Gallery, numbers: dict[str, int]) -> None:
    faces = [face(number, path=path) for path, number in numbers.items()]
    gallery.enroll_vectors(faces, np.stack([vector_of(one.sha256) for one in faces]))


def all_paths(gallery: Gallery) -> dict[int, set[str]]:
    numbers = {face(number).sha256: number for number in range(9)}
    return {numbers[one.sha256]: set(one.paths) for one in faces_of(gallery)}


def test_the_command_relocates_and_says_what_is_there(
    faceprint: Faceprint, gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    library.rename(tmp_path / "moved")
    arguments = ("relocate", gallery.folder, library, tmp_path / "moved")
    expected = "6 paths of 6 faces would be relocated; 6 of these files are there\n"
    assert faceprint(*arguments, "--dry-run")[1] == expected
    assert faceprint(*arguments)[1] == expected.replace("would be ", "")
    status, _, err = faceprint(*arguments)
    assert (status, "knows no file" in err) == (2, True)


def test_the_command_follows_a_library_that_was_moved_and_says_so(
    faceprint: Faceprint, gallery: Gallery, library: Path, tmp_path: Path
) -> None:
    """A person was renamed on the way, and one photo was put to somebody else."""
    library.rename(tmp_path / "moved")
    (tmp_path / "moved" / "A").rename(tmp_path / "moved" / "Z")
    (tmp_path / "moved" / "B" / "3.png").rename(tmp_path / "moved" / "C" / "3.png")
    arguments = ("ingest", gallery.folder, tmp_path / "moved", "--sync", "--gone", library)
    status, out, _ = faceprint(*arguments, "--dry-run")
    assert (status, out.splitlines()) == (
        0,
        [
            "  A: would be renamed to Z (3 faces)",
            f"  would be kept: face 4, B; its bytes are at {tmp_path / 'moved' / 'C' / '3.png'} (C)",
            "5 files gone from the sources; 0 faces would go with them, 5 would be found at another path, "
            "1 would be kept",
        ],
    )
    status, out, _ = faceprint(*arguments, "--log-json")
    (event,) = [json.loads(line) for line in out.splitlines() if '"event": "sync"' in line]
    assert (status, event["done"], event["files"], event["faces"], len(event["moved"])) == (0, True, 5, [], 5)
    assert event["renamed"] == [{"name": "A", "new_name": "Z", "faces": 3, "merged": False}]
    assert [kept["id"] for kept in event["kept"]] == [4]
    status, out, _ = faceprint(*arguments, "--relabel")
    assert (status, "1 face relabelled" in out, "already known 6" in out) == (0, True, True)
    assert found(gallery, tmp_path / "moved") == {
        **{f"Z/{n}.png": (n + 1, "Z") for n in range(3)},
        "C/3.png": (4, "C"),
        "B/4.png": (5, "B"),
        "C/5.png": (6, "C"),
    }


def one_of_a_under_another_name(library: Path) -> None:
    (library / "D").mkdir()
    (library / "A" / "0.png").rename(library / "D" / "0.png")


def a_folder_renamed(library: Path) -> None:
    (library / "A").rename(library / "D")


def two_folders_exchanged(library: Path) -> None:
    (library / "A").rename(library / "spare")
    (library / "B").rename(library / "A")
    (library / "spare").rename(library / "B")


def a_photo_exchanged_and_one_deleted(library: Path) -> None:
    (library / "C" / "5.png").rename(library / "B" / "5.png")
    (library / "A" / "1.png").unlink()


@pytest.mark.parametrize(
    "change",
    [
        one_of_a_under_another_name,
        a_folder_renamed,
        two_folders_exchanged,
        a_photo_exchanged_and_one_deleted,
    ],
)
def test_a_dry_run_lists_what_relabelling_and_then_following_moved_files_does(
    change: Callable[[Path], None],
    faceprint: Faceprint,
    gallery: Gallery,
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second follows from the first. The dry run changes nothing and leaves nothing."""
    change(library)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    arguments = ("ingest", gallery.folder, library, "--sync", "--relabel", "--log-json")
    before = faces_of(gallery)
    said = []
    for options in (("--dry-run",), ("--dry-run",), ()):
        status, out, _ = faceprint(*arguments, *options)
        events = [json.loads(line) for line in out.splitlines()]
        changes = [event for event in events if event["event"] in ("relabel", "sync")]
        assert (status, [event.pop("done") for event in changes]) == (0, [not options] * 2)
        said.append(changes)
        if options:
            assert faces_of(gallery) == before
    assert said[0] == said[1] == said[2]
    assert not list((tmp_path / "temporary").iterdir())


# Any order of renames, moves, copies, edits and deletions

FOLDERS = ["", "A", "B", "C", "D"]
FILES = ["1.png", "2.png", "3.png"]
PATHS = [os.path.join(folder, name) for folder in FOLDERS for name in FILES]


@dataclass
class Enrolled:
    """What a gallery ought to hold, by the numbers of photos; people are known by their names."""

    people: dict[int, str | None] = field(default_factory=dict)
    paths: dict[int, set[str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def after_sync(self, disk: dict[str, int]) -> None:
        """Follows what has moved, then enrolls, as `ingest --sync` is documented to do."""
        before = {number: set(paths) for number, paths in self.paths.items()}
        owners = {path: number for number, paths in self.paths.items() for path in paths}
        dead = {path for path, number in owners.items() if disk.get(path) != number}
        lost = {number for number, paths in self.paths.items() if paths and paths <= dead}
        places = {number: {path for path in disk if disk[path] == number} for number in lost}
        places = {number: paths for number, paths in places.items() if paths}
        self.rename(self.whole_people(places, leaving=lost - places.keys()))
        for number, paths in places.items():
            said = {self.said(path) for path in paths} - {None}
            name = self.people[number]
            if name is None:
                agreed = paths if len(said) < 2 else set()
            else:
                agreed = {path for path in paths if self.said(path) in (None, name)}
            if agreed:
                for others in self.paths.values():
                    others -= agreed
                self.paths[number] = agreed
            elif before[number] <= disk.keys():  # other bytes have all of its paths
                for others in self.paths.values():
                    others -= paths
                self.paths[number] = set(paths)
            else:  # it stays where it was, but for paths that other bytes have
                self.paths[number] -= disk.keys()
        for number in self.paths.keys() - places.keys():
            self.paths[number] -= dead - disk.keys()
        # An empty set of paths is that of somebody who is gone, unless the bytes were seen.
        self.drop({number for number, paths in self.paths.items() if not paths} - set(disk.values()))
        self.enroll(disk)

    def enroll(self, disk: dict[str, int]) -> None:
        for path in sorted(disk):
            number, said = disk[path], self.said(path)
            if self.people.get(number) is not None and said not in (None, self.people[number]):
                continue
            for others in self.paths.values():
                others.discard(path)
            self.people[number] = self.people.get(number) or said
            self.paths.setdefault(number, set()).add(path)
        self.drop({number for number, paths in self.paths.items() if not paths} - set(disk.values()))

    def said(self, path: str) -> str | None:
        folder = os.path.dirname(path)
        return self.aliases.get(folder, folder) or None

    def whole_people(self, places: dict[int, set[str]], leaving: set[int]) -> dict[str, str]:
        """New names of those all of whose photos that exist were lost and lie under one other name now."""
        moved: dict[str, tuple[str, bool]] = {}
        for person in {name for name in self.people.values() if name is not None}:
            photos = [n for n, name in self.people.items() if name == person and n not in leaving]
            said = [{self.said(path) for path in places.get(number, ())} - {None} for number in photos]
            if photos and all(len(names) == 1 for names in said) and len(set().union(*said)) == 1:
                (name,) = set().union(*said)
                assert name is not None
                former = any(
                    os.path.dirname(path) in self.aliases for number in photos for path in places[number]
                )
                if name != person:
                    moved[person] = (name, former)
        return {old: new for old, (new, former) in moved.items() if not (former and new in moved)}

    def rename(self, names: dict[str, str]) -> None:
        self.people = {number: names.get(name or "", name) for number, name in self.people.items()}
        self.aliases = {alias: names.get(name, name) for alias, name in self.aliases.items()}

    def drop(self, numbers: set[int]) -> None:
        for number in numbers:
            del self.people[number], self.paths[number]
        alive = set(self.people.values())
        self.aliases = {alias: name for alias, name in self.aliases.items() if name in alive}


class Disk(RuleBasedStateMachine):
    """A library on disk, and a gallery that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory(dir=IN_MEMORY, prefix="faceprint-")
        self.root = Path(self.temporary.name) / "lib"
        self.root.mkdir()
        self.disk: dict[str, int] = {}
        self.ought = Enrolled()
        self.newest = 0
        shutil.copytree(TEMPLATE[0], Path(self.temporary.name) / "gallery")
        self.gallery = Gallery.open(Path(self.temporary.name) / "gallery")

    def teardown(self) -> None:
        try:
            if self.disk:
                self.sync(2)
        finally:
            self.gallery.close()
            self.temporary.cleanup()

    def lay(self, wanted: dict[str, int]) -> None:
        """Makes the disk so; a file that moves is the same file, as after `mv`."""
        spare = Path(self.temporary.name) / "spare"
        spare.mkdir(exist_ok=True)
        left = dict(self.disk)
        for path, number in left.items():
            (self.root / path).rename(spare / f"{number}-{path.replace('/', '-')}")
        for path, number in wanted.items():
            source = next(iter(sorted(spare.glob(f"{number}-*"))), None)
            (self.root / path).parent.mkdir(exist_ok=True)
            if source is None:
                (self.root / path).write_bytes(picture(number))
                # Old enough to be known by its time, which is another one for other bytes.
                os.utime(self.root / path, (1e9 + number, 1e9 + number))
            else:
                source.rename(self.root / path)
        for path in self.root.iterdir():
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        shutil.rmtree(spare)
        self.disk = wanted

    @initialize(paths=st.sets(st.sampled_from(PATHS), min_size=1, max_size=8))
    def enroll(self, paths: set[str]) -> None:
        self.lay({path: number for number, path in enumerate(sorted(paths))})
        self.newest = len(paths)
        self.sync(64)

    @rule(names=st.dictionaries(st.sampled_from(FOLDERS), st.sampled_from(FOLDERS), max_size=4))
    def rename_folders(self, names: dict[str, str]) -> None:
        """Any of them to any others at once: exchanged, in a chain, into one."""
        wanted: dict[str, int] = {}
        for path, number in self.disk.items():
            folder, name = os.path.split(path)
            wanted[os.path.join(names.get(folder, folder), name)] = number
        self.lay(wanted)

    @rule(paths=st.dictionaries(st.sampled_from(PATHS), st.sampled_from(PATHS), max_size=3))
    def move_files(self, paths: dict[str, str]) -> None:
        self.lay({paths.get(path, path): number for path, number in self.disk.items()})

    @rule(path=st.sampled_from(PATHS), to=st.sampled_from(PATHS))
    def copy_a_file(self, path: str, to: str) -> None:
        if path in self.disk:
            self.lay({**self.disk, to: self.disk[path]})

    @rule(path=st.sampled_from(PATHS))
    def write_a_file(self, path: str) -> None:
        self.newest += 1
        self.lay({**self.disk, path: self.newest})

    @rule(path=st.sampled_from(PATHS))
    def delete_a_file(self, path: str) -> None:
        if path in self.disk and len(self.disk) > 1:
            self.lay({known: number for known, number in self.disk.items() if known != path})

    @rule(name=st.sampled_from(FOLDERS[1:]), new_name=st.sampled_from(FOLDERS[1:]))
    def give_somebody_another_name(self, name: str, new_name: str) -> None:
        alive = set(self.ought.people.values())
        if name in alive and new_name not in alive:
            self.gallery.rename_identity(name, new_name)
            self.ought.aliases.pop(new_name, None)
            self.ought.rename({name: new_name})
            self.ought.aliases[name] = new_name

    @rule(batch_size=st.sampled_from([1, 2, 64]))
    def sync(self, batch_size: int) -> None:
        expected = self.gallery.missing_files([self.root])
        assert self.gallery.remove_missing([self.root]) == expected
        report = ingest(self.gallery, [self.root], batch_size=batch_size, workers=1)
        assert report.found == len(self.disk)
        assert report.found == report.enrolled + report.known + report.duplicate + report.rejected
        self.ought.after_sync(self.disk)
        holds = {face.sha256: (face.identity, {*face.paths}) for face in faces_of(self.gallery)}
        assert holds == {
            hashlib.sha256(picture(number)).hexdigest(): (
                self.ought.people[number],
                {str(self.root / path) for path in paths},
            )
            for number, paths in self.ought.paths.items()
        }
        assert not self.gallery.missing_files([self.root]).renamed


TEMPLATE: list[Path] = []


@functools.cache
def picture(number: int) -> bytes:
    file = io.BytesIO()
    photo(number).resize((16, 16)).save(file, "png")
    return file.getvalue()


def test_whatever_moves_is_followed_and_nothing_that_was_seen_is_erased(
    tmp_path: Path, model: ModelBundle
) -> None:
    Gallery.create(tmp_path / "empty", model).close()
    TEMPLATE[:] = [tmp_path / "empty"]
    run_state_machine_as_test(
        Disk,
        settings=settings(
            max_examples=50,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
