"""Measurements: all that an evaluation gives, as a tree of frozen dataclasses that is saved as JSON.

    Measured
    ├── ModelFacts, DataFacts, Speed, left_out, notes
    └── one of  Closed  who is it, among the people of the gallery: classifier and closest photos
                Open    who is it, if it is anybody of the gallery at all
                Pairs   are these two photos of the same person

    Comparison  two evaluations on the same photos, with paired tests

`metrics.json` is `as_json(measured)`: its keys are the names of the fields. docs/evaluation.md explains them.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Final

# Of metrics.json; a reader of another number must not guess.
FORMAT: Final = 1


@dataclass(frozen=True)
class Figure:
    """A number that was measured, with the ends of its 95% interval.

    Attributes:
        value: None where there were too few trials for a number.
        low, high: ends of the interval; None where there is none.
        n: how many trials it is over: photos, searches or pairs.
        method: how the interval was made, or why there is no number: "bootstrap over 62 identities",
            "Wilson", "Student's t over 10 folds", "too few: ...".
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return self.value is not None


@dataclass(frozen=True)
class ModelFacts:
    """The model: its folder's name, how many labels, side of its input, numbers of an embedding.

    Attributes:
        architecture: of the network.
        trained_photos: how many photos it was trained on, by its card.
        trained_with: the device, by its card; None where that does not say.
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
    """The photos that it was measured on.

    Attributes:
        folder: as it was given.
        gallery: of --gallery, as it was given; None without.
        split: "the model's own split" (of its card), "seed 0, 30% held out", the name of a pairs file, ...
        seed: of the split and of every bootstrap.
        found: photos that the protocol uses.
        embedded: of them, those that could be read.
    """

    folder: str
    gallery: str | None
    split: str
    seed: int
    found: int
    embedded: int


@dataclass(frozen=True)
class Speed:
    """How fast photos were read, decoded and embedded in this very run, wall clock."""

    photos: int
    seconds: float
    photos_per_second: float
    device: str
    engine: str


@dataclass(frozen=True)
class LeftOut:
    """A photo that could not be used: a stable reason code, and words for a person."""

    path: str
    identity: str | None
    reason: str
    detail: str | None


@dataclass(frozen=True)
class Confusion:
    """How often photos of `actual` were taken for `said`."""

    actual: str
    said: str
    number: int


@dataclass(frozen=True)
class Ranking:
    """How well the right person comes out on top of a search.

    Attributes:
        closest: share of searches whose nearest photo shows the right person (closest-image agreement).
        cmc: at index k - 1 the share of searches with the right person among the k nearest people, k = 1..20.
        mean_average_precision: mean over searches of the average precision of the gallery's photos in order
            of distance; None where the gallery was only searched for its nearest.
    """

    closest: Figure
    cmc: tuple[Figure, ...]
    mean_average_precision: Figure | None


@dataclass(frozen=True)
class Bin:
    """Photos whose probability lay in (low, high]: how many, their mean probability, their accuracy."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Whether the classifier's probabilities mean what they say, on held-out photos.

    Attributes:
        error: expected calibration error over all of them, 15 bins of equal width.
        temperature: the scalar that minimises the loss on one half; None where there are too few photos.
        before, after: calibration error on the other half, without the temperature and with it.
        loss_before, loss_after: mean negative log-likelihood there, in nats: what temperature lowers.
        bins: the reliability diagram, over all of them.
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
    """The classifier on held-out photos of people whom it knows."""

    accuracy: Figure
    top5: Figure
    confusions: tuple[Confusion, ...]
    calibration: Calibration


@dataclass(frozen=True)
class Person:
    """A row of the table of identities.

    Attributes:
        enrolled, probes: photos of theirs that were searched in, and for.
        right: of the probes, those that the classifier named rightly; None for people whom it does not know.
        closest: of the probes, those whose nearest photo shows this person.
        taken_for: whom the nearest photo of the other probes shows most often; None where there are none.
    """

    identity: str
    enrolled: int
    probes: int
    right: int | None
    closest: int
    taken_for: str | None


@dataclass(frozen=True)
class Mistake:
    """A held-out photo that was taken for somebody else: the surest mistakes come first.

    Attributes:
        path: of the photo, relative to the data folder.
        identity: who it is.
        nearest_path: the photo that was nearest, relative to the data folder (as stored, in a --gallery).
        nearest_identity: who that is.
        distance: between the two.
        predicted, probability: what the classifier says; None where it was not asked.
        right_path, right_distance: the nearest photo of the right person; None where there is none, or (in a
            --gallery) that person is not among the nearest.
        stranger: whether nobody would have been right.
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
    """Another way to find the closest photo, on the very same split."""

    name: str
    says: str
    ranking: Ranking


@dataclass(frozen=True)
class Closed:
    """Held-out photos searched among enrolled ones of the same people.

    Attributes:
        enrolled, probes: photos.
        identities: people with enrolled photos.
        unanswerable: probes of people without a readable enrolled photo, who are in no figure.
        ranking: of the model's embeddings.
        classifier: None where it knows nobody of the probes.
        confusions: by the nearest photo.
        people: everybody with a probe, those with the most mistakes first.
        mistakes: by the nearest photo, at most 50.
        baselines: raw pixels, eigenfaces, and the network before fine-tuning where its weights were given.
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
    """What a share of false alarms costs in misses.

    Attributes:
        rate: FPIR of an identification, FAR of a verification: what is allowed.
        threshold: the largest distance with no more false alarms than that here; None where too few.
        missed: FNIR of an identification, 1 - TAR of a verification, at that distance. Its interval resamples
            identities on both sides, and finds the threshold anew each time.
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
    """What one way of measuring distances gives in an open set: points at FPIR 0.1, 0.01, 0.003, and DET."""

    points: tuple[OperatingPoint, ...]
    curve: Curve
    ranking: Ranking


@dataclass(frozen=True)
class OpenBaseline:
    """Another way to measure distances, on the very same searches."""

    name: str
    says: str
    identification: Identification


@dataclass(frozen=True)
class Open:
    """Searches of people who are enrolled and of strangers.

    Attributes:
        min_images: people with so many photos are enrolled; None with --gallery.
        enrolled: photos; identities: people.
        trained_identities: of them, people whom the model was trained on.
        mated, strangers: searches of people who are enrolled, and who are not.
        stranger_identities: people among the latter.
        trained_photos: photos that the model was trained on and that are not enrolled: not searched for.
        already_enrolled: photos with the very bytes of an enrolled one: they are not searched for.
        mistakes: searches whose nearest photo shows somebody else, the nearest first, at most 50.
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
    """Pairs told apart by a threshold on their distance.

    Attributes:
        accuracy: mean over folds, each with the threshold that is best on the others.
        standard_error: of that mean.
        folds, thresholds: accuracy of each fold, and its threshold.
        area: under the ROC curve; its interval resamples identities, of a pair of two people the first's.
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
    """Another way to measure distances, on the very same pairs."""

    name: str
    says: str
    verification: Verification


@dataclass(frozen=True)
class Pairs:
    """Pairs of photos: the same person or not.

    Attributes:
        same, different: pairs of either kind.
        left_out: pairs with a photo that could not be read.
        people: in the pairs.
        trained_people: of them, people whom the model was trained on: with those it is no fair test.
        verification: over all pairs.
        unseen: over the pairs without anybody whom the model was trained on; None where that is all of them.
        unseen_pairs: how many these are.
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
    """Everything that one evaluation measured; exactly one of `closed`, `open` and `pairs` is there.

    Attributes:
        protocol: "closed", "open" or "lfw-pairs".
        notes: what a reader must know, a sentence each: a baseline that is missing, photos seen in training.
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
    """One figure of two evaluations, on the photos (or pairs) that both of them have.

    Attributes:
        name: of the figure.
        a, b: its two values there.
        difference: b - a, its interval by resampling identities.
        only_a, only_b: photos that only one of them had right; None for what is not right or wrong.
        p: of McNemar's exact test on these two; None where there is no such test.
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
    """Two evaluations side by side.

    Attributes:
        a, b: what they are called.
        protocol: of both.
        common: photos (or pairs) of both.
        only_in_a, only_in_b: photos of one alone, which are in no figure here.
        notes: what a reader must know, a sentence each.
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
    """A dataclass of this module as dicts, lists and numbers; NaN and infinity are null."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {one.name: as_json(getattr(tree, one.name)) for one in dataclasses.fields(tree)}
    if isinstance(tree, dict):
        return {str(name): as_json(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [as_json(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
