"""The model card: what it states was measured, what was not it says, and it goes where its model goes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle, Relabel
from retrieval.rates import wilson
from tests.cli.test_app import Faceprint, faceprint
from training.fitting.recipes import FitConfig
from training.reports import model_card, templates
from training.run import TrainingOptions, train

__all__ = ["faceprint"]

FIGURES = {
    "validation_accuracy": 0.86,
    "closest_image_agreement": 0.92,
    "validation_images": 900,
    "left_out": 3,
}


def described(bundle: ModelBundle, **changes: Any) -> str:
    """The card's words, on one line."""
    return " ".join(model_card.describe(replace(bundle, **changes)).split())


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A narrow model after one epoch on drawn people."""
    options = TrainingOptions(
        weights="none", architecture="resnet14-narrow", preprocessing=Preprocessing(size=32, crop=1.0)
    )
    out = tmp_path_factory.mktemp("trained") / "drawn.model"
    return train(faces, out, config=FitConfig(epochs=1), options=options).bundle


def test_training_writes_a_card_into_the_model(trained: ModelBundle, faces: Path) -> None:
    text = trained.description_path.read_text("utf-8")
    words = " ".join(text.split())
    assert text == model_card.describe(trained)
    assert trained.fingerprint in words
    assert f"- Folder: `{faces.name}`." in words
    assert "24 photos to learn from and 12 photos held out (30% of each person's), of 6 people." in words
    assert "| epochs | 1 |" in words
    assert "None were used." in words
    # 12 held-out photos are no basis for a number.
    assert (
        "| validation accuracy of the classifier | too few photos for a number | 30 are needed | 12 |"
        in words
    )


def test_a_card_names_nobody_and_no_folder_of_the_machine(trained: ModelBundle, faces: Path) -> None:
    """So that it stays true when somebody is forgotten, and says nothing of who made it."""
    text = trained.description_path.read_text("utf-8")
    assert not [label for label in trained.labels if label in text]
    for folder in (faces.parent, trained.folder.parent, Path.home(), Path.cwd()):
        assert str(folder) not in text


def test_figures_have_wilsons_interval(bundle: ModelBundle) -> None:
    words = described(bundle, figures=FIGURES)
    rate = wilson(774, 900)
    ends = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
    assert f"| validation accuracy of the classifier | 86.0 % | {ends} | 900 |" in words
    assert "| closest image shows the same person | 92.0 % |" in words


@pytest.mark.parametrize("figures", [{}, {"validation_accuracy": 0.5}, {"validation_images": 900}])
def test_what_was_not_measured_is_not_stated(bundle: ModelBundle, figures: dict[str, Any]) -> None:
    words = described(bundle, figures=figures)
    assert "Nothing that this card could state with an interval." in words
    assert "50.0 %" not in words
    assert "**Differences between groups of people**: by age, sex, skin tone" in words


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("imagenet", "ResNet50_Weights.IMAGENET1K_V2` of torchvision."),
        ("none", "None were used."),
        (
            "mine.pt",
            "The file `mine.pt` was given by whoever trained the model. Faceprint does not know its licence",
        ),
        (None, "Not known: the bundle does not say what the training started from."),
    ],
)
def test_the_initial_weights_have_the_licence_that_is_known(
    bundle: ModelBundle, weights: str | None, words: str
) -> None:
    recipe = {} if weights is None else {"weights": weights}
    assert words in described(bundle, recipe=recipe)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("photos | <b>", "`photos | <b>`"),
        ("a`b", "``a`b``"),
        ("two\nlines", "`two\ufffdlines`"),
        ("`all`", "`` `all` ``"),
        ("half\udcff", "`half\ufffd`"),
    ],
)
def test_a_folder_of_any_name_is_one_piece_of_code(bundle: ModelBundle, name: str, shown: str) -> None:
    assert f"- Folder: {shown}." in described(bundle, split={"data": name, "train": ["x/1.jpg"]})


def test_a_bar_in_a_recipe_does_not_end_a_cell(bundle: ModelBundle) -> None:
    assert "| note | a/b |" in described(bundle, recipe={"note": "a|b"})


def test_headings_that_are_linked_to_exist(trained: ModelBundle) -> None:
    text = trained.description_path.read_text("utf-8")
    headings = {
        line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")
    }
    linked = re.findall(r"\]\(#([^)]+)\)", text)
    assert linked == ["consent-and-law"]
    assert set(linked) <= headings
    assert "docs/privacy.md" in text
    assert text.endswith("\n")


def test_a_copy_has_the_card_and_an_edited_one_stays(trained: ModelBundle, tmp_path: Path) -> None:
    """The owner fills in what faceprint cannot know; that is no damage."""
    copy = trained.save(tmp_path / "copy")
    copy.description_path.write_text("# Ours\n")
    copy.verify()
    assert copy.save(tmp_path / "again").description_path.read_text() == "# Ours\n"


def test_a_model_without_a_card_is_whole(trained: ModelBundle, tmp_path: Path) -> None:
    copy = trained.save(tmp_path / "copy")
    copy.description_path.unlink()
    ModelBundle.load(copy.folder).verify()
    assert not copy.save(tmp_path / "again").description_path.exists()


def test_a_gallery_and_its_backup_carry_the_card(trained: ModelBundle, faces: Path, tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", trained) as gallery:
        assert (gallery.folder / "model" / "MODELCARD.md").is_file()
        gallery.backup(tmp_path / "b")
        gallery.backup(tmp_path / "b")
    assert not verify(tmp_path / "g").findings
    assert len(list((tmp_path / "b").glob("models/*/MODELCARD.md"))) == 1


def test_a_card_is_the_same_when_somebody_is_forgotten(trained: ModelBundle) -> None:
    forgotten = trained.relabelled({0: Relabel(None, keep_photos=False)})
    assert forgotten.split["data"] == trained.split["data"]
    before, after = (model_card.describe(one) for one in (trained, replace(forgotten, split=trained.split)))
    assert before == after


def test_faceprint_model_names_the_card(faceprint: Faceprint, trained: ModelBundle) -> None:
    status, out, _ = faceprint("model", trained.folder)
    assert status == 0
    assert "MODELCARD.md" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50", "ResNet50"),
        ("resnet50-cosine", "ResNet50 with a classifier of cosines"),
        ("resnet14-narrow", "resnet14-narrow"),
        ("resnet50-caffe", "ResNet50 in Caffe's form (stride in the first convolution of a block)"),
        (
            "resnet50-caffe-cosine",
            "ResNet50 in Caffe's form (stride in the first convolution of a block) with a classifier of "
            "cosines",
        ),
    ],
)
def test_architectures_are_called_as_people_call_them(name: str, said: str) -> None:
    assert templates.architecture(name) == said
