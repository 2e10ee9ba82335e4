"""Real servers for the tests of this folder; tests skip where one is absent."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from retrieval.gallery.gallery import Gallery
from retrieval.index.milvus import MilvusVectors
from retrieval.models.bundle import ModelBundle
from tests.engines.postgresql_server import PostgresqlServer, programs
from tests.operations import tiny_model

_SECONDS = 120.0

# Small volumes, and no catalogs, which listen on ports of their own.
_OPTIONS = ("-volume.max=100", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0")


def free_port() -> int:
    """A free port, with the one 10,000 above that SeaweedFS takes beside it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            if port < 55_000:
                try:
                    other.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server; the environment leads there."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    if shutil.which("weed") is None:
        pytest.skip("weed, SeaweedFS's server of S3, is not installed")
    import s3fs

    folder = tmp_path_factory.mktemp("seaweedfs")
    ports = [free_port() for _ in range(4)]
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    options = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command = ["weed", "server", f"-dir={folder}", "-filer", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    endpoint = f"http://127.0.0.1:{ports[-1]}"
    with (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(
            [*command, *_OPTIONS, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", "any")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
            patch.setenv("AWS_REGION", "us-east-1")
            files = s3fs.S3FileSystem(skip_instance_cache=True)
            deadline = time.monotonic() + _SECONDS
            while True:
                try:
                    files.mkdir("ready")
                    break
                except Exception:
                    assert server.poll() is None, (folder / "log").read_text()[-2000:]
                    assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                    time.sleep(0.2)
            yield endpoint
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def bucket(s3: str) -> str:
    """A new bucket."""
    import s3fs

    name = f"faceprint-{os.urandom(4).hex()}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return name


@pytest.fixture
def nginx() -> str:
    """The program nginx."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("nginx is not installed")
    return found


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresqlServer]:
    """A running server of PostgreSQL, for the tests of this process."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'faceprint[postgres]'")
    if (found := programs()) is None:
        pytest.skip("no PostgreSQL server is installed")
    server = PostgresqlServer(found)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def schema_address(postgresql_server: PostgresqlServer) -> str:
    """The address of a new, empty schema."""
    name = f"gallery_{os.urandom(4).hex()}"
    postgresql_server.execute(f"CREATE SCHEMA {name}")
    return postgresql_server.address(schema=name)


@dataclass(frozen=True)
class MilvusProcess:
    """A running server of Milvus, for the tests of this process."""

    address: str
    process: "subprocess.Popen[bytes]"

    def kill_and_restart(self) -> None:
        """Ends the server as a power cut would, and starts it again; takes up to a minute."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline(), "the server did not start again"


@pytest.fixture(scope="session")
def milvus_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusProcess]:
    """A running server of Milvus, without a collection."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'faceprint[milvus]'")
    if importlib.util.find_spec("milvus") is None:
        pytest.skip("no Milvus server is installed")
    with socket.socket() as probe:
        # Its etcd listens there, whatever other ports it is given.
        if probe.connect_ex(("127.0.0.1", 2380)) == 0:
            pytest.skip("another server has port 2380, which Milvus needs")
    folder, port = tmp_path_factory.mktemp("milvus"), free_port()
    command = [sys.executable, str(Path(__file__).with_name("milvus_server.py")), str(folder), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert line, "the server did not start"
            yield MilvusProcess(f"milvus://127.0.0.1:{int(line)}", server)
        finally:
            server.stdin.close()
            server.wait()


@pytest.fixture(scope="session")
def milvus(request: pytest.FixtureRequest) -> str:
    """The address of a running server of Milvus: one of its own, unless FACEPRINT_TEST_MILVUS names one."""
    if address := os.environ.get("FACEPRINT_TEST_MILVUS"):
        pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'faceprint[milvus]'")
        return address
    process: MilvusProcess = request.getfixturevalue("milvus_process")
    return process.address


@pytest.fixture
def collection(milvus: str) -> str:
    """The address of a collection that does not exist yet."""
    return f"{milvus}/faces_{os.urandom(4).hex()}"


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, in which models of databases lie."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def bundle(workspace: Path) -> ModelBundle:
    """A small model, of 8 numbers."""
    return tiny_model(workspace / "model")


@pytest.fixture
def databases(
    schema_address: str, collection: str, bundle: ModelBundle, cache: Path
) -> Iterator[tuple[str, str]]:
    """The addresses of the rows and of the vectors of an empty gallery."""
    Gallery.create(schema_address, bundle, vectors=collection).close()
    yield schema_address, collection
    with contextlib.closing(MilvusVectors.open(collection, bundle.dimension)) as opened:
        opened.drop()


@pytest.fixture(scope="module")
def one_gallery(
    milvus: str,
    postgresql_server: PostgresqlServer,
    bundle: ModelBundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The address of a gallery that several tests of a module use."""
    name = f"gallery_{os.urandom(4).hex()}"
    postgresql_server.execute(f"CREATE SCHEMA {name}")
    address, collection = postgresql_server.address(schema=name), f"{milvus}/{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        Gallery.create(address, bundle, vectors=collection).close()
        yield address
    with contextlib.closing(MilvusVectors.open(collection, bundle.dimension)) as opened:
        opened.drop()
