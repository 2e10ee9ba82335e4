"""`embed --on ray` and `ingest --embeddings` of several files, as far as they go without a cluster."""

import importlib.util
from pathlib import Path

import pytest

from retrieval.bulk.embed import embed
from retrieval.models.bundle import ModelBundle
from tests.cli.test_app import Faceprint, faceprint

__all__ = ["faceprint"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--out", "s3://bucket/run"), "--out s3://bucket/run is an address; --on ray writes there"),
        (("--out", "run", "--on", "spark"), "--on is 'spark'; there is ray"),
        (("--out", "v.parquet", "--address", "auto"), "--address is of use only with --on"),
        (("--out", "v.parquet", "--photos-per-part", "9"), "--photos-per-part is of use only with --on"),
        (("--out", "run"), "Embeddings go to FILE.parquet or FILE.npy, not to run"),
        (("--out", "nosuch://x/run", "--on", "ray"), "There is no way to read nosuch://"),
    ],
)
def test_what_cannot_be_embedded_elsewhere_is_wrong_input(
    options: tuple[str, ...],
    sentence: str,
    faceprint: Faceprint,
    bundle: ModelBundle,
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, stderr = faceprint("embed", bundle.folder, faces, *options)
    assert (status, list(tmp_path.iterdir())) == (2, [])
    assert sentence in stderr


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_command_says_how_to_install_it_and_makes_nothing(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    status, _, stderr = faceprint("embed", bundle.folder, faces, "--out", tmp_path / "run", "--on", "ray")
    assert (status, list(tmp_path.iterdir())) == (1, [])
    assert "pip install 'faceprint[ray]'" in stderr


def test_several_files_of_vectors_are_enrolled_by_a_pattern_or_one_after_the_other(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    people = sorted(faces.iterdir())
    for number in (1, 2):
        embed(bundle, [people[number]], tmp_path / f"{number}.parquet")
    gallery = tmp_path / "g"
    status, stdout, _ = faceprint(
        "ingest", gallery, "--model", bundle.folder, "--embeddings", tmp_path / "*.parquet"
    )
    assert (status, "found 12 = enrolled 12" in stdout) == (0, True)
    named = ("--embeddings", tmp_path / "2.parquet", "--embeddings", tmp_path / "1.parquet")
    status, stdout, _ = faceprint("ingest", gallery, *named)
    assert (status, "found 12 = enrolled 0 + already known 12" in stdout) == (0, True)
    status, _, stderr = faceprint("ingest", gallery, "--embeddings", tmp_path / "*.pq")
    assert (status, "No file matches" in stderr) == (2, True)
    status, _, stderr = faceprint("ingest", gallery, *named, "--report", tmp_path / "1.parquet")
    assert (status, "--embeddings and --report both name" in stderr) == (2, True)
