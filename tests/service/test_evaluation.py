"""Evaluations as jobs: figures that `faceprint evaluate` finds in a process of its own."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retrieval import Gallery, ModelBundle, ingest
from retrieval.client import Client, connect
from retrieval.errors import InputError, Interrupted, RunError
from retrieval.service import evaluation
from tests.service.pages import HTML, send
from tests.service.server import Server
from tests.service.test_gate import refused
from training.synthetic_faces import draw_faces

_SECONDS = 120.0


@pytest.fixture(scope="module")
def measuring(
    bundle: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Client]]:
    """A service with two workers and an empty gallery; it may read the drawn faces."""
    folder = tmp_path_factory.mktemp("measuring")
    Gallery.create(folder / "g", bundle).close()
    (folder / "flat").mkdir()
    roots = ("--sources", faces.parent, "--sources", folder)
    with (
        Server(folder / "g", folder / "log", *roots, "--workers", 2) as server,
        connect(server.url) as client,
    ):
        yield server, client
    assert "Traceback" not in server.log.read_text()


def children_of(pid: int) -> list[int]:
    """The processes that the threads of a process have started."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a process and its children have started."""
    return [one for child in children_of(pid) for one in (child, *descendants(child))]


def evaluations(pid: int) -> list[int]:
    """The processes of evaluations below a process."""
    return [one for one in descendants(pid) if b"evaluate" in Path(f"/proc/{one}/cmdline").read_bytes()]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_figures_of_a_model_are_kept_without_people(
    measuring: tuple[Server, Client], faces: Path
) -> None:
    server, client = measuring
    (faces / "Adi" / "cut.jpg").write_bytes(b"\xff\xd8\xff cut")
    try:
        job = client.wait_for_job(client.start_job("evaluate", data=str(faces), protocol="closed", seed=1).id)
    finally:
        (faces / "Adi" / "cut.jpg").unlink()
    assert (job.kind, job.state, job.done, job.total) == ("evaluate", "done", 37, 37)
    assert job.counts == {"rejected": 1}
    assert [one["path"] for one in job.rejected] == [str(faces / "Adi" / "cut.jpg")]
    assert job.report is not None
    assert (job.report["protocol"], job.report["data"]["embedded"]) == ("closed", 36)
    assert set(job.report["closed"]) == {
        *("enrolled", "probes", "identities", "unanswerable", "ranking", "classifier", "baselines")
    }
    assert "Adi" not in str(job.report)
    page = server.client.get("/health", headers=HTML).text
    assert "Closest photo is of the right person" in page
    assert "and it takes 30" in page


def test_a_gallery_is_measured_as_the_command_measures_it(bundle: ModelBundle, tmp_path: Path) -> None:
    """10 of 12 people are enrolled, by 6 of their 10 photos; the job searches for all other photos."""
    people = draw_faces(tmp_path / "people", identities=12, photos=10, size=48)
    folders = sorted(people.iterdir())
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        (tmp_path / "enrolled").mkdir()
        for folder in folders[:10]:
            (tmp_path / "enrolled" / folder.name).mkdir()
            for photo in sorted(folder.iterdir())[:6]:
                photo.rename(tmp_path / "enrolled" / folder.name / photo.name)
        assert ingest(gallery, [tmp_path / "enrolled"]).enrolled == 60
        before = list(gallery.audit_log())
    with (
        Server(tmp_path / "g", tmp_path / "log", "--sources", people) as server,
        connect(server.url) as client,
    ):
        job = client.wait_for_job(client.start_job("evaluate", data=".").id)
        events = server.client.get(f"/v1/jobs/{job.id}/events").text
    assert (job.kind, job.state, job.done, job.total, job.counts) == ("evaluate", "done", 60, 60, {})
    assert events.startswith("event: end\n")
    report = job.report
    assert report is not None
    by_command = evaluated(["--gallery", tmp_path / "g", "--", bundle.folder, people], lambda: False)
    assert by_command["open"].pop("mistakes")
    assert report["open"] == by_command["open"]
    sizes = {name: report["open"][name] for name in ("enrolled", "identities", "mated", "strangers")}
    assert sizes == {"enrolled": 60, "identities": 10, "mated": 40, "strangers": 20}
    assert 0 < report["open"]["identification"]["ranking"]["closest"]["value"] < 1
    assert not any(folder.name in str(report) for folder in folders)
    with Gallery.open(tmp_path / "g") as gallery:
        assert list(gallery.audit_log()) == before


def test_photos_that_the_service_may_not_read_and_options_without_use_are_refused(
    measuring: tuple[Server, Client],
) -> None:
    server, _ = measuring
    wrong: list[dict[str, Any]] = [
        *({}, {"data": "/etc"}, {"data": "no-such"}, {"data": "..", "protocol": "lfw-pairs"}),
        *({"data": "flat", "val_fraction": 0.5}, {"data": "flat", "min_images": 2}),
        {"data": "flat", "protocol": "closed", "val_fraction": 1},
    ]
    for fields in wrong:
        body = {"kind": "evaluate", **fields}
        refused(server.client.post("/v1/jobs", json=body), 400, "invalid-argument")


def test_a_cancelled_evaluation_leaves_no_process(measuring: tuple[Server, Client], faces: Path) -> None:
    server, client = measuring
    outside = send(server.client, "/health/evaluations", data="/etc", protocol="gallery")
    assert (outside.status_code, "is no folder below a folder" in outside.text) == (400, True)
    started = send(server.client, "/health/evaluations", data=str(faces), protocol="gallery")
    job = started.headers["location"].removeprefix("/health#job-")
    while not evaluations(server.process.pid):
        assert client.job(job).state in ("waiting", "running")
    stopped = send(server.client, f"/jobs/{job}/cancel")
    assert stopped.headers["location"] == f"/health#job-{job}"
    ended = client.wait_for_job(job)
    assert (ended.state, ended.report, ended.error) == ("cancelled", None, None)
    assert not evaluations(server.process.pid)


def test_a_killed_service_leaves_no_process(own_gallery: Path, faces: Path, tmp_path: Path) -> None:
    with (
        Server(own_gallery, tmp_path / "log", "--sources", faces) as server,
        connect(server.url) as client,
    ):
        client.start_job("evaluate", data=".")
        while not (found := evaluations(server.process.pid)):
            time.sleep(0.01)
        server.stop(signal.SIGKILL)
        for pid in found:
            wait_until_gone(pid)


def test_a_process_that_does_not_stop_is_killed(
    bundle: ModelBundle, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_STOP_SECONDS", 0.2)
    stopped: list[int] = []

    def should_stop() -> bool:
        # A stopped process takes no notice of SIGTERM.
        stopped.extend(one for one in evaluations(os.getpid()) if one not in stopped)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        return bool(stopped)

    with pytest.raises(Interrupted):
        evaluated([bundle.folder, faces], should_stop)
    assert stopped
    for pid in stopped:
        wait_until_gone(pid)


def test_a_missing_package_is_named(
    bundle: ModelBundle, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scipy.py").write_text("raise ModuleNotFoundError('No module', name='scipy')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"needs scipy; install it with pip install 'faceprint\[train\]'"):
        evaluated([bundle.folder, faces], lambda: False)


def test_an_error_of_the_command_is_that_of_the_evaluation(bundle: ModelBundle, faces: Path) -> None:
    with pytest.raises(InputError, match=r"^--min-images is of use only with --protocol open"):
        evaluated(["--min-images", 5, bundle.folder, faces], lambda: False)


def evaluated(arguments: list[object], should_stop: Any) -> dict[str, Any]:
    return evaluation.evaluate(
        arguments, count=lambda outcome: None, note=lambda done, total: None, should_stop=should_stop
    )
