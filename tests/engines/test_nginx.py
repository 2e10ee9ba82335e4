"""Two followers behind nginx, as deploy/nginx.conf has it: one is killed under load, and no search fails."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from retrieval.gallery.gallery import Gallery
from retrieval.replication.objects import open_objects
from retrieval.replication.publish import Publisher
from retrieval.replication.status import publication_status
from tests.engines.conftest import free_port
from tests.operations import add, face, tiny_model, vector_of
from tests.service.server import Server

_CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx.conf"


@contextmanager
def in_front_of(nginx: str, followers: list[int], folder: Path) -> Iterator[str]:
    """Runs nginx with the configuration of deploy/, with other ports and paths; yields its address."""
    port = free_port()
    text = _CONFIGURATION.read_text()
    for former, here in zip((8000, 8001, 8002), (port, *followers), strict=True):
        assert text.count(f":{former}") >= 1
        text = re.sub(rf"127\.0\.0\.1:{former}(?=[; ])", f"127.0.0.1:{here}", text)
    folder.mkdir()
    text = text.replace("pid /run/nginx.pid;", f"pid {folder}/nginx.pid; error_log {folder}/error.log warn;")
    paths = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", f"http {{\n{paths}")
    (folder / "nginx.conf").write_text(text)
    command = [nginx, "-c", f"{folder}/nginx.conf", "-p", str(folder), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


def test_a_follower_that_is_killed_under_load_costs_no_search(nginx: str, tmp_path: Path) -> None:
    """Meanwhile a new state is published; each answer is of one state, the last ones of the new one."""
    store = tmp_path / "store"
    with ExitStack() as stack:
        made = Gallery.create(tmp_path / "people.gallery", tiny_model(tmp_path / "model"))
        gallery = stack.enter_context(made)
        add(gallery, range(40))
        publisher = Publisher(gallery.vault, str(store))
        publisher.publish()
        servers = []
        for name in ("one", "two"):
            follow(tmp_path, name, "--once")
            servers.append(stack.enter_context(served(tmp_path, name)))
        address = stack.enter_context(in_front_of(nginx, [one.port for one in servers], tmp_path / "nginx"))
        query = {"vector": vector_of(face(50).sha256).tolist(), "k": 1000}
        answers: list[int] = []
        failed: list[object] = []
        ended = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
                while not ended.is_set():
                    try:
                        answer = client.post("/v1/search", json=query)
                    except httpx.HTTPError as error:
                        failed.append(error)
                        continue
                    if answer.status_code != 200:
                        failed.append(answer.text)
                    else:
                        answers.append(len(answer.json()["answers"][0]["matches"]))

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for one in askers:
            one.start()
        wait(lambda: len(answers) > 60)
        servers[0].process.send_signal(signal.SIGKILL)
        servers[0].process.wait()
        count = len(answers)
        wait(lambda: len(answers) > count + 60)
        add(gallery, range(50, 60))
        publisher.publish()
        wait(lambda: 50 in answers)
        back = stack.enter_context(served(tmp_path, "one", port=servers[0].port))
        wait(lambda: 'route="/v1/search"' in back.client.get("/metrics").text)
        ended.set()
        for one in askers:
            one.join()
        assert not failed
        assert set(answers) == {40, 50}
        found = [one.client.post("/v1/search", json=query).json() for one in (servers[1], back)]
        assert found[0]["answers"] == found[1]["answers"]
        assert {one.is_current for one in publication_status(open_objects(str(store))).followers} == {True}


def served(root: Path, name: str, *, port: int = 0) -> Server:
    command = ("follow", root / "store", root / name, "--serve", "--every", "0.2s", "--port", port)
    return Server(root / name, root / f"{name}-{port}.log", command=command)


def follow(root: Path, name: str, *options: str) -> None:
    program = [sys.executable, "-m", "retrieval.cli.app"]
    subprocess.run([*program, "follow", root / "store", root / name, "--name", name, *options], check=True)


def wait(until: object) -> None:
    """Waits for an event; the limit is for what hangs."""
    assert callable(until)
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline, "it did not happen within 120 s"
        time.sleep(0.05)
