"""The command `serve`: what it needs, what it refuses, and what it leaves to others."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from retrieval.service import server
from retrieval.service.settings import Limits, Settings
from tests.cli.test_app import Faceprint, faceprint

__all__ = ["faceprint"]  # pytest finds the fixture by its name


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_library_and_help_load_none_of_the_service() -> None:
    packages = "{'fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'httpx'}"
    library = "import sys, retrieval; retrieval.Gallery"
    assert run(f"{library}; print({packages} & set(sys.modules))").stdout == "set()\n"
    command = f"""
import sys, retrieval.cli.app as app
sys.argv = ["faceprint", "serve", "--help"]
try:
    app.main()
except SystemExit:
    print({packages} & set(sys.modules))
"""
    assert run(command).stdout.endswith("set()\n")


def test_a_missing_package_is_one_sentence(enrolled: Path) -> None:
    ended = run(f"""
import sys
sys.modules["fastapi"] = None
sys.argv = ["faceprint", "serve", {str(enrolled)!r}]
from retrieval.cli import app
app.main()
""")
    assert ended.returncode == 1
    expected = "The service needs fastapi; install it with pip install 'faceprint[service]'."
    assert (ended.stdout, ended.stderr) == ("", f"faceprint: {expected}\n")


def test_connections_send_small_parts_of_a_response_at_once() -> None:
    """asyncio sets TCP_NODELAY only where the protocol of a socket is stated."""
    with server.listening("localhost", 0) as sockets:
        assert {one.proto for one in sockets} == {socket.IPPROTO_TCP}
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert server.is_private(sockets)
    with server.listening("0.0.0.0", 0) as sockets:
        assert not server.is_private(sockets)


def test_what_cannot_be_served_is_one_sentence(faceprint: Faceprint, enrolled: Path, tmp_path: Path) -> None:
    assert faceprint("serve", tmp_path / "none")[0] == 2
    status, _, err = faceprint("serve", enrolled, "--host", "no.such.host.invalid")
    assert (status, "is unknown" in err, err.count("\n")) == (2, True, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, err = faceprint("serve", enrolled, "--port", taken.getsockname()[1])
    assert (status, "choose another --port" in err, err.count("\n")) == (2, True, 1)


def test_a_damaged_model_ends_the_command_and_its_workers_with_a_sentence(
    faceprint: Faceprint, own_gallery: Path
) -> None:
    (own_gallery / "model" / "model.onnx").write_bytes(b"")
    for workers in (1, 2):
        status, _, err = faceprint("serve", own_gallery, "--port", 0, "--workers", workers)
        assert status == (2 if workers == 1 else 1)
        assert "Traceback" not in err


def test_settings_reach_another_process_unchanged(tmp_path: Path) -> None:
    limits = Limits(pending=7, rate=2.5)
    settings = Settings(tmp_path, host="::1", port=0, workers=3, access_log=True, limits=limits)
    assert Settings.from_json(settings.to_json()) == settings
    files = {"sources": (tmp_path / "a",), "certfile": tmp_path / "b", "keyfile": tmp_path / "c"}
    settings = replace(settings, **files)
    assert Settings.from_json(settings.to_json()) == settings
