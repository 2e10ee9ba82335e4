"""Settings of the CPU engine: threads, spinning, photos per pass, graph, activations, number types.

    python -m benchmarks.engines --model MODEL --photos FOLDER --part threads [--seconds 240]

Parts: threads, pipeline, passes, graph, numbers; activations, for an imported model.

Settings are timed in turn, round after round, and each is compared with the first setting of its own round:
the speed of a shared machine varies from minute to minute, ratios within a round do not. `beside` is the
other load: nothing, threads that decode JPEGs at full speed, or a pipeline in which threads decode each batch
while the previous one is embedded. Prints one table and one JSON line.
"""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import PRECISIONS, Engine
from retrieval.models.onnx_prelu import in_blocked_form
from retrieval.sources import photos
from retrieval.system.cpu import usable_cores

Pixels = NDArray[np.uint8]
Vectors = NDArray[np.float32]
Run = Callable[[Pixels], Vectors]

PARTS = ("threads", "pipeline", "passes", "graph", "activations", "numbers")
LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
# Number of photos that a setting embeds in a round. Rounds are short, so that all settings of a round run
# under the same conditions.
_BLOCK = 64


@dataclass(frozen=True)
class Setting:
    """Settings of the engine. Lanes are threads that each run whole passes through one shared session."""

    name: str
    threads: int | None = 1
    spinning: bool = True
    pass_size: int = 16
    lanes: int = 1
    level: str = "ENABLE_ALL"


@dataclass(frozen=True)
class Beside:
    """The load beside the engine: `decoders` threads that run independently or feed the engine."""

    name: str
    decoders: int = 0
    feeds: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, default="threads")
    parser.add_argument("--seconds", type=float, default=240, help="of measuring, about")
    parser.add_argument("--block", type=int, default=_BLOCK, help="photos that a setting embeds in a round")
    options = parser.parse_args()
    bundle = ModelBundle.load(options.model)
    files = [photo.path for photo in photos.scan([options.photos])]
    files = files[:: max(1, len(files) // options.block)][: options.block]
    rows = measured(bundle, files, options.part, options.seconds)
    show(rows)
    facts = {
        "part": options.part,
        "block": len(files),
        "size": bundle.input_size,
        "cores": usable_cores(),
        "onnxruntime": version("onnxruntime"),
        "python": platform.python_version(),
    }
    print(json.dumps({**facts, "rows": rows}))


def measured(bundle: ModelBundle, files: list[Path], part: str, seconds: float) -> list[dict[str, Any]]:
    """Returns the rows of the table, one for each setting and each load beside it."""
    batch = np.stack([_read(bundle, path) for path in files])
    engines = {setting.name: run for setting, run in _engines(bundle, batch, part)}
    reference = next(iter(engines.values()))(batch)
    drift = {name: _drift(run(batch), reference) for name, run in engines.items()}
    besides = _BESIDES[part]
    rows = []
    for beside in besides:
        pace = _paces(bundle, engines, batch, files, beside, seconds / len(besides))
        first = next(iter(pace.values()))
        for name, paces in pace.items():
            ratios = [one / other for one, other in zip(paces, first, strict=True)]
            rows.append(
                {
                    "setting": name,
                    "beside": beside.name,
                    "photos_per_second": round(statistics.median(paces), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_quartiles": [round(float(q), 3) for q in np.quantile(ratios, (0.25, 0.75))],
                    "rounds": len(paces),
                    **drift[name],
                }
            )
    return rows


def settings(part: str, cores: int) -> list[Setting]:
    """Returns the settings that a part compares; the first one is the reference."""
    if part in ("threads", "pipeline"):
        return [
            Setting("default, passes of 64", threads=None, pass_size=64),
            Setting("default", threads=None),
            Setting(f"{cores} threads", threads=cores),
            Setting(f"{cores} threads, no spinning", threads=cores, spinning=False),
            Setting("1 thread", threads=1),
            Setting(f"{cores} lanes of 1 thread", lanes=cores),
        ]
    if part == "passes":
        return [
            Setting(f"{lanes} x {threads}, passes of {size}", threads, False, size, lanes)
            for lanes, threads in ((1, cores), (cores, 1))
            for size in (64, 32, 16, 8, 4, 1)
        ]
    if part == "activations":
        return [Setting("PReLU as in the file", lanes=cores)]
    levels = reversed(LEVELS) if part == "graph" else LEVELS[-1:]
    return [Setting(level, cores, spinning=False, level=level) for level in levels]


_ALONE = [Beside("nothing")]
_BESIDES = {
    "threads": [*_ALONE, Beside("1 thread decodes", 1), Beside("2 threads decode", 2)],
    "pipeline": [Beside("1 thread feeds it", 1, feeds=True), Beside("2 threads feed it", 2, feeds=True)],
    "passes": _ALONE,
    "graph": _ALONE,
    "activations": _ALONE,
    "numbers": _ALONE,
}


def _engines(bundle: ModelBundle, batch: Pixels, part: str) -> Iterator[tuple[Setting, Run]]:
    for setting in settings(part, usable_cores()):
        yield setting, _onnx(str(bundle.graph_path), setting)
    if part == "activations":
        setting = Setting("in the order of convolutions", lanes=usable_cores())
        yield setting, _onnx(in_blocked_form(bundle.graph_path.read_bytes()), setting)
    if part == "numbers":
        yield from _number_types(bundle, batch)


def _onnx(graph: str | bytes, setting: Setting) -> Run:
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    if setting.threads is not None:
        chosen.intra_op_num_threads = setting.threads
    chosen.add_session_config_entry("session.intra_op.allow_spinning", str(int(setting.spinning)))
    chosen.log_severity_level = 3
    chosen.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{setting.level}")
    session = onnxruntime.InferenceSession(graph, chosen, providers=["CPUExecutionProvider"])
    lanes = ThreadPoolExecutor(setting.lanes)

    def one(pixels: Pixels) -> Vectors:
        return session.run(["embedding"], {"pixels": pixels})[0]

    def run(pixels: Pixels) -> Vectors:
        size = min(setting.pass_size, -(-len(pixels) // setting.lanes))
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        return np.concatenate(list(lanes.map(one, parts) if setting.lanes > 1 else map(one, parts)))

    return run


def _number_types(bundle: ModelBundle, batch: Pixels) -> Iterator[tuple[Setting, Run]]:
    """Yields onnxruntime's int8, of weights only and with activations, and the torch engine's precisions."""
    import tempfile

    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(batch, max(1, len(batch) // 8)))

        def get_next(self) -> dict[str, Pixels] | None:
            part = next(self.batches, None)
            return None if part is None else {"pixels": part}

    cores = usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        prepared, dynamic, static = (f"{folder}/{name}.onnx" for name in ("prepared", "dynamic", "static"))
        quant_pre_process(str(bundle.graph_path), prepared)
        # QUInt8: onnxruntime's ConvInteger does not support signed weights on a CPU.
        quantize_dynamic(prepared, dynamic, weight_type=QuantType.QUInt8)
        quantize_static(prepared, static, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        for name, path in (("int8, dynamic", dynamic), ("int8, static", static)):
            setting = Setting(name, cores, spinning=False)
            yield setting, _onnx(path, setting)
    from retrieval.models.torch_engine import TorchEngine

    for precision in PRECISIONS:
        yield Setting(f"torch, {precision}"), _torch(TorchEngine.load(bundle, "cpu", precision=precision))


def _torch(engine: Engine) -> Run:
    return lambda pixels: engine(pixels)[0]


def _paces(
    bundle: ModelBundle,
    engines: dict[str, Run],
    batch: Pixels,
    files: list[Path],
    beside: Beside,
    seconds: float,
) -> dict[str, list[float]]:
    """Measures photos/s of each engine, one figure per round; at least three rounds."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    ends = time.perf_counter() + seconds
    with _decoding(bundle, files, 0 if beside.feeds else beside.decoders):
        while time.perf_counter() < ends or len(next(iter(found.values()))) < 3:
            for name, run in engines.items():
                start = time.perf_counter()
                if beside.feeds:
                    _piped(bundle, run, files, beside.decoders)
                else:
                    run(batch)
                found[name].append(len(batch) / (time.perf_counter() - start))
    return found


def _piped(bundle: ModelBundle, run: Run, files: list[Path], decoders: int) -> None:
    """Embeds files in batches of 32 while threads decode the following ones."""
    with ThreadPoolExecutor(decoders) as threads:
        decoded = threads.map(lambda path: _read(bundle, path), files)
        for start in range(0, len(files), 32):
            run(np.stack([next(decoded) for _ in files[start : start + 32]]))


@contextmanager
def _decoding(bundle: ModelBundle, files: list[Path], decoders: int) -> Iterator[None]:
    over = threading.Event()

    def work() -> None:
        for path in cycle(files):
            if over.is_set():
                return
            _read(bundle, path)

    threads = [threading.Thread(target=work) for _ in range(decoders)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _read(bundle: ModelBundle, path: Path) -> Pixels:
    return bundle.load_photo_reader().square(path)


def _drift(found: Vectors, reference: Vectors) -> dict[str, Any]:
    """Returns the largest relative change of a vector, and of a distance between two vectors."""
    wide, exact = found.astype(np.float64), reference.astype(np.float64)
    vectors = np.linalg.norm(wide - exact, axis=1) / np.linalg.norm(exact, axis=1)
    one, other = (np.linalg.norm(rows[:, None] - rows[None], axis=2) for rows in (wide, exact))
    apart = other > 0
    return {
        "same_bits": bool(np.array_equal(found, reference)),
        "vector_drift": float(f"{vectors.max():.2g}"),
        "distance_drift": float(f"{(np.abs(one - other)[apart] / other[apart]).max():.2g}"),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    heads = f"{'setting':32} {'beside':22} {'photos/s':>9} {'ratio':>7} {'quartiles':>15}"
    print(f"{heads} {'drift':>9} {'of distances':>13}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        drift = "same bits" if row["same_bits"] else f"{row['vector_drift']:.1e}"
        print(
            f"{row['setting']:32} {row['beside']:22} {row['photos_per_second']:9,.1f} {row['ratio']:7.2f} "
            f"{low:7.2f} {high:7.2f} {drift:>9} {row['distance_drift']:13.1e}"
        )


if __name__ == "__main__":
    main()
