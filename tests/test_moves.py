"""Photos that move on disk: `ingest --sync` and `--relabel` against a plain model of what ought to be."""

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image

from retrieval.bundle import ModelBundle
from retrieval.gallery import Gallery
from retrieval.ingestion import IngestReport, ingest
from retrieval.missing import Missing
from retrieval.photos import scan
from retrieval.store import Face
from retrieval.verification import verify
from tests.operations import photo, tiny_model, write_photos

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


def test_a_chain_of_renamed_folders_is_followed_at_once(gallery: Gallery, library: Path) -> None:
    for name, new_name in (("C", "D"), ("B", "C"), ("A", "B")):
        (library / name).rename(library / new_name)
    done, _ = sync(gallery, library)
    assert [(one.name, one.new_name) for one in done.renamed] == [("A", "B"), ("B", "C"), ("C", "D")]
    assert {number: name for number, name in found(gallery, library).values()} == {
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
    names = {number: name for number, name in found(gallery, library).values()}
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
