"""The wheel, installed where there is no torch, searches and enrolls."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from retrieval.models.bundle import ModelBundle

_ROOT = Path(__file__).parent.parent.parent


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if found is None:
        pytest.skip("uv is not installed; make test installs it")
    return found


@pytest.fixture(scope="module")
def wheel(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _run(uv, "build", "--wheel", "--quiet", "--out-dir", out, cwd=_ROOT)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_migrations_below_retrieval_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "retrieval/migrations/versions/0001_first_tables.py" in names
    assert {
        "training/reports/report.html.jinja",
        "retrieval/quality/check.html.jinja",
        "retrieval/quality/sheet.html.jinja",
        "retrieval/pages/layout.html.jinja",
        "retrieval/pages/style.css",
        "retrieval/service/page/templates/base.html.jinja",
        "retrieval/service/page/static/page.css",
        "retrieval/service/page/static/htmx.min.js",
        "retrieval/service/page/static/LICENSE_HTMX",
        "retrieval/images/fonts/DejaVuSans.ttf",
        "retrieval/py.typed",
        "training/py.typed",
    } <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"retrieval", "training"}


def test_a_wheel_in_an_empty_environment_without_torch_enrolls_and_searches(
    uv: str, wheel: Path, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    _run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    _run(uv, "pip", "install", "--quiet", "--python", python, wheel)
    faceprint = tmp_path / "env" / "bin" / "faceprint"
    absent = _run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'))", cwd=tmp_path)
    assert absent.strip() == "None"
    _run(faceprint, "ingest", tmp_path / "g", faces, "--model", bundle.folder, cwd=tmp_path)
    photo = sorted(faces.glob("*/*.jpg"))[8]
    (answer,) = json.loads(_run(faceprint, "search", tmp_path / "g", photo, "--json", cwd=tmp_path))
    assert (answer["matches"][0]["path"], answer["matches"][0]["distance"]) == (os.fspath(photo), 0.0)
    refused = subprocess.run(
        [faceprint, "train", faces, "--out", tmp_path / "m"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "pip install 'faceprint[train]'" in refused.stderr
