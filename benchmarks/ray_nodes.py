"""Embedding on Ray with three machines in network namespaces, one killed and one added, beside one machine.

    python -m benchmarks.ray_nodes --model MODEL --photos FOLDER [--count N] [--parts one,overhead,nodes]

Needs root, for `ip netns`. Each machine is a namespace with one core of Ray; a bridge connects them.

Parts:
    one       `faceprint embed` into one file: what the other parts are compared with.
    overhead  `faceprint embed --on ray` on this machine alone: the ratio of its time to that of part one,
              with the start of Ray.
    nodes     three machines; with a third of the parts written, every process of the third is killed, and
              with two thirds a fourth is started. Every photo must be there once; the vectors, and a gallery
              of the parts, must be those of part one.

Prints one table and one JSON line.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.bulk.ingest import ingest_embeddings
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.transfer.embedding_parts import found_parts
from retrieval.transfer.vector_files import read_embeddings

NETWORK = "10.213.77"
PORT = 6379

# Seconds of whole processes, by part.
PROCESS: dict[str, float] = {}

Row = tuple[str | None, str | None, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--photos", type=Path, default=Path("demo/photos"))
    parser.add_argument("--count", type=int, help="photos that are taken, in their order; all unless named")
    parser.add_argument("--photos-per-part", type=int, default=256)
    parser.add_argument("--parts", default="one,overhead,nodes")
    parser.add_argument(
        "--folder", type=Path, help="where results go, and stay; a temporary folder unless named"
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        listed = folder / "photos.txt"
        paths = sorted(map(str, options.photos.resolve().glob("*/*.*")))[: options.count]
        listed.write_text("\n".join(paths) + "\n")
        result: dict[str, Any] = {"photos": len(paths)}
        for part in options.parts.split(","):
            result |= PARTS[part](options, folder, listed)
            print(json.dumps(result), file=sys.stderr, flush=True)
    for name, value in result.items():
        print(f"{name:32} {value}")
    print(json.dumps(result))


def embed(
    options: argparse.Namespace, listed: Path, out: Path, *more: str, inside: Sequence[str] = ()
) -> Any:
    """Runs the command; returns its summary, with the seconds of the whole process."""
    summary = out.with_suffix(".json")
    command = [
        *inside,
        sys.executable,
        "-m",
        "retrieval.cli.app",
        "embed",
        options.model,
        listed,
        "--out",
        out,
    ]
    started = time.perf_counter()
    subprocess.run([*map(str, command), "--summary", str(summary), *more], check=True)
    return json.loads(summary.read_text()) | {"process_seconds": time.perf_counter() - started}


def one(options: argparse.Namespace, folder: Path, listed: Path) -> dict[str, Any]:
    """Embeds on this machine, into `one.parquet`."""
    done = embed(options, listed, folder / "one.parquet")
    PROCESS["one"] = done["process_seconds"]
    return {"one_process_s": round(done["process_seconds"], 1), "one_run_s": done["seconds"]}


def overhead(options: argparse.Namespace, folder: Path, listed: Path) -> dict[str, Any]:
    """Embeds with Ray on this machine alone."""
    shutil.rmtree(folder / "alone", ignore_errors=True)
    # By default Ray's workers yield to all other programs of the machine, which part one does not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
    done = embed(options, listed, folder / "alone", "--on", "ray")
    before = json.loads((folder / "one.json").read_text())
    busy = next(stage for stage in done["stages"] if stage["name"] == "embed")
    return {
        "alone_process_s": round(done["process_seconds"], 1),
        "alone_run_s": done["seconds"],
        "process_ratio": round(done["process_seconds"] / PROCESS["one"], 3) if PROCESS else None,
        "run_ratio": round(done["seconds"] / before["seconds"], 3),
        "alone_embed_busy_s": round(busy["busy_seconds"], 1),
    }


def nodes(options: argparse.Namespace, folder: Path, listed: Path) -> dict[str, Any]:
    """Embeds with three machines, of which one is killed and to which one is added."""
    shutil.rmtree(folder / "nodes", ignore_errors=True)
    count = len(listed.read_text().splitlines())
    expected = -(-count // options.photos_per_part)
    events: dict[str, float] = {}
    with machines() as start:
        inside = [start(number) for number in (1, 2, 3)]
        done: dict[str, Any] = {}

        def run() -> None:
            more = ("--on", "ray", "--address", f"{NETWORK}.11:{PORT}")
            each = ("--photos-per-part", str(options.photos_per_part))
            done.update(embed(options, listed, folder / "nodes", *more, *each, inside=inside[0]))

        thread = threading.Thread(target=run)
        started = time.perf_counter()
        thread.start()
        for share, name, act in (
            (1 / 3, "killed_at_s", lambda: kill(3)),
            (2 / 3, "added_at_s", lambda: start(4)),
        ):
            while thread.is_alive() and len(list((folder / "nodes").glob("*.parquet"))) < share * expected:
                time.sleep(0.2)
            if thread.is_alive():
                act()
                events[name] = round(time.perf_counter() - started, 1)
        thread.join()
    if not done:
        raise SystemExit("The run with three machines failed.")
    return {
        "nodes_run_s": done["seconds"],
        **events,
        **{f"nodes_{name}": done[name] for name in ("found", "embedded", "rejected")},
        **compared(options, folder),
    }


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compares the parts with the file of part one, as rows and as galleries."""
    bundle = ModelBundle.load(options.model)
    (rows, vectors), (others, other_vectors) = (
        rows_of(folder / name, bundle) for name in ("one.parquet", "nodes")
    )
    galleries = [gallery_of(folder / name, bundle, folder) for name in ("one.parquet", "nodes", "nodes")]
    return {
        "rows": len(others),
        "photos_once": len({row[0] for row in others}),
        "rows_equal": rows == others,
        "largest_difference": float(np.abs(vectors - other_vectors).max()),
        "gallery_faces": len(galleries[1]),
        "galleries_equal": galleries[0] == galleries[1],
    }


def rows_of(place: Path, bundle: ModelBundle) -> tuple[list[Row], np.ndarray]:
    """The path, identity and SHA-256 of each row, and the vectors (n, d)."""
    rows: list[Row] = []
    found = []
    for part in found_parts([place]):
        with part.opened() as path:
            for faces, vectors in read_embeddings(
                path, fingerprint=bundle.fingerprint, dimension=bundle.dimension, trusted=False
            ):
                rows += [(face.path, face.identity, face.sha256) for face in faces]
                found.append(vectors)
    return rows, np.concatenate(found)


def gallery_of(place: Path, bundle: ModelBundle, folder: Path) -> list[tuple[int, str, str | None]]:
    """Enrolls, twice; returns the id, SHA-256 and identity of every face."""
    with tempfile.TemporaryDirectory(dir=folder) as made, Gallery.create(Path(made) / "g", bundle) as gallery:
        first = ingest_embeddings(gallery, place)
        again = ingest_embeddings(gallery, place)
        if again.enrolled or again.found != first.found:
            raise SystemExit(f"Enrolling {place} a second time enrolled {again.enrolled} photos.")
        with gallery.vault.store.read() as reader:
            return [(face.id, face.sha256, face.identity) for some in reader.all_faces() for face in some]


@contextmanager
def machines() -> Iterator[Callable[[int], list[str]]]:
    """Yields a function that starts machine 1, 2, ... and returns how commands run inside it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("skipped: network namespaces need root and the command ip (package iproute2).")
    secret = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.update(secret)
    tried = subprocess.run(
        ["ip", "link", "add", "fp-bridge", "type", "bridge"], capture_output=True, text=True
    )
    if tried.returncode:
        raise SystemExit(f"skipped: this machine refuses network namespaces ({tried.stderr.strip()}).")
    started: list[int] = []

    def start(number: int) -> list[str]:
        started.append(number)
        name, link = f"fp-{number}", f"fp-link{number}"
        for command in (
            f"ip netns add {name}",
            f"ip link add {link} type veth peer name eth0 netns {name}",
            f"ip link set {link} master fp-bridge up",
            f"ip -n {name} address add {NETWORK}.{10 + number}/24 dev eth0",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} link set lo up",
        ):
            subprocess.run(command.split(), check=True)
        inside = ["ip", "netns", "exec", name]
        role = ["--head", f"--port={PORT}"] if number == 1 else [f"--address={NETWORK}.11:{PORT}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--num-cpus=1"]
        more = [f"--node-ip-address={NETWORK}.{10 + number}", f"--object-store-memory={2**28}"]
        quiet = ["--include-dashboard=false"] if number == 1 else []
        subprocess.run([*inside, *ray, *more, *quiet], check=True, stdout=subprocess.DEVNULL)
        return inside

    try:
        subprocess.run(["ip", "address", "add", f"{NETWORK}.1/24", "dev", "fp-bridge"], check=True)
        subprocess.run(["ip", "link", "set", "fp-bridge", "up"], check=True)
        yield start
    finally:
        for number in started:
            kill(number)
            subprocess.run(["ip", "netns", "delete", f"fp-{number}"], check=False)
        subprocess.run(["ip", "link", "delete", "fp-bridge"], check=False)


def kill(number: int) -> None:
    """Kills every process of a machine."""
    found = subprocess.run(
        ["ip", "netns", "pids", f"fp-{number}"], capture_output=True, text=True, check=True
    )
    for process in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


PARTS = {"one": one, "overhead": overhead, "nodes": nodes}

if __name__ == "__main__":
    main()
