"""The steps of the command `demo`: draws faces, trains, enrolls and searches in one folder, offline."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from retrieval.embedding.outcome import Status
from retrieval.errors import InputError, Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.images.panel import PanelRow, Tile, panel
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.search.nearest import SearchResult
from retrieval.system.files import make_output_folder, remove, write_durably

if TYPE_CHECKING:
    from training.run import TrainingResult

_MARK: Final = "faceprint-demo.json"
# Sizes that two cores train from random weights in about two minutes, and a learning rate at which a ResNet50
# with random weights converges.
_IDENTITIES: Final = 8
_PHOTOS: Final = 60
_SIZE: Final = 64
_EPOCHS: Final = 10
_LEARNING_RATE: Final = 0.003
_PROBES: Final = 5


def run(data: Path | None, out: Path) -> None:
    """Makes everything below `out`: photos (when drawn), a model with its report, a gallery, a picture.

    Raises:
        InputError: `out` has other contents than an earlier demo, or `data` is not usable.
    """
    console = Console(highlight=False, soft_wrap=True)
    if data is not None and not data.is_dir():
        raise InputError(f"There is no folder {data}; give one with a subfolder of photos per identity.")
    if data is not None and data.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{data} lies in {out}, which the demo makes anew; choose another --out.")
    _clear(out)
    if data is None:
        from training.synthetic_faces import draw_faces

        data = draw_faces(out / "photos", identities=_IDENTITIES, photos=_PHOTOS)
        console.print(
            f"Drew {_IDENTITIES * _PHOTOS} photos of {_IDENTITIES} people who do not exist. "
            "[b]These faces are drawn by a program:[/b] the figures below show how it works, "
            "not how good it is on real photographs."
        )
    result = _train(data, out / "model")
    gallery = _enroll(result, out / "gallery", console)
    with gallery:
        _search(result, gallery, out / "search.png", console)
    console.print(Text(f"Open {out / 'model' / 'report.html'} and {out / 'search.png'}. Ask it yourself:"))
    console.print(Text(f"  faceprint search {out / 'gallery'} IMAGE --plot answer.png"))


def _clear(out: Path) -> None:
    """Makes an empty folder with the demo's mark; replaces an earlier demo, and refuses other contents."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise InputError(
                f"{out} is not empty and holds no earlier demo; choose another folder with --out."
            )
        for name in ("photos", "model", "gallery"):
            remove(out / name)
        (out / "search.png").unlink(missing_ok=True)
    make_output_folder(out)
    write_durably(out / _MARK, (json.dumps({"made_by": "faceprint demo"}) + "\n").encode())


def _train(data: Path, out: Path) -> "TrainingResult":
    """Trains from random weights, since others need a download; hence more epochs at a lower rate."""
    from training.commands.train import train
    from training.fitting.recipes import FitConfig
    from training.run import TrainingOptions

    options = TrainingOptions(
        weights="none", min_images=2, preprocessing=Preprocessing(size=_SIZE, crop=1.0, colour="srgb")
    )
    config = FitConfig(epochs=_EPOCHS, learning_rate=_LEARNING_RATE)
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


def _search(result: "TrainingResult", gallery: Gallery, picture: Path, console: Console) -> None:
    """Searches for a few held-out photos; prints and draws the answers."""
    split = result.split
    step = max(1, len(split.validation) // _PROBES)
    chosen = split.validation[::step][:_PROBES]
    rows = []
    for sample, answer in zip(chosen, gallery.search_many([s.path for s in chosen]), strict=True):
        truth = split.labels[sample.label]
        console.print(Text(_sentence(truth, answer)))
        caption = f"classifier: {_predicted(answer)}"
        matches = [
            Tile(
                m.face.path or b"",
                m.face.identity or "",
                f"distance {m.distance:.2f}",
                m.face.identity == truth,
            )
            for m in answer.matches
        ]
        rows.append(PanelRow(Tile(sample.path, truth, caption), matches))
    drawn = io.BytesIO()
    panel(rows, heading="Held-out photos and the closest photos in the gallery").save(drawn, format="PNG")
    write_durably(picture, drawn.getvalue())


def _sentence(truth: str, answer: SearchResult) -> str:
    nearest = answer.matches[0]
    return (
        f"  a held-out photo of {truth}: closest is {nearest.face.identity} at {nearest.distance:.2f}, "
        f"classifier says {_predicted(answer)}"
    )


def _predicted(answer: SearchResult) -> str:
    prediction = answer.prediction
    return "nothing" if prediction is None else f"{prediction.identity} ({prediction.probability:.0%})"
