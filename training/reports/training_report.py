"""The report of a training run: figures (PNG), `metrics.json` and `report.html`."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retrieval.errors import StorageError
from retrieval.images import panel
from retrieval.pages import html
from retrieval.system.files import why, write_durably
from training.data.dataset import Split
from training.fitting.fit import History
from training.fitting.validation import Evaluation
from training.reports import templates

# Rows of the panel of held-out photos. The paper's figure 5 shows a handful.
_PANEL_ROWS: Final = 6
_CONFUSIONS_SHOWN: Final = 15
_BLUE: Final = "#2b6cb0"
_ORANGE: Final = "#c05621"


def write_report(
    folder: Path,
    *,
    split: Split,
    history: History,
    evaluation: Evaluation,
    figures: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> None:
    """Writes metrics.json, three PNGs and report.html into `folder`.

    Raises:
        StorageError: the folder cannot be written.
    """
    pictures = {
        "training_progress.png": _png(_progress(history)),
        "loss_and_error.png": _png(_loss_and_error(history)),
        "closest_photos.png": _panel(split, evaluation),
    }
    page = templates.page(
        "report.html.jinja",
        figures=figures,
        recipe=recipe,
        confusions=_confusions(split, evaluation),
        wrong=int((evaluation.predicted != evaluation.actual).sum()),
        pictures={name.removesuffix(".png"): html.png_url(data) for name, data in pictures.items()},
    )
    files = {
        **pictures,
        "metrics.json": (json.dumps(dict(figures), ensure_ascii=False, indent=1) + "\n").encode(),
        "report.html": page,
    }
    try:
        for name, data in files.items():
            write_durably(folder / name, data)
    except OSError as error:
        raise StorageError(f"The report cannot be written to {folder}: {why(error)}.") from error


def _confusions(split: Split, evaluation: Evaluation) -> list[tuple[str, str, int]]:
    named = [
        (split.labels[actual], split.labels[predicted], number)
        for actual, predicted, number in evaluation.confusions()
    ]
    return named[:_CONFUSIONS_SHOWN]


def _axes(rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.5, 3.4 * rows), dpi=150, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, 1, sharex=True))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _epoch_axis(history: History) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns the positions of each step and of each epoch's end, on an axis in epochs."""
    per_epoch = len(history.losses) / len(history.epochs)
    steps = (np.arange(len(history.losses)) + 1) / per_epoch
    return steps, np.array([epoch.epoch for epoch in history.epochs])


def _smooth(values: list[float]) -> np.ndarray[Any, Any]:
    """Returns a running mean over about 1/20 of the run, because batches of ten photos are noisy."""
    window = max(1, len(values) // 20)
    padded = np.concatenate([np.full(window - 1, values[0]), np.asarray(values)])
    return np.convolve(padded, np.full(window, 1 / window), mode="valid")


def _progress(history: History) -> Figure:
    """Draws the paper's figure 3: accuracy and loss of training steps, and validation after each epoch."""
    figure, (accuracy, loss) = _axes(2)
    steps, epochs = _epoch_axis(history)
    percent = [100 * value for value in history.accuracies]
    held_out = [100 * epoch.validation_accuracy for epoch in history.epochs]
    _course(accuracy, steps, percent, epochs, held_out)
    _course(loss, steps, list(history.losses), epochs, [epoch.validation_loss for epoch in history.epochs])
    accuracy.set_ylabel("Accuracy (%)")
    loss.set_ylabel("Loss")
    accuracy.set_ylim(0, 102)
    loss.set_ylim(bottom=0)
    accuracy.legend(loc="lower right", frameon=False)
    loss.set_xlabel("Epoch")
    return figure


def _course(axis: Axes, steps: Any, training: list[float], epochs: Any, validation: list[float]) -> None:
    axis.plot(steps, training, color=_BLUE, alpha=0.18, linewidth=0.7)
    axis.plot(steps, _smooth(training), color=_BLUE, label="training (smoothed)")
    axis.plot(epochs, validation, "o--", color=_ORANGE, label="validation")


def _loss_and_error(history: History) -> Figure:
    """Draws the paper's figure 4: loss and error of each epoch."""
    figure, (loss, error) = _axes(2)
    epochs = [epoch.epoch for epoch in history.epochs]
    loss.plot(epochs, [e.loss for e in history.epochs], "o-", color=_BLUE, label="training")
    loss.plot(epochs, [e.validation_loss for e in history.epochs], "o--", color=_ORANGE, label="validation")
    error.plot(epochs, [100 * (1 - e.accuracy) for e in history.epochs], "o-", color=_BLUE)
    error.plot(epochs, [100 * (1 - e.validation_accuracy) for e in history.epochs], "o--", color=_ORANGE)
    loss.set_ylabel("Loss")
    error.set_ylabel("Error (%)")
    error.set_xlabel("Epoch")
    error.set_xticks(epochs)
    loss.set_ylim(bottom=0)
    error.set_ylim(bottom=0)
    loss.legend(frameon=False)
    return figure


def _panel(split: Split, evaluation: Evaluation) -> bytes:
    """Draws the paper's figure 5: evenly spaced held-out photos, each with its closest training photos."""
    chosen = np.unique(np.linspace(0, len(split.validation) - 1, _PANEL_ROWS).round().astype(int))
    rows = [_panel_row(split, evaluation, int(index)) for index in chosen]
    return _bytes(panel.panel(rows, heading="Held-out photos and their closest training photos"))


def _panel_row(split: Split, evaluation: Evaluation, index: int) -> panel.PanelRow:
    sample = split.validation[index]
    matches = [
        panel.Tile(
            split.train[row].path,
            split.labels[split.train[row].label],
            f"distance {distance:.2f}",
            agrees=split.train[row].label == sample.label,
        )
        for row, distance in zip(evaluation.closest[index], evaluation.distances[index], strict=True)
    ]
    predicted = split.labels[evaluation.predicted[index]]
    note = f"classifier: {evaluation.probability[index]:.0%} {predicted}"
    return panel.PanelRow(panel.Tile(sample.path, split.labels[sample.label], note), matches)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bytes(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
