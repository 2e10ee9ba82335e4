"""What finding and aligning faces gains: one network on three crops of the same photos.

    python -m benchmarks.crops MODEL DATA PAIRS --choose PAIRS [--crops 1 0.6 ...] [--margins 0 0.1 ...]
                               [--min-images 10]

MODEL was imported with a detector. Its network sees the central square of each photo, a square around the
box of the detected face, and the face aligned by its landmarks. The share of the photo and the margin around
the box are the best on the pairs of `--choose`, such as LFW's pairsDevTrain.txt, and no other figure. PAIRS,
such as LFW's pairs.txt, gives accuracies with their standard errors. With `--min-images` people with so many
photos are enrolled and all others are strangers, as in `faceprint evaluate --protocol open`. Prints two
tables and one JSON line; everything in %. Docs: docs/benchmarks.md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.images import pixels
from retrieval.images.detection import DetectedFace
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.picture import Pixels
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources.photos import Photo
from retrieval.system.cpu import reading_threads
from training.evaluation import intervals, open_set, protocols
from training.evaluation.measurements import Figure, Identification, Speed
from training.evaluation.observe import Observed, grey
from training.evaluation.pairs import Pair, named, photos_in, read_pairs
from training.metrics.verification import Folds, across_folds

_BATCH = 64
_FOLDS = 10


@dataclass(frozen=True)
class Way:
    """A way to take the input of a network from a photo: `square` returns uint8 (size, size, 3), RGB."""

    name: str
    square: Callable[[str], Pixels]


@dataclass(frozen=True)
class Seen:
    """Photos and what the network makes of them: n embeddings (n, d) float32, grey pictures (n, 1024)."""

    photos: Sequence[Photo]
    vectors: NDArray[np.float32]
    grey: NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--choose", type=Path, required=True, help="pairs that crop and margin come from")
    parser.add_argument("--crops", type=float, nargs="+", default=[1.0, 0.8, 0.7, 0.6, 0.5, 0.4])
    parser.add_argument("--margins", type=float, nargs="+", default=[-0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--min-images", type=int, help="measure an open set too")
    asked = parser.parse_args()
    bundle = ModelBundle.load(asked.model)
    reader = bundle.load_photo_reader()
    if reader.detector is None:
        raise SystemExit(f"{asked.model} has no face detector; import it with --detector.")
    centre = [Way(f"central square, {share:g} of the photo", _centre(reader, share)) for share in asked.crops]
    faces = _faces(reader)
    boxes = [Way(f"box, margin {margin:g}", _box(reader, faces, margin)) for margin in asked.margins]
    aligned = Way("aligned", reader.square)
    photos = protocols.photos_of(asked.data)
    chosen, pairs = chosen_pairs(asked.choose), read_pairs(asked.pairs)
    candidates, measured, opened = {}, {}, {}
    with Embedder.open(bundle) as embedder, ThreadPoolExecutor(reading_threads()) as pool:
        some = photos_in(chosen, photos, asked.data)
        print(f"{asked.choose.name}: accuracy ± standard error")
        for way in [*centre, *boxes, aligned]:
            candidates[way.name] = folds = accuracies(seen(embedder, pool, way, some), chosen, asked.data)
            print(_row(way, folds), flush=True)
        if asked.min_images is None:
            photos = photos_in(pairs, photos, asked.data)
        print(f"{asked.pairs.name}: accuracy ± standard error, and 95 % interval")
        for way in [_best(centre, candidates), _best(boxes, candidates), aligned]:
            found = seen(embedder, pool, way, photos)
            measured[way.name] = folds = accuracies(found, pairs, asked.data)
            print(_row(way, folds), _interval(intervals.fold_mean(folds.accuracies, len(pairs))), flush=True)
            if asked.min_images is not None:
                opened[way.name] = open_figures(found, bundle, asked.data, asked.min_images)
                print(f"{'':40}{_in_words(opened[way.name])}", flush=True)
    told = {
        "chosen on": {name: folds.accuracies.tolist() for name, folds in candidates.items()},
        "pairs": {name: folds.accuracies.tolist() for name, folds in measured.items()},
        "open": {name: _told(found) for name, found in opened.items()},
    }
    print(json.dumps(told))


def _faces(reader: PhotoReader) -> Callable[[str], DetectedFace]:
    """Returns a function that finds the face of a photo, once for all margins."""

    @cache
    def face(path: str) -> DetectedFace:
        main = reader.inspect(path).main
        if main is None or main.face is None:
            raise SystemExit(f"No face was found in {path}; leave it out.")
        return main.face

    return face


def _centre(reader: PhotoReader, share: float) -> Callable[[str], Pixels]:
    chosen = reader.preprocessing
    return partial(pixels.read, size=chosen.size, crop=share, colour=chosen.colour)


def _box(reader: PhotoReader, faces: Callable[[str], DetectedFace], margin: float) -> Callable[[str], Pixels]:
    chosen = reader.preprocessing

    def square(path: str) -> Pixels:
        matrix = box_matrix(faces(path), size=chosen.size, margin=margin)
        made: Pixels = pixels.align(
            path, size=chosen.size, locate=lambda view: [matrix], colour=chosen.colour
        )[0]
        return made

    return square


def box_matrix(face: DetectedFace, *, size: int, margin: float) -> NDArray[np.float64]:
    """Returns the matrix (2, 3) from points of a photo to points of a square around the box of a face.

    Args:
        face: with its box.
        size: side of the square in pixels.
        margin: context on each side of the box's longer side, as a share of it; negative cuts into the box.
    """
    left, top, width, height = face.box
    side = max(width, height) * (1 + 2 * margin)
    corner = np.array([left + width / 2, top + height / 2]) - side / 2
    scale = size / side
    return np.column_stack([np.eye(2) * scale, -scale * corner])


def chosen_pairs(path: Path) -> list[Pair]:
    """Returns pairs in folds; those of a list of one fold, such as pairsDevTrain.txt, are dealt into ten."""
    first, *lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    if len(first.split()) == 2:
        return read_pairs(path)
    each = int(first) // _FOLDS
    folds = [
        half[fold * each : (fold + 1) * each]
        for fold in range(_FOLDS)
        for half in (lines[: int(first)], lines[int(first) :])
    ]
    with tempfile.TemporaryDirectory() as folder:
        dealt = Path(folder) / path.name
        dealt.write_text("\n".join([f"{_FOLDS}\t{each}", *(line for fold in folds for line in fold), ""]))
        return read_pairs(dealt)


def seen(embedder: Embedder, pool: Executor, way: Way, photos: Sequence[Photo]) -> Seen:
    """Returns photos as the network sees them in this way."""
    vectors, small = [], []
    for start in range(0, len(photos), _BATCH):
        paths = [photo.path or "" for photo in photos[start : start + _BATCH]]
        squares = np.stack(list(pool.map(way.square, paths)))
        vectors.append(embedder.embed(squares).vectors)
        small.append(grey(squares))
    return Seen(photos, np.concatenate(vectors), np.concatenate(small))


def accuracies(found: Seen, pairs: Sequence[Pair], data: Path) -> Folds:
    """Returns the accuracy of each fold of pairs, at the threshold that is best on the other folds."""
    row = {named(photo.path or "", data): number for number, photo in enumerate(found.photos)}
    vectors = found.vectors.astype(np.float64)
    first = vectors[[row[pair.first] for pair in pairs]]
    second = vectors[[row[pair.second] for pair in pairs]]
    same, folds = np.array([pair.same for pair in pairs]), np.array([pair.fold for pair in pairs])
    return across_folds(np.linalg.norm(first - second, axis=1), same, folds)[0]


def _best(ways: Iterable[Way], measured: Mapping[str, Folds]) -> Way:
    return max(ways, key=lambda way: measured[way.name].mean)


def open_figures(found: Seen, bundle: ModelBundle, data: Path, min_images: int) -> Identification:
    """Measures the open set of `faceprint evaluate --protocol open` with its defaults."""
    photos = found.photos
    division = protocols.open_set(photos, data, bundle, min_images=min_images, fraction=0.3, seed=0)
    place = {photo.path: number for number, photo in enumerate(photos)}
    rows = [place[photo.path] for photo in (*division.enrolled, *division.probes)]
    observed = Observed(
        paths=tuple(photos[row].path or "" for row in rows),
        identities=np.array([photos[row].identity or "" for row in rows], np.str_),
        digests=(),
        vectors=found.vectors[rows],
        probabilities=None,
        grey=found.grey[rows],
        left_out=(),
        speed=Speed(len(rows), 0.0, 0.0, "cpu", "onnxruntime"),
    )
    measured, _ = open_set.measure(
        observed,
        np.arange(len(rows)) < len(division.enrolled),
        trained=frozenset(),
        min_images=min_images,
        trained_photos=0,
        before=None,
        seed=0,
    )
    return measured.identification


def _row(way: Way, folds: Folds) -> str:
    return f"{way.name:40}{100 * folds.mean:7.2f} ± {100 * folds.standard_error:.2f}"


def _interval(figure: Figure) -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return figure.method
    return f"({100 * figure.low:.2f} to {100 * figure.high:.2f})"


def _in_words(found: Identification) -> str:
    parts = [f"closest photo {_percent(found.ranking.closest)}", "FNIR at FPIR"]
    parts += [f"{point.rate:g}: {_percent(point.missed)}" for point in found.points]
    return "  ".join(parts)


def _percent(figure: Figure) -> str:
    return figure.method if figure.value is None else f"{100 * figure.value:.2f} {_interval(figure)}"


def _told(found: Identification) -> dict[str, Any]:
    figures = {"closest": found.ranking.closest}
    figures |= {f"FNIR at FPIR {point.rate:g}": point.missed for point in found.points}
    return {name: [one.value, one.low, one.high] for name, one in figures.items()}


if __name__ == "__main__":
    main()
