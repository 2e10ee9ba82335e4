"""The files that a command writes never replace one another, an input, or a part of the gallery."""

import errno
import os
from pathlib import Path

import pytest

from retrieval import Gallery
from retrieval.cli.output import writing
from retrieval.errors import FaceprintError, InputError, RunError
from tests.cli.test_app import Faceprint


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.mark.parametrize(
    ("command", "first", "second"),
    [
        ("embed {m} {p} --out {t}/v.npy --summary {t}/v.csv", "--out", "--summary"),
        ("embed {m} {p} --out {t}/v.npy --report {t}/v.npy", "--out", "--report"),
        ("audit {g} --page {t}/d.html --json-file {t}/../{n}/d.html", "--json-file", "--page"),
        ("check {p} --page {t}/d.html --fix {t}/link/d.html", "--page", "--fix"),
        ("ingest {g} {p} --report {t}/r.json --summary {t}/r.json", "--report", "--summary"),
        ("ingest {g} --metadata {t}/table.csv --report {t}/table.csv", "--metadata", "--report"),
        ("ingest {g} --embeddings {t}/table.csv --summary {t}/table.csv", "--embeddings", "--summary"),
        ("search {g} --vectors {t}/table.csv {p}/a.jpg --plot {t}/table.csv", "--vectors", "--plot"),
    ],
)
def test_two_options_that_name_one_file_are_refused(
    command: str, first: str, second: str, faceprint: Faceprint, tmp_path: Path
) -> None:
    """Also by another spelling of its path; and what lies there stays."""
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "table.csv").write_text("identity,badge\n")
    named = {"t": tmp_path, "n": tmp_path.name} | {name: tmp_path / name for name in "mpg"}
    status, _, err = faceprint(*command.format(**named).split())
    assert (status, f"faceprint: {first} and {second} both name " in err) == (2, True), err
    assert {path.name for path in tmp_path.iterdir()} == {"link", "table.csv"}
    assert (tmp_path / "table.csv").read_text() == "identity,badge\n"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("backup {g} ADDRESS", "DEST"),
        ("export {g} ADDRESS", "OUT"),
        ("search {g} {t}/a.jpg --plot ADDRESS", "--plot"),
        ("forget {g} --face 1 --receipt ADDRESS", "--receipt"),
        ("model import ADDRESS --out {t}/model", "FILE.onnx"),
    ],
)
def test_the_address_of_a_database_is_no_folder_to_write(
    command: str,
    named: str,
    faceprint: Faceprint,
    gallery: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    told = command.format(g=gallery.name, t=tmp_path).replace("ADDRESS", "postgresql://u:secret-word@h/d")
    status, _, err = faceprint(*told.split())
    assert status == 2
    assert err == f"faceprint: {named} is the address of a database; name a file or a folder.\n"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "command", ["forget {g} --face 1 --receipt {g}/r.json", "audit {g} --page {g}/vectors/new/page.html"]
)
def test_a_file_in_the_gallery_is_refused(
    command: str, faceprint: Faceprint, gallery: Gallery, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(gallery.folder)
    status, _, err = faceprint(*command.format(g=tmp_path / "link").split())
    assert (status, f"lies in the gallery {tmp_path / 'link'}; name a file outside it" in err) == (2, True)


def test_devices_may_take_any_number_of_outputs(faceprint: Faceprint, gallery: Gallery) -> None:
    status, _, err = faceprint(
        "ingest", gallery.folder, "nowhere", "--report", "/dev/null", "--summary", "/dev/null"
    )
    assert (status, "nowhere" in err) == (2, True)


def test_the_report_of_a_retry_may_replace_the_one_that_is_retried(
    faceprint: Faceprint, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photos, report = tmp_path / "photos", tmp_path / "r.jsonl"
    photos.mkdir()
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "whole.jpg").write_bytes(next(faces.glob("*/*.jpg")).read_bytes())
    assert faceprint("ingest", gallery.folder, photos, "--report", report)[0] == 0
    status, out, _ = faceprint("ingest", gallery.folder, "--retry", report, "--report", report)
    assert (status, "found 1 =" in out, "broken.jpg" in report.read_text()) == (2, True, True)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, RunError),
        (errno.EROFS, RunError),
        (errno.ENOENT, InputError),
        (errno.EACCES, InputError),
    ],
)
def test_a_full_disk_is_a_failed_run_and_a_wrong_path_wrong_input(
    number: int, expected: type[Exception]
) -> None:
    with pytest.raises(FaceprintError) as caught, writing("The report"):
        raise OSError(number, "No")
    advice = "; name another file" if expected is InputError else ""
    assert (caught.type, str(caught.value)) == (expected, f"The report cannot be written: no{advice}.")


OUTPUTS = [
    ("ingest {g} {t} --report {f}", "--report"),
    ("ingest {g} {t} --summary {f}", "--summary"),
    ("embed {t}/m {t} --out {f}.npy", "--out"),
    ("check {t} --json-file {f}.json", "--json-file"),
    ("check {t} --page {f}.html", "--page"),
    ("check {t} --fix {f}.csv", "--fix"),
    ("audit {g} --page {f}", "--page"),
    ("search {g} --face 1 {t}/a.jpg --plot {f}", "--plot"),
    ("forget {g} --face 1 --receipt {f}", "--receipt"),
    ("reembed {g} --back --report {f}", "--report"),
]


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
@pytest.mark.parametrize("place", ["missing", "long", "refused"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_done(
    command: str,
    option: str,
    place: str,
    faceprint: Faceprint,
    gallery: Gallery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its folder is missing or refuses this user (which root never meets), or its name is too long."""
    named = {"missing": tmp_path / "none/f", "long": tmp_path / ("f" * 300), "refused": tmp_path / "f"}[place]
    access = os.access
    refuses = place == "refused"
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (refuses and Path(path) == tmp_path)
    )
    words = command.format(g=gallery.folder, t=tmp_path, f=named).split()
    status, out, err = faceprint(*words)
    path = words[words.index(option) + 1]
    said = {
        "missing": f"There is no folder {named.parent} for {option}; make it, or name another file.",
        "long": f"{option} {path} cannot be written: file name too long; name another file.",
        "refused": f"{option} {path} cannot be written: permission denied; name another file.",
    }
    assert (status, out, err) == (2, "", f"faceprint: {said[place]}\n")


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_a_folder_is_refused_as_a_file_to_write(
    command: str, option: str, faceprint: Faceprint, gallery: Gallery, tmp_path: Path
) -> None:
    for suffix in ("", ".npy", ".json", ".html", ".csv"):
        (tmp_path / f"f{suffix}").mkdir()
    words = command.format(g=gallery.folder, t=tmp_path, f=tmp_path / "f").split()
    path = words[words.index(option) + 1]
    assert faceprint(*words) == (2, "", f"faceprint: {option} {path} is a folder; name a file.\n")


def test_a_check_whose_file_cannot_be_written_in_the_end_is_wrong_input(
    faceprint: Faceprint, faces: Path
) -> None:
    """Nothing can be made below /proc, which only shows when it is tried; the result is printed first."""
    status, out, err = faceprint("check", faces, "--json-file", "/proc/check.json")
    assert (status, "36 photos" in out) == (2, True)
    assert err.endswith(
        "faceprint: /proc/check.json cannot be written: no such file or directory; name another file.\n"
    )


@pytest.mark.parametrize("command", ["check", "audit", "search"])
def test_a_command_shows_its_help_by_one_letter_too(command: str, faceprint: Faceprint) -> None:
    status, out, _ = faceprint(command, "-h")
    assert (status, "Usage: faceprint" in out) == (0, True)
