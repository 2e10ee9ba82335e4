"""The results of an evaluation, as a tree of frozen dataclasses that is saved as JSON.

    Measured
    ├── ModelFacts, DataFacts, Speed, left_out, notes
    └── one of  Closed  closed-set identification: classifier and nearest photos
                Open    open-set identification: enrolled people and strangers
                Pairs   verification: do two photos show the same person

    Comparison  two evaluations on the same photos, with paired tests

`metrics.json` is `as_json(measured)`: its keys are the names of the fields. docs/evaluation.md explains them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Final

# Format number of metrics.json. A reader refuses any other number.
FORMAT: Final = 1


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95% interval.

    Attributes:
        value: None if there are too few trials.
        low, high: ends of the interval; None if there is none.
        n: number of trials: photos, searches or pairs.
        method: how the interval was computed, or why there is no value: "bootstrap over 62 identities",
            "Wilson", "Student's t over 10 folds", "too few: ...".
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None


@dataclass(frozen=True)
class ModelFacts:
    """The model that was evaluated.

    Attributes:
        name: name of its folder.
        fingerprint: of the bundle.
        labels: number of labels of the classifier.
        input_size: side of the input, in pixels.
        crop: share of the shorter side that is kept, centred.
        dimension: numbers of an embedding.
        recipe: as its card states it.
        architecture: of the network.
        trained_photos: number of photos that it was trained on, according to its card.
        trained_with: the device of the training, according to its card; None if the card does not state it.
    """

    name: str
    fingerprint: str
    labels: int
    input_size: int
    crop: float
    dimension: int
    recipe: dict[str, Any]
    architecture: str = "resnet50"
    trained_photos: int = 0
    trained_with: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """The photos that the model was measured on.

    Attributes:
        folder: as passed by the caller.
        gallery: folder of --gallery, as passed by the caller; None without one.
        split: "the model's own split" (of its card), "seed 0, 30% held out", the name of a pairs file, ...
        seed: of the split and of every bootstrap.
        found: number of photos that the protocol uses.
        embedded: number of those that could be read.
    """

    folder: str
    gallery: str | None
    split: str
    seed: int
    found: int
    embedded: int


@dataclass(frozen=True)
class Speed:
    """Throughput of reading, decoding and embedding in this run, in wall-clock time."""

    photos: int
    seconds: float
    photos_per_second: float
    device: str
    engine: str


@dataclass(frozen=True)
class LeftOut:
    """A photo that could not be used: `reason` is a stable code, `detail` is text for people."""

    path: str
    identity: str | None
    reason: str
    detail: str | None


@dataclass(frozen=True)
class Confusion:
    """The number of photos of `actual` that were identified as `said`."""

    actual: str
    said: str
    number: int


@dataclass(frozen=True)
class Ranking:
    """Rank-based figures of mated searches.

    Attributes:
        closest: share of searches in which the nearest photo shows the right person (closest-image
            agreement).
        cmc: at index k - 1 the share of searches with the right person among the k nearest people, k = 1..20.
        mean_average_precision: mean over searches of the average precision of the gallery's photos, ordered
            by distance; None if the gallery was searched for its nearest people only.
    """

    closest: Figure
    cmc: tuple[Figure, ...]
    mean_average_precision: Figure | None


@dataclass(frozen=True)
class Bin:
    """The photos with a probability in (low, high]: their number, mean probability and accuracy."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Calibration of the classifier's probabilities on held-out photos.

    Attributes:
        error: expected calibration error over all of them, 15 bins of equal width.
        temperature: the scalar that minimises the loss on one half; None if there are too few photos.
        before, after: calibration error on the other half, without the temperature and with it.
        loss_before, loss_after: mean negative log-likelihood on the other half, in nats. The temperature is
            fitted to lower this loss.
        bins: the reliability diagram, over all held-out photos.
    """

    error: Figure
    temperature: float | None
    before: Figure
    after: Figure
    loss_before: Figure
    loss_after: Figure
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Classifier:
    """Figures of the classifier on held-out photos of people that it has a label for."""

    accuracy: Figure
    top5: Figure
    confusions: tuple[Confusion, ...]
    calibration: Calibration


@dataclass(frozen=True)
class Person:
    """A row of the table of identities.

    Attributes:
        enrolled: number of the person's enrolled photos.
        probes: number of the person's photos that were searched for.
        right: number of probes that the classifier identified correctly; None if it has no label for the
            person.
        closest: number of probes with a nearest photo that shows this person.
        taken_for: the identity that the nearest photo of the other probes shows most often; None if there are
            no other probes.
    """

    identity: str
    enrolled: int
    probes: int
    right: int | None
    closest: int
    taken_for: str | None


@dataclass(frozen=True)
class Mistake:
    """A search in which the nearest photo shows another identity. Lists of mistakes start with the nearest.

    Attributes:
        path: of the probe, relative to the data folder.
        identity: of the probe.
        nearest_path: path of the nearest photo, relative to the data folder (in a --gallery: as stored).
        nearest_identity: identity of the nearest photo.
        distance: Euclidean, between the two.
        predicted, probability: label and probability of the classifier; None if it was not evaluated.
        right_path, right_distance: the nearest photo of the right person; None if there is none, or (in a
            --gallery) if that person is not among the nearest.
        stranger: whether the search is non-mated, so that no answer is right.
    """

    path: str
    identity: str | None
    nearest_path: str
    nearest_identity: str
    distance: float
    predicted: str | None
    probability: float | None
    right_path: str | None = None
    right_distance: float | None = None
    stranger: bool = False


@dataclass(frozen=True)
class ClosedBaseline:
    """A baseline for closed-set identification, measured on the same split."""

    name: str
    says: str
    ranking: Ranking


@dataclass(frozen=True)
class Closed:
    """Closed-set identification: held-out photos searched among enrolled photos of the same people.

    Attributes:
        enrolled, probes: numbers of photos.
        identities: number of people with enrolled photos.
        unanswerable: number of probes of people without a readable enrolled photo; no figure counts them.
        ranking: of the model's embeddings.
        classifier: None if it has no label for any of the probes.
        confusions: by the nearest photo.
        people: every identity with a probe, those with the most mistakes first.
        mistakes: by the nearest photo, at most 50.
        baselines: raw pixels, eigenfaces, and the network before fine-tuning if its weights were given.
    """

    enrolled: int
    probes: int
    identities: int
    unanswerable: int
    ranking: Ranking
    classifier: Classifier | None
    confusions: tuple[Confusion, ...]
    people: tuple[Person, ...]
    mistakes: tuple[Mistake, ...]
    baselines: tuple[ClosedBaseline, ...]


@dataclass(frozen=True)
class OperatingPoint:
    """The miss rate at an allowed rate of false alarms.

    Attributes:
        rate: the allowed rate: FPIR of an identification, FAR of a verification.
        threshold: the largest distance at which the false alarms measured here do not exceed the rate; None
            if there are too few trials.
        missed: FNIR of an identification, 1 - TAR of a verification, at that distance. Its interval resamples
            identities on both sides, and computes the threshold again for each resample.
    """

    rate: float
    threshold: float | None
    missed: Figure


@dataclass(frozen=True)
class Curve:
    """The trade-off over all thresholds, thinned to at most 200 points in order of threshold.

    Attributes:
        false_alarms: FPIR or FAR.
        missed: FNIR or 1 - TAR.
        thresholds: distances.
    """

    false_alarms: tuple[float, ...]
    missed: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Identification:
    """Open-set figures of one set of features: points at FPIR 0.1, 0.01 and 0.003, the DET curve, ranks."""

    points: tuple[OperatingPoint, ...]
    curve: Curve
    ranking: Ranking


@dataclass(frozen=True)
class OpenBaseline:
    """A baseline for open-set identification, measured on the same searches."""

    name: str
    says: str
    identification: Identification


@dataclass(frozen=True)
class Open:
    """Open-set identification: mated searches (enrolled people) and non-mated ones (strangers).

    Attributes:
        min_images: people with at least this many photos are enrolled; None with --gallery.
        enrolled: number of enrolled photos.
        identities: number of enrolled people.
        trained_identities: number of enrolled people that the model was trained on.
        mated, strangers: numbers of mated and of non-mated searches.
        stranger_identities: number of people in the non-mated searches.
        trained_photos: number of photos that the model was trained on and that are not enrolled. They are not
            searched for.
        already_enrolled: number of photos with the same bytes as an enrolled photo. Not searched for.
        mistakes: searches in which the nearest photo shows another identity, the nearest first, at most 50.
    """

    min_images: int | None
    enrolled: int
    identities: int
    trained_identities: int
    mated: int
    strangers: int
    stranger_identities: int
    trained_photos: int
    already_enrolled: int
    identification: Identification
    mistakes: tuple[Mistake, ...]
    baselines: tuple[OpenBaseline, ...]


@dataclass(frozen=True)
class Verification:
    """Verification figures: pairs are classified by a threshold on their distance.

    Attributes:
        accuracy: mean over folds, each with the threshold that is best on the other folds.
        standard_error: of that mean.
        folds, thresholds: accuracy of each fold, and its threshold.
        area: area under the ROC curve. Its interval resamples identities; a pair of two people counts for the
            first of them.
        points: at FAR 0.1, 0.01 and 0.001; TAR is 1 - missed.
        curve: ROC is (false_alarms, 1 - missed).
    """

    accuracy: Figure
    standard_error: float | None
    folds: tuple[float, ...]
    thresholds: tuple[float, ...]
    area: Figure
    points: tuple[OperatingPoint, ...]
    curve: Curve


@dataclass(frozen=True)
class PairsBaseline:
    """A baseline for verification, measured on the same pairs."""

    name: str
    says: str
    verification: Verification


@dataclass(frozen=True)
class Pairs:
    """Verification: pairs of photos that show the same person or two people.

    Attributes:
        same, different: numbers of pairs of one person and of two.
        left_out: number of pairs with a photo that could not be read.
        people: number of people in the pairs.
        trained_people: number of those that the model was trained on. With them the test is not fair.
        verification: over all pairs.
        unseen: over the pairs without people that the model was trained on. None if these are all pairs, or
            too few to measure.
        unseen_pairs: number of those pairs.
    """

    same: int
    different: int
    left_out: int
    people: int
    trained_people: int
    verification: Verification
    unseen: Verification | None
    unseen_pairs: int
    baselines: tuple[PairsBaseline, ...]


@dataclass(frozen=True)
class Measured:
    """The results of one evaluation. Exactly one of `closed`, `open` and `pairs` is set.

    Attributes:
        protocol: "closed", "open" or "lfw-pairs".
        notes: caveats for the reader, one sentence each: a missing baseline, photos seen in training.
    """

    protocol: str
    model: ModelFacts
    data: DataFacts
    speed: Speed
    closed: Closed | None = None
    open: Open | None = None
    pairs: Pairs | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    created_at: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Paired:
    """One figure of two evaluations, on the photos (or pairs) that both have.

    Attributes:
        name: of the figure.
        a, b: its values in the two evaluations.
        difference: b - a; its interval resamples identities.
        only_a, only_b: number of photos that only this evaluation has right; None for a figure that is not a
            share of right answers.
        p: p-value of McNemar's exact test on these two numbers; None if there is no such test.
    """

    name: str
    a: Figure
    b: Figure
    difference: Figure
    only_a: int | None
    only_b: int | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two evaluations.

    Attributes:
        a, b: names of the evaluations.
        protocol: of both.
        common: number of photos (or pairs) that both have.
        only_in_a, only_in_b: numbers of photos that only one has. No figure here counts them.
        notes: caveats for the reader, one sentence each.
    """

    a: str
    b: str
    protocol: str
    common: int
    only_in_a: int
    only_in_b: int
    tests: tuple[Paired, ...]
    notes: tuple[str, ...] = ()
    format: int = FORMAT


def as_json(tree: Any) -> Any:
    """Converts a dataclass of this module to dicts, lists and numbers; NaN and infinity become None."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {one.name: as_json(getattr(tree, one.name)) for one in dataclasses.fields(tree)}
    if isinstance(tree, dict):
        return {str(name): as_json(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [as_json(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
