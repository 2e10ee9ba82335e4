"""What stands in the README and in the docs is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.onnx_networks import network, saved
from training.synthetic_faces import draw_faces

_ROOT = Path(__file__).parent.parent.parent


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (_ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's tour has been walked, with drawn faces as its photos.

    Of few people with few photos each, because a whole ResNet50 learns them.
    """
    folder = tmp_path_factory.mktemp("tour")
    draw_faces(folder / "photos", identities=4, photos=4, size=96)
    (commands,) = _blocks("README.md", "sh tour")
    training = "faceprint train photos --out my.model"
    assert commands.count(training) == 1
    # What the tour shows does not depend on how long the network has learned.
    commands = commands.replace(training, f"{training} --epochs 2")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Threads that wait for each other take the cores from the other tests.
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=folder, check=True, env=environment)
    return folder


def test_the_tours_commands_run_and_leave_what_the_readme_says(tour: Path) -> None:
    assert (tour / "my.model" / "report.html").is_file()
    assert (tour / "my.gallery" / "gallery.db").is_file()
    assert (tour / "answer.png").is_file()


def test_the_commands_about_imported_models_run_and_leave_what_the_page_says(tmp_path: Path) -> None:
    draw_faces(tmp_path / "photos", identities=4, photos=4, size=48)
    saved(network(), tmp_path / "network.onnx")
    commands = "\n".join(_blocks("docs/importing.md", "sh import"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, check=True, env=environment)
    assert {"own.model", "own.gallery", "own.backup", "measured", "answer.png"} <= set(os.listdir(tmp_path))
    (code,) = _blocks("docs/importing.md", "python")
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/python.md"])
def test_the_python_of_a_page_runs(page: str, tour: Path, tmp_path: Path) -> None:
    shutil.copytree(tour / "photos", tmp_path / "photos")
    shutil.copytree(tour / "my.model", tmp_path / "my.model")
    for code in _blocks(page, "python"):
        subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)


def test_every_page_that_a_page_links_to_exists() -> None:
    for page in [_ROOT / "README.md", *(_ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_can_be_loaded_and_all_are_listed() -> None:
    import retrieval

    assert sorted(retrieval._HOMES) == retrieval.__all__
    for name in retrieval.__all__:
        assert getattr(retrieval, name).__name__ == name


def test_ingest_is_the_function_even_after_its_module_was_imported() -> None:
    code = "import retrieval.bulk.ingest; from retrieval import ingest; assert callable(ingest)"
    subprocess.run([sys.executable, "-c", code], check=True)
