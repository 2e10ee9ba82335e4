"""The steps of `demo`, offline and in one folder: draws faces, trains, enrolls, calibrates and searches."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrieval.bulk.calibrate import calibrate
from retrieval.console import terminal
from retrieval.embedding.outcome import Status
from retrieval.errors import InputError, Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.images.panel import PanelRow, Tile, panel
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.search.nearest import SearchResult
from retrieval.system.files import make_output_folder, remove, write_durably

if TYPE_CHECKING:
    from training.run import TrainingResult

_MARK: Final = "faceprint-demo.json"
# Drawn at the end, and removed first.
_PICTURE: Final = "search.png"
_UNKNOWN: Final = "UNKNOWN"
DEFAULT_OUT: Final = Path("demo")
# Numbers of people's and of strangers' photos in the printed table, and in the picture.
_PRINTED: Final = (5, 3)
_PICTURED: Final = (3, 2)


@dataclass(frozen=True)
class Plan:
    """The numbers of a demo. With the defaults, two cores take under three minutes.

    Attributes:
        identities, photos: the number of drawn people to learn and enroll, and of photos of each.
        strangers, stranger_photos: the same for the drawn people who set the threshold; they are not enrolled.
        visitors: the number of other drawn people who are not enrolled, with one photo each; they test the
            threshold.
        fpir: the share of strangers' searches that may name somebody.
        seed: of the drawn faces, the split and the training.
        size, crop: side of the network's input in pixels, and the share of a photo that it shows.
        epochs, batch_size, learning_rate: of the training. Random weights bear a higher rate than trained ones.
        architecture: a key of `models.network.ARCHITECTURES`.
        embedding: how activations become an embedding.
    """

    identities: int = 20
    photos: int = 32
    strangers: int = 40
    stranger_photos: int = 4
    visitors: int = 20
    fpir: float = 0.1
    seed: int = 0
    size: int = 48
    crop: float = 0.85
    epochs: int = 12
    batch_size: int = 16
    learning_rate: float = 0.1
    architecture: str = "resnet50"
    embedding: Embedding = field(default=Embedding(length="unit"))


@dataclass(frozen=True)
class _Probe:
    """A photo to search for; `person` is None for a person who is not enrolled."""

    path: Path
    person: str | None


@dataclass(frozen=True)
class _Answered:
    """A probe with the answer to it."""

    probe: _Probe
    result: SearchResult

    @property
    def answer(self) -> str:
        """The decision of a calibrated gallery, otherwise the identity of the closest photo."""
        decision = self.result.decision
        if decision is None:
            return self.result.matches[0].face.identity or ""
        return decision.identity or _UNKNOWN

    @property
    def right(self) -> bool:
        return self.answer == (self.probe.person or _UNKNOWN)


@dataclass(frozen=True)
class Figures:
    """The figures that a demo measured.

    Attributes:
        validation_accuracy, closest_image_agreement: as in `training.fitting.validation.Evaluation`.
        named, misnamed, unknown: the numbers of held-out photos whose answer is the right identity, another
            one, and UNKNOWN.
        strangers_unknown, strangers_named: the numbers of visitors' photos with each answer.
    """

    validation_accuracy: float
    closest_image_agreement: float
    named: int
    misnamed: int
    unknown: int
    strangers_unknown: int
    strangers_named: int


def run(data: Path | None, out: Path, plan: Plan = Plan()) -> Figures:
    """Makes everything below `out`: photos (when drawn), a model with its report, a gallery, a picture.

    Returns:
        The figures that it measured and printed.

    Raises:
        InputError: `out` has other contents than an earlier demo, or `data` is not usable.
    """
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    if data is not None and not data.is_dir():
        raise InputError(f"There is no folder {data}; give one with a subfolder of photos per identity.")
    if data is not None and data.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{data} lies in {out}, which the demo makes anew; choose another --out.")
    _clear(out)
    visitors: list[_Probe] = []
    drawn = data is None
    if data is None:
        data = out / "photos"
        visitors = _draw(out, plan, console)
    result = _train(data, out / "model", plan)
    with _enroll(result, out / "gallery", console) as gallery:
        if drawn:
            _calibrate(gallery, out / "strangers", plan, console)
        labels = result.split.labels
        held_out = [_Probe(sample.path, labels[sample.label]) for sample in result.split.validation]
        people, strangers = _search(gallery, held_out), _search(gallery, visitors)
    _print_answers(_some(people, strangers, _PRINTED), console)
    figures = _figures(result, people, strangers)
    _print_figures(figures, console)
    _draw_answers(_some(people, strangers, _PICTURED), out / _PICTURE)
    console.print(Text(f"Open {out / 'model' / 'report.html'} and {out / _PICTURE}. Ask it yourself:"))
    console.print(Text(f"  faceprint search {out / 'gallery'} IMAGE --plot answer.png"))
    there = "" if out == DEFAULT_OUT else f" --out {out}"
    console.print(Text(f"Or in a browser:\n  faceprint demo --serve{there}"))
    return figures


def is_complete(out: Path) -> bool:
    """Returns whether a folder has a demo that came to its end."""
    return (out / _MARK).is_file() and (out / _PICTURE).is_file()


def _clear(out: Path) -> None:
    """Makes an empty folder with the demo's mark; replaces an earlier demo, and refuses other contents."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise InputError(
                f"{out} is not empty and holds no earlier demo; choose another folder with --out."
            )
        (out / _PICTURE).unlink(missing_ok=True)
        for name in ("photos", "strangers", "visitors", "model", "gallery"):
            remove(out / name)
    make_output_folder(out)
    write_durably(out / _MARK, (json.dumps({"made_by": "faceprint demo"}) + "\n").encode())


def _draw(out: Path, plan: Plan, console: Console) -> list[_Probe]:
    """Draws three sets of people who have no person in common; returns the photos of the last set."""
    from training.synthetic_faces import draw_faces

    draw_faces(out / "photos", identities=plan.identities, photos=plan.photos, seed=plan.seed)
    draw_faces(
        out / "strangers",
        identities=plan.strangers,
        photos=plan.stranger_photos,
        seed=plan.seed,
        first=plan.identities,
    )
    visitors = draw_faces(
        out / "visitors",
        identities=plan.visitors,
        photos=1,
        seed=plan.seed,
        first=plan.identities + plan.strangers,
    )
    strange = plan.strangers * plan.stranger_photos + plan.visitors
    console.print(
        f"Drew {plan.identities * plan.photos:,} photos of {plan.identities} people, and {strange:,} of "
        f"{plan.strangers + plan.visitors} strangers. None of them exists. [b]A program draws these faces:[/b] "
        "the figures below show how it works, not how good it is on real photographs."
    )
    return [_Probe(path, None) for path in sorted(visitors.glob("*/*.jpg"))]


def _train(data: Path, out: Path, plan: Plan) -> "TrainingResult":
    """Trains from random weights, since others need a download."""
    from training.commands.train import RECIPES, train
    from training.run import TrainingOptions

    options = TrainingOptions(
        weights="none",
        min_images=2,
        preprocessing=Preprocessing(size=plan.size, crop=plan.crop, colour="srgb"),
        architecture=plan.architecture,
        embedding=plan.embedding,
    )
    config = replace(
        RECIPES["modern"].config,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        seed=plan.seed,
    )
    try:
        return train(data, out, config=config, options=options)
    except Interrupted as error:
        raise Interrupted("Stopped; the next demo begins anew.") from error


def _enroll(result: "TrainingResult", folder: Path, console: Console) -> Gallery:
    """Returns a gallery of the training photos alone, so that the held-out photos are valid probes."""
    gallery = Gallery.create(folder, ModelBundle.load(result.bundle.folder))
    split = result.split
    outcomes = gallery.enroll((sample.path, split.labels[sample.label]) for sample in split.train)
    enrolled = sum(outcome.status is Status.ENROLLED for outcome in outcomes)
    console.print(Text(f"enrolled {enrolled:,} of the {len(split.train):,} training photos in {folder}"))
    return gallery


def _calibrate(gallery: Gallery, strangers: Path, plan: Plan, console: Console) -> None:
    """Sets the distance beyond which answers are UNKNOWN; the held-out photos and visitors have no part in it."""
    found = calibrate(gallery, plan.fpir, strangers=[strangers]).calibration
    point = found.point()
    assert point is not None
    console.print(
        Text(
            f"calibrated with {found.searches:,} photos of {found.people:,} strangers: a closest photo farther "
            f"than {point.threshold:.3f} means {_UNKNOWN}"
        )
    )


def _search(gallery: Gallery, probes: Sequence[_Probe]) -> list[_Answered]:
    found = gallery.search_many([probe.path for probe in probes])
    return [_Answered(probe, result) for probe, result in zip(probes, found, strict=True)]


def _some(
    people: Sequence[_Answered], strangers: Sequence[_Answered], numbers: tuple[int, int]
) -> list[_Answered]:
    """Returns so many answers of each kind, at equal steps, whether they are right or wrong."""
    return [
        one
        for answers, number in zip((people, strangers), numbers, strict=True)
        for one in answers[:: max(1, len(answers) // number)][:number]
    ]


def _print_answers(answers: Sequence[_Answered], console: Console) -> None:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("a new photo of", "answer", "", "closest photo", "distance", "classifier"):
        table.add_column(heading, justify="right" if heading == "distance" else "left", no_wrap=True)
    for one in answers:
        closest, prediction = one.result.matches[0], one.result.prediction
        assert prediction is not None  # the demo's model has a classifier
        table.add_row(
            terminal.text(one.probe.person or "a stranger"),
            terminal.text(one.answer, "bold"),
            Text("right", "green") if one.right else Text("wrong", "red"),
            terminal.text(closest.face.identity or "", ""),
            f"{closest.distance:.3f}",
            terminal.text(f"{prediction.identity} ({prediction.probability:.0%})"),
        )
    console.print(table, soft_wrap=False)


def _figures(
    result: "TrainingResult", people: Sequence[_Answered], strangers: Sequence[_Answered]
) -> Figures:
    named = sum(one.right for one in people)
    unknown = sum(one.answer == _UNKNOWN for one in people)
    strangers_unknown = sum(one.right for one in strangers)
    return Figures(
        validation_accuracy=result.evaluation.validation_accuracy,
        closest_image_agreement=result.evaluation.closest_image_agreement,
        named=named,
        misnamed=len(people) - named - unknown,
        unknown=unknown,
        strangers_unknown=strangers_unknown,
        strangers_named=len(strangers) - strangers_unknown,
    )


def _print_figures(figures: Figures, console: Console) -> None:
    """Prints the answers to all photos, of which the table has a few."""
    photos = figures.named + figures.misnamed + figures.unknown
    said = f"{photos:,} held-out photos: [b]{figures.named:,} named rightly[/b], {figures.misnamed:,} wrongly"
    if strangers := figures.strangers_unknown + figures.strangers_named:
        said += (
            f", {figures.unknown:,} {_UNKNOWN}\n"
            f"{strangers:,} photos of as many strangers, none seen before: "
            f"[b]{figures.strangers_unknown:,} {_UNKNOWN}[/b], {figures.strangers_named:,} given a name"
        )
    console.print(said)


def _draw_answers(answers: Sequence[_Answered], picture: Path) -> None:
    rows = []
    for one in answers:
        person = one.probe.person
        matches = [
            Tile(
                match.face.path or b"",
                match.face.identity or "",
                f"distance {match.distance:.2f}",
                None if person is None else match.face.identity == person,
            )
            for match in one.result.matches
        ]
        query = Tile(one.probe.path, person or "a stranger", f"answer: {one.answer}", one.right)
        rows.append(PanelRow(query, matches))
    drawn = io.BytesIO()
    panel(rows, heading="New photos and the closest photos in the gallery").save(drawn, format="PNG")
    write_durably(picture, drawn.getvalue())
