"""Files beside a gallery: reports are durable before they have their name; an export may hold nothing."""

import os
from pathlib import Path

import pytest

from retrieval import Gallery, ModelBundle
from tests.cli.test_app import Faceprint


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.fixture
def export_of_nothing(faceprint: Faceprint, gallery: Gallery, tmp_path: Path) -> Path:
    assert faceprint("export", gallery.vault.folder, tmp_path / "export")[0] == 0
    return tmp_path / "export"


FOUND_NOTHING = "found 0 = enrolled 0 + already known 0 + duplicate 0 + rejected 0"


def test_an_export_of_an_empty_gallery_is_imported(
    faceprint: Faceprint, export_of_nothing: Path, bundle: ModelBundle, tmp_path: Path
) -> None:
    status, out, _ = faceprint("import", export_of_nothing, tmp_path / "g", "--model", bundle.folder)
    assert (status, FOUND_NOTHING in out) == (0, True)


def test_a_file_of_vectors_without_rows_is_ingested(
    faceprint: Faceprint, export_of_nothing: Path, bundle: ModelBundle, tmp_path: Path
) -> None:
    vectors = export_of_nothing / "faces-00000.parquet"
    command = ("ingest", tmp_path / "g", "--embeddings", vectors, "--model", bundle.folder)
    status, out, err = faceprint(*command)
    assert (status, FOUND_NOTHING in out, err) == (0, True, "")


@pytest.mark.parametrize("option", ["--report", "--summary"])
def test_a_report_is_on_the_disk_before_it_has_its_name(
    option: str,
    faceprint: Faceprint,
    bundle: ModelBundle,
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise it could be there and empty after a loss of power."""
    report, happened = tmp_path / "r.json", []
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "photos" / "whole.jpg").write_bytes(next(faces.glob("*/*.jpg")).read_bytes())
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        happened.append(("sync", name, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        happened.append(("rename", str(target), os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    ingest = ("ingest", tmp_path / "g", tmp_path / "photos", "--model", bundle.folder, "--workers", "1")
    assert faceprint(*ingest, option, report)[0] == 0
    size = report.stat().st_size
    of_report = [what for what in happened if report.name in what[1]]
    assert of_report == [("sync", str(tmp_path / ".r.json.part"), size), ("rename", str(report), size)]
    assert size > 0
