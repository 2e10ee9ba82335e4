"""Jobs over HTTP: photos of folders that the operator names are enrolled, watched and cancelled."""

import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from retrieval import Gallery, ModelBundle
from retrieval.client import Client, connect
from retrieval.errors import InputError
from retrieval.service import tokens
from retrieval.service.schemas import JobDetails, JobList
from retrieval.service.tokens import Scope
from retrieval.service.work import allowed_sources
from retrieval.storage.vault import LOCK_TIMEOUT
from tests.service.server import Server
from tests.service.test_gate import refused


@pytest.fixture(scope="module")
def library(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with photos, one that cannot be read, and an archive."""
    folder = tmp_path_factory.mktemp("library") / "photos"
    shutil.copytree(faces, folder / "2024")
    (folder / "2024" / "Adi" / "cut.jpg").write_bytes(b"\xff\xd8\xff cut")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for path in sorted(faces.glob("Sky/*.jpg"))[:2]:
            archive.writestr(f"Zoe/{path.name}", path.read_bytes() + b" ")
    (folder / "list.txt").write_text("/etc/passwd\n")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two workers"])
def working(
    request: pytest.FixtureRequest,
    bundle: ModelBundle,
    library: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("working")
    Gallery.create(folder / "g", bundle).close()
    with Server(folder / "g", folder / "log", "--sources", library, "--workers", request.param) as server:
        yield server
    assert "Traceback" not in server.log.read_text()
    with Gallery.open(folder / "g") as gallery:
        assert not gallery.verify().findings


def started(server: Server, *sources: str, **options: Any) -> str:
    response = server.client.post("/v1/jobs", json={"sources": sources, **options})
    assert response.status_code == 202, response.text
    JobDetails.model_validate(response.json())
    number: str = response.json()["id"]
    return number


def events(server: Server, job: str) -> list[tuple[str, dict[str, Any]]]:
    """All events of a job, until it is over."""
    found = []
    with server.client.stream("GET", f"/v1/jobs/{job}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_folder_is_enrolled_and_its_rejected_photos_are_listed(working: Server, library: Path) -> None:
    job = started(working, "2024")
    seen = events(working, job)
    assert [name for name, _ in seen[:-1]] == ["progress"] * (len(seen) - 1)
    name, last = seen[-1]
    assert (name, last["state"]) == ("end", "done")
    assert last["counts"] == {"enrolled": 36, "rejected": 1}
    shown = working.client.get(f"/v1/jobs/{job}").json()
    JobDetails.model_validate(shown)
    [rejected] = shown["rejected"]
    assert rejected["path"] == str(library / "2024" / "Adi" / "cut.jpg")
    assert (shown["report"]["found"], shown["report"]["enrolled"]) == (37, 36)
    people = working.client.get("/v1/people").json()["people"]
    assert [one["identity"] for one in people] == ["Adi", "Bao", "Eden", "Imani", "Ocean", "Sky"]

    again = events(working, started(working, str(library / "2024"), "more.zip"))
    assert again[-1][1]["counts"] == {"already-known": 36, "enrolled": 2, "rejected": 1}
    listed = working.client.get("/v1/jobs").json()
    JobList.model_validate(listed)
    assert job in [one["id"] for one in listed["jobs"]]


def test_only_folders_and_archives_below_those_of_the_operator_are_read(
    working: Server, library: Path
) -> None:
    (library / "outside").unlink(missing_ok=True)
    (library / "outside").symlink_to("/etc")
    messages = set()
    for wrong in (
        "..",
        "/etc",
        "../photos/../..",
        "outside",
        "/no/such",
        "list.txt",
        "http://host/x",
        "\0",
        "a" * 5000,
    ):
        response = working.client.post("/v1/jobs", json={"sources": [wrong]})
        messages.add(refused(response, 400, "invalid-argument").partition("which is")[2])
    assert len(messages) == 1
    (library / "outside").unlink()
    refused(working.client.post("/v1/jobs", json={"sources": []}), 400, "invalid-argument")
    refused(working.client.post("/v1/jobs", json={"sources": ["."], "faces": "one"}), 400, "invalid-argument")


def test_a_service_without_folders_has_no_jobs_of_them(served: Server) -> None:
    response = served.client.post("/v1/jobs", json={"sources": ["."]})
    assert "--sources" in refused(response, 400, "invalid-argument")


def test_a_source_may_be_the_folder_itself_and_is_found_below_any(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
    (tmp_path / "b" / "only").mkdir()
    roots = [tmp_path / "a", tmp_path / "b"]
    found = allowed_sources([".", "x", "only", str(tmp_path / "b" / "x")], roots)
    assert found == tuple(str(tmp_path / part) for part in ("a", "a/x", "b/only", "b/x"))
    with pytest.raises(InputError):
        allowed_sources([str(tmp_path)], roots)
    with pytest.raises(InputError):
        allowed_sources([str(tmp_path / "ab")], roots)


def test_an_unknown_job_is_not_found(working: Server) -> None:
    for method, path in [("GET", "x"), ("POST", "x/cancel"), ("GET", "x/events"), ("GET", "..%2fpeople")]:
        assert working.client.request(method, f"/v1/jobs/{path}").status_code == 404


def test_a_broken_archive_is_a_rejected_one_and_expressions_are_refused(
    working: Server, library: Path
) -> None:
    (library / "broken.zip").write_bytes(b"no archive")
    failed = events(working, started(working, "2024/Bao", "broken.zip"))[-1][1]
    assert (failed["state"], failed["counts"]) == ("done", {"already-known": 6, "rejected": 1})
    (library / "broken.zip").unlink()
    for wrong in ("(a+)+$", "COLUMN"):
        body = {"sources": ["2024"], "identity_from": wrong}
        refused(working.client.post("/v1/jobs", json=body), 400, "invalid-argument")
    assert events(working, started(working, "2024/Bao", identity_from="parent"))[-1][1]["state"] == "done"


def test_a_calibration_decides_the_next_searches(own_gallery: Path, library: Path, tmp_path: Path) -> None:
    """By strangers of a folder, by the gallery's own people, and not where there are too few of either."""
    with (
        Server(own_gallery, tmp_path / "log", "--sources", library, "--workers", 2) as server,
        connect(server.url) as client,
    ):
        asked: dict[str, Any] = {"json": {"face": 1}}
        before = server.client.post("/v1/search", **asked).json()["answers"][0]
        assert "decision" not in before
        own = client.wait_for_job(client.start_job("calibrate", fpir=0.1).id)
        assert own.report is not None
        assert (own.state, own.report["strangers"], own.done) == ("done", "gallery", own.total)
        decided = server.client.post("/v1/search", **asked).json()["answers"][0]["decision"]
        assert decided["threshold"] == pytest.approx(threshold(own.report, 0.1), abs=1e-4)
        with Gallery.open(own_gallery) as gallery:
            stored = gallery.calibration()
            assert stored is not None
            assert {**stored.fields(), "remarks": own.report["remarks"]} == own.report

        with zipfile.ZipFile(library / "visitors.zip", "w") as archive:
            for number in range(4):
                archive.writestr(f"V{number}/1.png", drawn(number))
            archive.writestr("V0/cut.jpg", b"\xff\xd8\xff cut")
        by_photos = client.wait_for_job(
            client.start_job("calibrate", fpir=0.5, strangers=["visitors.zip"]).id
        )
        assert by_photos.report is not None
        assert by_photos.counts == {"embedded": 4, "rejected": 1}
        assert [one["reason"] for one in by_photos.rejected] == ["damaged"]
        assert (by_photos.report["strangers"], by_photos.report["photos"]["used"]) == ("photos", 4)

        few = client.start_job("calibrate", fpir=0.01, strangers=["visitors.zip"])
        with pytest.raises(InputError, match="searches"):
            client.wait_for_job(few.id)
        assert [one.state for one in client.jobs()] == ["done", "done", "failed"]
        wrong = [{"fpir": 0}, {"fpir": 0.6}, {"strangers": []}, {"sample": 0}, {"sources": ["."]}]
        for options in wrong:
            body = {"kind": "calibrate", **options}
            refused(server.client.post("/v1/jobs", json=body), 400, "invalid-argument")
        outside = {"kind": "calibrate", "strangers": ["/etc"]}
        assert "`strangers`" in refused(server.client.post("/v1/jobs", json=outside), 400, "invalid-argument")
    with Gallery.open(own_gallery) as gallery:
        now = gallery.calibration()
        assert now is not None
        assert (now.strangers, now.fpir) == ("photos", 0.5)


def test_another_model_answers_after_a_job_that_takes_the_scope_admin(
    own_gallery: Path, faces: Path, imported: ModelBundle, tmp_path: Path
) -> None:
    """It goes on where a photo is missing only with `give_up`, and the former model's folder leads back."""
    shutil.copytree(faces, tmp_path / "faces")
    with Gallery.open(own_gallery) as gallery:
        gallery.relocate(faces, tmp_path / "faces")
        former = shutil.copytree(gallery.bundle.folder, imported.folder.parent / "former")
    (tmp_path / "faces" / "Adi" / "Adi_0001.jpg").unlink()
    secrets = {scope: tokens.create(own_gallery, scope, scope)[0] for scope in (Scope.WRITE, Scope.ADMIN)}
    roots = ("--sources", imported.folder.parent, "--sources", tmp_path)
    with (
        Server(own_gallery, tmp_path / "log", *roots, "--workers", 2) as server,
        connect(server.url, token=secrets[Scope.WRITE]) as writer,
        connect(server.url, token=secrets[Scope.ADMIN]) as admin,
    ):
        with pytest.raises(InputError, match="admin"):
            writer.start_job("reembed", model="model")
        for wrong in ("/etc", "no-such", "../model", "faces"):
            with pytest.raises(InputError):
                admin.start_job("reembed", model=wrong)
        kept = reembedded(admin, "model")
        assert (kept["switched"], kept["faces"], kept["embedded"], kept["lost"]) == (False, 36, 35, 1)
        [lost] = kept["lost_faces"]
        assert lost["face_id"] == 1
        assert model_of(admin) != imported.fingerprint
        given_up = reembedded(admin, "model", give_up=True)
        assert (given_up["switched"], given_up["embedded"], given_up["drift"]["sample"]) == (True, 0, 35)
        assert {model_of(admin) for _ in range(4)} == {given_up["model"]} == {imported.fingerprint}
        found = admin.search(tmp_path / "faces" / "Sky" / "Sky_0001.jpg", 1)
        assert (found.matches[0].face.identity, found.matches[0].distance) == ("Sky", 0.0)
        with pytest.raises(InputError, match="already"):
            admin.wait_for_job(admin.start_job("reembed", model="model").id)
        assert reembedded(admin, former.name)["switched"]
        assert model_of(admin) != imported.fingerprint
    assert "Traceback" not in server.log.read_text()
    with Gallery.open(own_gallery) as gallery:
        assert not gallery.verify().findings
        switched = [entry.via for entry in gallery.audit_log() if entry.action == "switch-model"]
    assert switched == ["faceprint serve, token admin"] * 2


def reembedded(client: Client, model: str, **options: Any) -> dict[str, Any]:
    report = client.wait_for_job(client.start_job("reembed", model=model, **options).id).report
    assert report is not None
    return report


def model_of(client: Client) -> str:
    """The fingerprint of the model that answers."""
    return str(client.info()["fingerprint"])


def threshold(report: dict[str, Any], fpir: float) -> float:
    [found] = [point["threshold"] for point in report["points"] if point["fpir"] == fpir]
    return float(found)


def drawn(number: int) -> bytes:
    """A photo as PNG that is none of the drawn faces."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40), (number % 256, 40, 200)).save(data, format="PNG")
    return data.getvalue()


def test_jobs_that_wait_and_run_are_cancelled(own_gallery: Path, library: Path, tmp_path: Path) -> None:
    """The first one waits for a writer that does not let go before all are cancelled."""
    assert LOCK_TIMEOUT > 10
    with Server(own_gallery, tmp_path / "log", "--sources", library) as server:
        with Gallery.open(own_gallery) as gallery, gallery.vault.writing():
            first, second = started(server, "more.zip"), started(server, ".")
            while server.client.get(f"/v1/jobs/{first}").json()["state"] != "running":
                time.sleep(0.01)
            waiting = server.client.post(f"/v1/jobs/{second}/cancel").json()
            running = server.client.post(f"/v1/jobs/{first}/cancel").json()
        assert (waiting["state"], running["state"]) == ("cancelled", "running")
        assert events(server, first)[-1][1]["state"] in ("cancelled", "done")
        assert [(name, one["state"]) for name, one in events(server, second)] == [("end", "cancelled")]
        last = started(server, "more.zip")
        assert sum(events(server, last)[-1][1]["counts"].values()) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_stops_ends_jobs_and_those_who_watch(
    workers: int, own_gallery: Path, library: Path, tmp_path: Path
) -> None:
    with Server(own_gallery, tmp_path / "log", "--sources", library, "--workers", workers) as server:
        with Gallery.open(own_gallery) as gallery, gallery.vault.writing():
            job = started(server, "more.zip")
            stream = httpx.Client(base_url=server.url, trust_env=False, timeout=60)
            with stream, stream.stream("GET", f"/v1/jobs/{job}/events") as response:
                lines = response.iter_lines()
                assert next(lines) == "event: progress"
                server.process.terminate()
                assert "event: end" not in list(lines)
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()
