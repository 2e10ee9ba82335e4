"""What names people in sources, and what an ingest says of layouts that may not be meant."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval.bulk.ingest import ingest
from retrieval.bulk.reports import IngestReport
from retrieval.errors import DataError, InputError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.sources.identity_rules import Naming
from retrieval.sources.photos import scan
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import photo, tiny_model

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """`top/people/Ada`, `top/people/Bob`, two photos each."""
    for number in range(4):
        path = tmp_path / "top" / "people" / ("Ada", "Bob")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    return tmp_path / "top"


@pytest.fixture
def model(tmp_path: Path) -> ModelBundle:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def report_of(tmp_path: Path, model: ModelBundle) -> Callable[..., IngestReport]:
    """Ingests sources into a gallery of their own."""

    def run(*sources: Path, identity_from: str | None = None) -> IngestReport:
        with Gallery.create(tmp_path / "gallery", model) as gallery:
            report = ingest(gallery, sources, identity_from=identity_from)
        shutil.rmtree(tmp_path / "gallery")
        return report

    return run


def test_people_in_their_folders_are_counted_and_nothing_is_noted(
    top: Path, report_of: Callable[..., IngestReport]
) -> None:
    report = report_of(top / "people")
    assert (report.identities, report.identities_from, report.notes) == (2, "folder names", ())
    assert report.summary()["identities"] == 2


def test_a_folder_too_high_is_noted(top: Path, report_of: Callable[..., IngestReport]) -> None:
    report = report_of(top)
    assert (report.identities, report.identities_from) == (1, "folder names")
    assert report.notes == (
        "all of the 4 photos are of one identity, people",
        "people has subfolders with photos: Ada, Bob; if these are the people, name the folder that contains "
        "them as the source or pass `identity_from='parent'`; `relabel` also renames what is enrolled "
        "already",
    )


def test_a_folder_too_low_is_noted(top: Path, report_of: Callable[..., IngestReport]) -> None:
    report = report_of(top / "people" / "Ada")
    assert report.identities == 0
    assert "none of the 2 photos has an identity" in report.notes[0]


def test_an_archive_under_another_name_than_its_folder_is_noted(
    top: Path, tmp_path: Path, report_of: Callable[..., IngestReport]
) -> None:
    """As a browser names the second download; under the folder's own name it is not."""
    for name in ("people.zip", "people (1).zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path in sorted(top.rglob("*.png")):
                archive.write(path, path.relative_to(top))
    assert report_of(tmp_path / "people.zip").notes == ()
    report = report_of(tmp_path / "people (1).zip")
    assert report.identities_from == "first folders in archives"
    assert [note.split(";")[0] for note in report.notes] == [
        "all of the 4 photos are of one identity, people",
        "people has subfolders with photos: Ada, Bob",
    ]
    assert report_of(tmp_path / "people (1).zip", identity_from="parent").identities == 2


@pytest.mark.parametrize("column", ["label", "Person", "SUBJECT", "class", "Name", "Identity"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_a_list_whose_column_of_names_is_called_otherwise_is_noted_and_can_be_told(
    column: str, separator: str, top: Path, report_of: Callable[..., IngestReport]
) -> None:
    rows = [f"{path.relative_to(top)}{separator}{path.stem}" for path in sorted(top.rglob("*.png"))]
    (top / "list.csv").write_text("\n".join([f"path{separator}{column}", *rows]))
    report = report_of(top / "list.csv")
    assert (report.enrolled, report.identities, report.identities_from) == (4, 2, "the folders of the files")
    said = [note for note in report.notes if f"has the column `{column}` and none called `identity`" in note]
    assert [f"`identity_from={column!r}`" in note for note in said] == [True]
    assert any("semicolons" in note for note in report.notes) == (separator == ";")
    report = report_of(top / "list.csv", identity_from=column)
    assert (report.identities, report.identities_from) == (4, f"the column `{column}`")
    assert not any("none called" in note for note in report.notes)


def test_paths_of_windows_are_found_below_the_list_and_said(
    top: Path, report_of: Callable[..., IngestReport]
) -> None:
    (top / "list.csv").write_text("path\npeople\\Ada\\0.png\npeople\\Bob\\1.png\n")
    report = report_of(top / "list.csv")
    assert (report.enrolled, report.identities) == (2, 2)
    assert "has paths of Windows, such as people\\Ada\\0.png" in report.notes[0]


@pytest.mark.parametrize(
    ("identity_from", "names"),
    [
        (None, ["people"] * 4),
        ("first", ["people"] * 4),
        ("parent", ["Ada", "Ada", "Bob", "Bob"]),
        ("none", [None] * 4),
        (r"people/([^/]+)", ["Ada", "Ada", "Bob", "Bob"]),
        (r"(\w+)/(?P<identity>\d)[.]png$", ["0", "2", "1", "3"]),
        ("(Ada)", ["Ada", "Ada", None, None]),
    ],
)
def test_identities_come_from_where_it_is_said(
    identity_from: str | None, names: list[str | None], top: Path
) -> None:
    """The same in a folder, an archive of it, and a list beside it."""
    assert [one.identity for one in scan([top], identity_from=identity_from)] == names
    with zipfile.ZipFile(top.parent / "archive.zip", "w") as archive:
        for path in sorted(top.rglob("*.png")):
            archive.write(path, path.relative_to(top))
    found = scan([top.parent / "archive.zip"], identity_from=identity_from)
    assert [one.identity for one in found] == names
    if identity_from is not None:
        (top / "list.txt").write_text("".join(f"{path}\n" for path in sorted(top.rglob("*.png"))))
        found = scan([top / "list.txt"], identity_from=identity_from)
        assert [one.identity for one in found] == names


def test_nothing_is_noted_where_nobody_is_to_be_named(
    top: Path, report_of: Callable[..., IngestReport]
) -> None:
    report = report_of(top, identity_from="none")
    assert (report.identities, report.identities_from, report.notes) == (0, "nothing", ())


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "An identity comes from first, parent, none"), ("(", "cannot be read"), ("(?:a)", "has no group")],
)
def test_a_pattern_that_names_nobody_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Naming.parse(text)


def test_a_column_that_a_list_lacks_is_refused(top: Path) -> None:
    (top / "list.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="has no column `who`; its columns are path, label"):
        scan([top / "list.csv"], identity_from="who")
    with pytest.raises(InputError, match="none of the sources has columns"):
        scan([top], identity_from="who")


def test_the_command_says_where_names_come_from_and_the_way_back_is_relabelling(
    faceprint: Faceprint, top: Path, tmp_path: Path, model: ModelBundle
) -> None:
    gallery, summary = tmp_path / "gallery", tmp_path / "summary.json"
    status, out, err = faceprint("ingest", gallery, top, "--model", model.folder, "--summary", summary)
    assert (status, "1 identity, from folder names" in out) == (0, True)
    assert [line.split(":")[0:2] for line in err.strip().splitlines()] == [
        ["note", " all of the 4 photos are of one identity, people"],
        ["note", " people has subfolders with photos"],
    ]
    assert "pass --identity-from parent; --relabel also renames" in err
    assert [f"note: {note}" for note in json.loads(summary.read_text())["notes"]] == err.strip().splitlines()
    report = tmp_path / "report.jsonl"
    status, out, _ = faceprint("ingest", gallery, top / "people", "--report", report)
    assert (status, "rejected 4" in out) == (2, True)
    assert (
        "if this name is right, --relabel moves" in json.loads(report.read_text().splitlines()[0])["detail"]
    )
    status, out, _ = faceprint("ingest", gallery, top / "people", "--relabel", "--dry-run")
    assert (status, "4 faces would be relabelled" in out) == (0, True)
    status, out, _ = faceprint("ingest", gallery, "--retry", report, "--relabel")
    assert (status, "4 faces relabelled" in out, "already known 4" in out) == (0, True, True)
    for _ in range(2):
        status, out, _ = faceprint("ingest", gallery, top / "people", "--relabel")
        assert (status, "0 faces relabelled" in out, "already known 4" in out) == (0, True, True)
    assert faceprint("ingest", gallery, "-", "--relabel")[0] == 2
