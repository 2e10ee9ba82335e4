"""Open-set figures with and without fine-tuning, and the coverage of calibration's intervals.

    python -m benchmarks.strangers DATA --weights FILE --keep FOLDER [--recipe modern] [--min-images 10]
                                   [--splits 6] [--image-size 128] [--crop 0.6] [--precision auto]

DATA's people with at least `--min-images` photos are enrolled, all others are strangers. First the protocol
`open` measures FNIR at each FPIR, with a model trained on the enrolled people and with the network before
training. Then a gallery of all their photos is calibrated with half of the strangers and searched for the
other half; no person is in both halves. The benchmark checks whether the observed FPIR of the other half is
within the stated interval, for several random splits. Prints a line for each, then one JSON line. A model
that FOLDER has is not trained again. Docs: docs/recipes.md.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import trained
from retrieval.bulk.ingest import ingest
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from training.evaluation.measure import EvaluationOptions, measure
from training.evaluation.measurements import Identification
from training.evaluation.observe import Observed, observe
from training.evaluation.protocols import photos_of
from training.fitting.recipes import RECIPES

# Number of probes in one call.
_QUERY_BATCH = 1024


@dataclass(frozen=True)
class Kept:
    """The FPIR interval that one half of the strangers gives, and the FPIR of the other half.

    Attributes:
        split: number of the split.
        fpir: the requested FPIR.
        threshold: the calibrated distance.
        low, high: ends of the stated interval.
        observed: share of the searches for the other half that returned an identity.
        n: number of those searches.
    """

    split: int
    fpir: float
    threshold: float
    low: float
    high: float
    observed: float
    n: int

    @property
    def inside(self) -> bool:
        """Whether the observed share is within the interval."""
        return self.low <= self.observed <= self.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", choices=list(RECIPES), default="modern")
    parser.add_argument("--min-images", type=int, default=10)
    parser.add_argument("--splits", type=int, default=6)
    parser.add_argument("--fpir", type=float, default=0.01)
    trained.add_arguments(parser)
    options = parser.parse_args()
    name = f"enrolled-{options.recipe}"
    folder = trained.model(name, options.data, options.recipe, options, min_images=options.min_images)
    missed = open_set(folder, options)
    kept = list(calibrated(ModelBundle.load(folder), options))
    inside = sum(one.inside for one in kept)
    print(f"{inside} of {len(kept)} shares that were observed lie within the interval that was stated")
    print(json.dumps({"missed": missed, "kept": [asdict(one) | {"inside": one.inside} for one in kept]}))


def open_set(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Returns FNIR of the model and of the baselines, by FPIR."""
    asked = EvaluationOptions(
        protocol="open", weights=trained.beside(options.weights), min_images=options.min_images
    )
    found = measure(folder, options.data, options=asked)[0].open
    assert found is not None  # the protocol is open
    print(
        f"{found.identities} people with {found.enrolled:,} photos enrolled, {found.mated:,} searches for "
        f"them and {found.strangers:,} for {found.stranger_identities:,} strangers"
    )
    ways = {options.recipe: found.identification} | {one.name: one.identification for one in found.baselines}
    for name, way in ways.items():
        print(f"{name:24} {_in_words(way)}", flush=True)
    return {name: {f"{p.rate:g}": p.missed.value for p in way.points} for name, way in ways.items()}


def _in_words(way: Identification) -> str:
    parts = [f"closest image {100 * (way.ranking.closest.value or 0):.1f} %; FNIR at FPIR"]
    for point in way.points:
        missed = point.missed
        shown = missed.method
        if missed.value is not None and missed.low is not None and missed.high is not None:
            shown = f"{100 * missed.value:.1f} % ({100 * missed.low:.1f} to {100 * missed.high:.1f})"
        parts.append(f"{point.rate:g}: {shown}")
    return "  ".join(parts)


def calibrated(bundle: ModelBundle, options: argparse.Namespace) -> Iterator[Kept]:
    """Calibrates a gallery with one half of the strangers and searches for the other half, for each split."""
    photos = photos_of(options.data)
    names, counts = np.unique([p.identity for p in photos if p.identity is not None], return_counts=True)
    enrolled = set(names[counts >= options.min_images].tolist())
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "enrolled.csv"
        trained.write_list(listed, options.data, enrolled)
        with Gallery.create(Path(scratch) / "gallery", bundle) as gallery:
            ingest(gallery, [listed])
            strange = [p for p in photos if p.identity is not None and p.identity not in enrolled]
            with Embedder.open(bundle) as embedder:
                strangers = observe(embedder, strange)
            for split in range(options.splits):
                for one in _kept(gallery, strangers, split, options.fpir):
                    print(
                        f"split {one.split}, FPIR {one.fpir:g}: threshold {one.threshold:.3f}, stated "
                        f"{one.low:.4f} to {one.high:.4f}, observed {one.observed:.4f} of {one.n:,}"
                        f"{'' if one.inside else ', outside'}",
                        flush=True,
                    )
                    yield one


def _kept(gallery: Gallery, strangers: Observed, split: int, fpir: float) -> Iterator[Kept]:
    people = np.unique(strangers.identities)
    some = np.random.default_rng(split).permutation(people)[: len(people) // 2]
    one = np.isin(strangers.identities, some)
    identities: Sequence[str | None] = strangers.identities[one].tolist()
    found = gallery.calibrate(fpir, strangers=[(strangers.vectors[one], identities)], seed=split)
    distances = _nearest(gallery, strangers.vectors[~one])
    for point in found.points:
        observed = float((distances <= point.threshold).mean())
        seen = point.seen
        yield Kept(split, point.fpir, point.threshold, seen.low, seen.high, observed, len(distances))


def _nearest(gallery: Gallery, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the distance (n,) from each vector to its nearest enrolled face."""
    found = []
    for start in range(0, len(vectors), _QUERY_BATCH):
        answers = gallery.search_by_vectors(vectors[start : start + _QUERY_BATCH], k=1)
        found += [answer[0].distance for answer in answers]
    return np.array(found)


if __name__ == "__main__":
    main()
