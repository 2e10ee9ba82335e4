"""The report says the figures, shows the photos and trusts no name."""

import json
import math
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import StorageError
from training.data.dataset import Sample, Split
from training.fitting.fit import Epoch, History
from training.fitting.validation import Evaluation
from training.reports.training_report import write_report

# Names that a folder may have and that mean something in HTML.
LABELS = ("<b>Bold & Sons", "<script>", '"quoted"', "Zoë")
HISTORY = History(
    epochs=(
        Epoch(1, loss=1.2345, accuracy=0.25, validation_loss=1.1, validation_accuracy=0.125, seconds=59.4),
        Epoch(2, loss=0.5678, accuracy=0.625, validation_loss=0.9, validation_accuracy=0.5, seconds=61.0),
    ),
    losses=(1.5, 0.969, 0.7, 0.4356),
    accuracies=(0.25, 0.25, 0.5, 0.75),
)
FIGURES: dict[str, Any] = {
    "device": "abacus <fast>",
    "images": 1234,
    "classes": 4,
    "train_images": 1030,
    "validation_images": 204,
    "left_out": 3,
    "validation_accuracy": 0.5,
    "closest_image_agreement": 0.75,
    "epochs": [asdict(epoch) for epoch in HISTORY.epochs],
    "seconds": 3725.0,
}
RECIPE = {"learning_rate": 0.01, "weights": "<none>", "started_fresh": ["layer4", "fc"]}


class _Text(HTMLParser):
    """What a browser makes of a page: its tags in order, and its words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.words += " "

    def handle_endtag(self, tag: str) -> None:
        self.words += " "

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Two photos to learn from and one held out of each, all plain colours."""
    folder = tmp_path_factory.mktemp("people")
    samples: list[Sample] = []
    for label, name in enumerate(LABELS):
        (folder / name).mkdir()
        for number in range(3):
            path = folder / name / f"{number}.png"
            Image.new("RGB", (40, 40), (60 * label, 80 * number, 99)).save(path)
            samples.append(Sample(path, label))
    train = tuple(sample for sample in samples if sample.path.stem != "2")
    return Split(LABELS, train, tuple(sample for sample in samples if sample.path.stem == "2"), ())


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """The first two are taken for each other."""
    closest = np.array([[0, 1], [0, 2], [4, 5], [6, 7]])
    return Evaluation(
        validation_accuracy=0.5,
        closest_image_agreement=0.75,
        predicted=np.array([1, 0, 2, 3]),
        probability=np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        actual=np.array([0, 1, 2, 3]),
        closest=closest,
        distances=np.array([[0.5, 1.5]] * 4),
    )


def written(folder: Path, split: Split, evaluation: Evaluation, **changes: Any) -> str:
    parts = {"history": HISTORY, "figures": FIGURES, "recipe": RECIPE} | changes
    write_report(folder, split=split, evaluation=evaluation, **parts)
    return (folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def html(split: Split, evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report"), split, evaluation)


def test_names_are_text_and_never_tags(html: str) -> None:
    page = _Text(html)
    assert {"script", "none", "fast"}.isdisjoint(page.tags)
    assert page.tags.count("b") == 4  # the tiles' own
    assert "<b>Bold & Sons <script> 1 <script> <b>Bold & Sons 1" in page.words
    assert "on abacus <fast> with" in page.words
    assert "weights <none>" in page.words
    assert "<script" not in html.lower()


@pytest.mark.parametrize(
    "words",
    [
        "trained on abacus <fast> with 1,234 images of 4 classes, 1,030 to learn from and 204 held out.",
        "The validation accuracy is 50.0 % .",
        "For 75.0 % of the held-out images the closest training image",
        "62 min 05 s from photos to figures",
        "1 1.234 25.0 % 1.100 12.5 % 59 s",
        "2 0.568 62.5 % 0.900 50.0 % 1 min 01 s",
        "2 of 204 held-out images were given another name.",
        "learning rate 0.01",
        "started fresh layer4, fc",
        "images left out 3 (",
    ],
)
def test_the_report_says_the_figures(html: str, words: str) -> None:
    assert words in _Text(html).words


def test_without_mistakes_the_report_says_none(split: Split, evaluation: Evaluation, tmp_path: Path) -> None:
    html = written(tmp_path, split, replace(evaluation, predicted=evaluation.actual))
    assert "None: every held-out image was given its own name." in html
    assert "Was called" not in html


def test_of_many_confusions_the_fifteen_most_frequent_are_shown(split: Split, tmp_path: Path) -> None:
    """Twenty people, all taken for the first; those who come last are the most often wrong."""
    labels = tuple(f"person {number:02d}" for number in range(20))
    many = replace(
        split,
        labels=labels,
        validation=tuple(
            Sample(split.validation[0].path, label) for label in range(20) for _ in range(label)
        ),
    )
    actual = np.array([sample.label for sample in many.validation])
    evaluation = Evaluation(
        validation_accuracy=0.0,
        closest_image_agreement=0.0,
        predicted=np.zeros_like(actual),
        probability=np.full(len(actual), 0.5, np.float32),
        actual=actual,
        closest=np.zeros((len(actual), 1), np.int64),
        distances=np.ones((len(actual), 1)),
    )
    words = _Text(written(tmp_path, many, evaluation)).words
    assert "Images person 19 person 00 19 person 18 person 00 18" in words
    assert "person 05 person 00 5 Recipe" in words


def test_metrics_json_holds_the_figures_as_they_are(
    split: Split, evaluation: Evaluation, tmp_path: Path
) -> None:
    written(tmp_path, split, evaluation)
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8")) == FIGURES


def test_a_run_of_a_single_step_has_a_report_too(
    split: Split, evaluation: Evaluation, tmp_path: Path
) -> None:
    history = History(HISTORY.epochs[:1], (math.log(4),), (0.25,))
    figures = {**FIGURES, "epochs": FIGURES["epochs"][:1]}
    html = written(tmp_path, split, evaluation, history=history, figures=figures)
    assert _Text(html).tags.count("img") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "closest_photos.png",
        "loss_and_error.png",
        "metrics.json",
        "report.html",
        "training_progress.png",
    ]


def test_the_same_run_draws_the_same_pictures(
    split: Split, evaluation: Evaluation, tmp_path: Path, html: str
) -> None:
    assert written(tmp_path, split, evaluation) == html


def test_a_report_that_cannot_be_written_is_a_storage_error(
    split: Split, evaluation: Evaluation, tmp_path: Path
) -> None:
    with pytest.raises(StorageError) as caught:
        written(tmp_path / "gone", split, evaluation)
    assert str(caught.value) == (
        f"The report cannot be written to {tmp_path / 'gone'}: no such file or directory."
    )
