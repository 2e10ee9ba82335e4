"""Measuring a small real model on drawn people: each protocol against figures counted one photo at a time."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from retrieval import rates
from retrieval.bulk.ingest import ingest_photos
from retrieval.errors import DataError, InputError, Interrupted, ModelMismatch
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network
from retrieval.sources.holdout import held_out
from retrieval.sources.photos import of
from training.evaluation import comparison, measure, protocols, result_files
from training.evaluation.initial_network import before_fine_tuning
from training.evaluation.measure import EvaluationOptions
from training.evaluation.measurements import Figure, Measured
from training.evaluation.observe import Watch, grey
from training.evaluation.searches import Rows
from training.synthetic_faces import draw_face, name_of

Evaluated = tuple[Measured, Rows]

# People of the model, others with as many photos as are enrolled, and strangers with one.
KNOWN, OTHERS, STRANGERS = 6, 6, 40
PHOTOS = {**dict.fromkeys(range(KNOWN), 20), **dict.fromkeys(range(KNOWN, KNOWN + OTHERS), 10)}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crowd")
    for identity in range(KNOWN + OTHERS + STRANGERS):
        name = name_of(identity)
        (folder / name).mkdir()
        for photo in range(PHOTOS.get(identity, 1)):
            picture = draw_face(identity, photo, size=48, seed=0)
            picture.save(folder / name / f"{name}_{photo + 1:04d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def model(bundle: ModelBundle, crowd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow model, whose card says that it was trained on 14 photos each of 6 people of the crowd."""
    folder = tmp_path_factory.mktemp("measured") / "narrow.model"
    shutil.copytree(bundle.folder, folder)
    card = json.loads((folder / "bundle.json").read_text())
    card["split"] = {"train": [], "validation": []}
    for label in card["labels"]:
        names = sorted(path.relative_to(crowd).as_posix() for path in (crowd / label).iterdir())
        chosen = held_out(label, len(names), 0.3, 0)
        for index, name in enumerate(names):
            card["split"]["validation" if index in chosen else "train"].append(name)
    (folder / "bundle.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def closed(model: Path, crowd: Path) -> Evaluated:
    return measure.measure(model, crowd)


@pytest.fixture(scope="module")
def opened(model: Path, crowd: Path) -> Evaluated:
    return measure.measure(model, crowd, options=EvaluationOptions(protocol="open"))


def embedded(model: Path, names: list[str], crowd: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Embeddings and probabilities of photos, one at a time."""
    with Embedder.open(ModelBundle.load(model)) as embedder:
        seen = [embedder.embed(pixels.read(crowd / name, size=32)[None]) for name in names]
    return (
        np.concatenate([one.vectors for one in seen]).astype(float),
        np.concatenate([one.probabilities for one in seen]).astype(float),
    )


def split(model: Path) -> tuple[list[str], list[str]]:
    card = ModelBundle.load(model).split
    return list(card["train"]), list(card["validation"])


def nearest(probes: NDArray[np.float64], gallery: NDArray[np.float64]) -> list[int]:
    return [int(np.argmin(np.linalg.norm(gallery - probe, axis=1))) for probe in probes]


def person(name: str) -> str:
    return name.split("/")[0]


def test_the_closed_set_is_the_models_own_split(closed: Evaluated, model: Path) -> None:
    measured, rows = closed
    train, validation = split(model)
    assert measured.closed is not None
    assert (measured.closed.enrolled, measured.closed.probes) == (len(train), len(validation)) == (84, 36)
    assert [row["path"] for row in rows] == validation
    assert measured.data.split == "the model's own split"


def test_closest_image_and_classifier_are_what_one_photo_at_a_time_gives(
    closed: Evaluated, model: Path, crowd: Path
) -> None:
    measured, _ = closed
    train, validation = split(model)
    stored, _ = embedded(model, train, crowd)
    vectors, probabilities = embedded(model, validation, crowd)
    labels = ModelBundle.load(model).labels
    agreeing = [
        person(train[row]) == person(name)
        for row, name in zip(nearest(vectors, stored), validation, strict=True)
    ]
    right = [
        labels[row.argmax()] == person(name) for row, name in zip(probabilities, validation, strict=True)
    ]
    among = [
        person(name) in {labels[index] for index in np.argsort(-row)[:5]}
        for row, name in zip(probabilities, validation, strict=True)
    ]
    found = measured.closed
    assert found is not None
    assert found.classifier is not None
    assert found.ranking.closest.value == np.mean(agreeing)
    assert found.classifier.accuracy.value == np.mean(right)
    assert found.classifier.top5.value == np.mean(among)
    assert 0 < np.mean(agreeing) < 1


def test_raw_pixels_are_the_nearest_grey_picture(closed: Evaluated, model: Path, crowd: Path) -> None:
    measured, rows = closed
    train, validation = split(model)
    pictures = [
        grey(np.stack([pixels.read(crowd / name, size=32) for name in names])).astype(float)
        for names in (train, validation)
    ]
    agreeing = [
        person(train[row]) == person(name)
        for row, name in zip(nearest(pictures[1], pictures[0]), validation, strict=True)
    ]
    assert measured.closed is not None
    plain, eigenfaces = measured.closed.baselines
    assert (plain.name, eigenfaces.name) == ("pixels", "eigenfaces")
    assert plain.ranking.closest.value == np.mean(agreeing)
    assert [row["pixels_right"] for row in rows] == [int(one) for one in agreeing]
    assert "83 principal components" in eigenfaces.says


def test_curves_rise_to_everybody_and_tables_add_up(closed: Evaluated) -> None:
    measured, rows = closed
    found = measured.closed
    assert found is not None
    shares = [figure.value for figure in found.ranking.cmc]
    assert all(share is not None for share in shares)
    assert shares == sorted(shares, key=lambda share: share or 0)
    assert shares[KNOWN - 1] == 1
    wrong = sum(not row["closest_right"] for row in rows)
    assert sum(one.number for one in found.confusions) == wrong == len(found.mistakes)
    assert sum(one.probes - one.closest for one in found.people) == wrong
    assert [one.distance for one in found.mistakes] == sorted(one.distance for one in found.mistakes)
    assert {one.enrolled for one in found.people} == {14}


def test_few_photos_have_a_calibration_error_and_no_temperature(closed: Evaluated) -> None:
    """36 photos: 30 make a number, 18 in a half do not."""
    measured, _ = closed
    assert measured.closed is not None
    assert measured.closed.classifier is not None
    found = measured.closed.classifier.calibration
    assert found.error.known
    assert found.temperature is None
    assert not found.before.known
    assert sum(one.n for one in found.bins) == 36


def test_speed_is_counted_and_the_missing_baseline_named(closed: Evaluated) -> None:
    measured, _ = closed
    assert measured.speed.photos == 120
    assert measured.speed.photos_per_second == pytest.approx(120 / measured.speed.seconds)
    assert measured.notes == ("The network before fine-tuning is left out: it was trained from nothing.",)


def test_the_network_before_fine_tuning_is_that_of_its_weights(
    model: Path, crowd: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    other = Network(KNOWN, architecture="resnet14-narrow").eval()
    state = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("fc.")}
    save_file(state, tmp_path / "initial.safetensors")
    weights = str(tmp_path / "initial.safetensors")
    measured, _ = measure.measure(model, crowd, options=EvaluationOptions(weights=weights))
    train, validation = split(model)
    with torch.inference_mode():
        stored, vectors = (
            other(torch.from_numpy(np.stack([pixels.read(crowd / name, size=32) for name in names])))[0]
            for names in (train, validation)
        )
    rows = nearest(vectors.double().numpy(), stored.double().numpy())
    agreeing = [person(train[row]) == person(name) for row, name in zip(rows, validation, strict=True)]
    assert measured.closed is not None
    before = measured.closed.baselines[2]
    assert before.name == "before"
    assert before.ranking.closest.value == np.mean(agreeing)
    assert measured.notes == ()


def test_the_network_before_fine_tuning_has_the_layout_that_training_used(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    """Which the file alone may not tell: here torch's format, with weights in VGGFace2's layout."""
    torch.save(Network(KNOWN, architecture="resnet14-narrow").state_dict(), tmp_path / "w.pth")
    sample = np.zeros((1, 32, 32, 3), np.uint8)
    recipe = {"weights": "w.pth", "weights_layout": "vggface2"}
    for found, architecture in (
        (bundle, "resnet14-narrow"),
        (replace(bundle, recipe=recipe), "resnet14-narrow-caffe"),
        (replace(bundle, recipe={**recipe, "weights": "other.pth"}), "resnet14-narrow"),
    ):
        with before_fine_tuning(found, str(tmp_path / "w.pth"), sample) as before:
            assert before.architecture == architecture


def test_other_photos_than_the_models_own_are_split_by_the_seed(bundle: ModelBundle, crowd: Path) -> None:
    """The bundle's card has no photo: 12 people with two photos or more are cut 70/30."""
    one, rows = measure.measure(bundle.folder, crowd, options=EvaluationOptions(seed=5))
    other, _ = measure.measure(bundle.folder, crowd, options=EvaluationOptions(seed=6))
    assert one.data.split == "30% of each one's photos held out, seed 5"
    assert one.closed is not None
    assert other.closed is not None
    assert (one.closed.identities, one.closed.probes) == (12, 6 * 6 + 6 * 3)
    assert one.closed.classifier is not None
    assert one.closed.classifier.accuracy.n == 36
    unknown = [row for row in rows if row["classifier_right"] is None]
    assert len(unknown) == 18
    assert one.closed.ranking != other.closed.ranking


def test_a_folder_that_lacks_some_photos_of_the_split_is_refused(
    model: Path, crowd: Path, tmp_path: Path
) -> None:
    shutil.copytree(crowd, tmp_path / "crowd")
    gone = split(model)[1][0]
    (tmp_path / "crowd" / gone).unlink()
    with pytest.raises(DataError, match=f"lacks 1 of the 120 photos .* such as {gone}"):
        measure.measure(model, tmp_path / "crowd")


def test_a_bad_file_is_a_line_and_the_others_are_measured(model: Path, crowd: Path, tmp_path: Path) -> None:
    shutil.copytree(crowd, tmp_path / "crowd")
    bad = split(model)[1][0]
    (tmp_path / "crowd" / bad).write_bytes(b"<html>")
    measured, rows = measure.measure(model, tmp_path / "crowd")
    assert [(one.path, one.reason) for one in measured.left_out] == [(bad, "not-an-image")]
    assert (measured.data.found, measured.data.embedded, len(rows)) == (120, 119, 35)


def test_stopping_stops(model: Path, crowd: Path) -> None:
    with pytest.raises(Interrupted):
        measure.measure(model, crowd, watch=Watch(should_stop=lambda: True))


def test_an_open_set_has_strangers_and_searches_for_no_photo_of_training(
    opened: Evaluated, model: Path
) -> None:
    measured, rows = opened
    found = measured.open
    assert found is not None
    assert (found.identities, found.trained_identities, found.enrolled) == (12, 6, 6 * 14 + 6 * 7)
    assert (found.mated, found.strangers, found.stranger_identities) == (6 * 6 + 6 * 3, 40, 40)
    assert not {row["path"] for row in rows} & set(split(model)[0])
    assert {person(row["path"]) for row in rows if not row["mated"]} == {
        name_of(identity) for identity in range(KNOWN + OTHERS, KNOWN + OTHERS + STRANGERS)
    }


def test_misses_are_counted_at_the_distance_at_which_a_tenth_of_strangers_is_named(opened: Evaluated) -> None:
    measured, rows = opened
    assert measured.open is not None
    points = {point.rate: point for point in measured.open.identification.points}
    strangers = np.array([row["distance"] for row in rows if not row["mated"]])
    mated = [row for row in rows if row["mated"]]
    limit = rates.threshold(strangers, 0.1)
    missed = [not row["closest_right"] or row["distance"] > limit for row in mated]
    assert points[0.1].threshold == limit
    assert points[0.1].missed.value == pytest.approx(np.mean(missed))
    assert [row["right_at_0.1"] for row in mated] == [int(not one) for one in missed]
    assert sum(not row["right_at_0.1"] for row in rows if not row["mated"]) <= 4
    for rate in (0.01, 0.003):
        assert points[rate].threshold is None
        assert points[rate].missed.method.startswith("too few: 40 false trials, and it takes")


def test_the_det_curve_falls_as_false_alarms_rise(opened: Evaluated) -> None:
    measured, _ = opened
    assert measured.open is not None
    curve = measured.open.identification.curve
    assert 10 < len(curve.thresholds) <= 200
    assert list(curve.false_alarms) == sorted(curve.false_alarms)
    assert list(curve.missed) == sorted(curve.missed, reverse=True)
    assert curve.false_alarms[-1] == 1


def test_a_gallery_of_the_same_photos_gives_the_same_figures(
    opened: Evaluated, model: Path, crowd: Path, tmp_path: Path
) -> None:
    bundle = ModelBundle.load(model)
    cut = protocols.open_set(protocols.photos_of(crowd), crowd, bundle, min_images=10, fraction=0.3, seed=0)
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        ingest_photos(gallery, of(cut.enrolled))
    measured, rows = measure.measure(model, crowd, options=EvaluationOptions(gallery=tmp_path / "g"))
    found, expected = measured.open, opened[0].open
    assert found is not None
    assert expected is not None
    assert measured.protocol == "open"
    assert (found.mated, found.strangers) == (expected.mated, expected.strangers)
    # Those of training are never searched for; the other enrolled ones are found to be so.
    assert (found.trained_photos, found.already_enrolled) == (84, 42)
    assert found.identification.points[0].threshold == pytest.approx(
        expected.identification.points[0].threshold, rel=1e-5
    )
    assert found.identification.points[0].missed == expected.identification.points[0].missed
    assert found.identification.ranking.cmc == expected.identification.ranking.cmc
    assert {row["path"]: row["nearest"] for row in rows} == {row["path"]: row["nearest"] for row in opened[1]}


def test_a_gallery_of_another_model_is_refused(model: Path, crowd: Path, tmp_path: Path) -> None:
    Gallery.create(tmp_path / "g", ModelBundle.load(model)).close()
    other = tmp_path / "other.model"
    shutil.copytree(model, other)
    altered = json.loads((other / "bundle.json").read_text())
    altered["fingerprint"] = "0" * 64
    (other / "bundle.json").write_text(json.dumps(altered))
    with pytest.raises(ModelMismatch):
        measure.measure(other, crowd, options=EvaluationOptions(gallery=tmp_path / "g"))


def test_an_empty_gallery_is_one_sentence(model: Path, crowd: Path, tmp_path: Path) -> None:
    Gallery.create(tmp_path / "g", ModelBundle.load(model)).close()
    with pytest.raises(DataError, match="No identity is enrolled"):
        measure.measure(model, crowd, options=EvaluationOptions(gallery=tmp_path / "g"))


def pairs_file(folder: Path) -> Path:
    """Three folds of 20 pairs of either kind; people 6 to 11 are the first fold, whom the model never saw."""
    random = np.random.default_rng(0)
    lines = ["3\t20"]
    for people, photos in ((range(6, 12), 10), (range(3), 20), (range(3, 6), 20)):
        names = [name_of(identity) for identity in people]
        for _ in range(20):
            one, other = random.choice(photos, 2, replace=False) + 1
            lines.append(f"{random.choice(names)}\t{one}\t{other}")
        for _ in range(20):
            first, second = random.choice(names, 2, replace=False)
            lines.append(
                f"{first}\t{random.integers(1, photos + 1)}\t{second}\t{random.integers(1, photos + 1)}"
            )
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    return folder / "pairs.txt"


def test_pairs_are_told_by_the_distance_of_their_embeddings(model: Path, crowd: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(protocol="lfw-pairs", pairs=pairs_file(tmp_path))
    measured, rows = measure.measure(model, crowd, options=options)
    found = measured.pairs
    assert found is not None
    assert (found.same, found.different, found.left_out) == (60, 60, 0)
    names = [f"{row[side]}.jpg" for row in rows for side in ("first", "second")]
    vectors, _ = embedded(model, names, crowd)
    np.testing.assert_allclose(
        [row["distance"] for row in rows], np.linalg.norm(vectors[::2] - vectors[1::2], axis=1), rtol=1e-4
    )
    assert found.verification.accuracy.value == pytest.approx(np.mean([row["right"] for row in rows]))
    assert found.verification.points[0].missed.known
    assert not found.verification.points[2].missed.known
    assert found.verification.area.known
    assert [one.name for one in found.baselines] == ["pixels", "eigenfaces"]


def test_pairs_of_people_seen_in_training_are_counted(model: Path, crowd: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(protocol="lfw-pairs", pairs=pairs_file(tmp_path))
    measured, _ = measure.measure(model, crowd, options=options)
    assert measured.pairs is not None
    assert (measured.pairs.people, measured.pairs.trained_people, measured.pairs.unseen_pairs) == (12, 6, 40)
    # All of these are in one fold, and no threshold can come from another.
    assert measured.pairs.unseen is None
    assert measured.notes[0].startswith("The model was trained on 6 of the 12 people")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (EvaluationOptions(protocol="shut"), "`protocol` must be one of"),
        (EvaluationOptions(protocol="lfw-pairs"), "`pairs` and `protocol='lfw-pairs'` go together"),
        (EvaluationOptions(pairs=Path("pairs.txt")), "`pairs` and `protocol='lfw-pairs'` go together"),
        (EvaluationOptions(protocol="closed", gallery=Path("g")), "searched by the open protocol"),
        (EvaluationOptions(weights="none"), "`weights='none'` is no network"),
        (EvaluationOptions(protocol="open", min_images=50), "No person in"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    model: Path, crowd: Path, options: EvaluationOptions, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        measure.measure(model, crowd, options=options)


def figures_in(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        if set(tree) == {"value", "low", "high", "n", "method"}:
            return [tree]
        return [one for value in tree.values() for one in figures_in(value)]
    return [one for value in tree for one in figures_in(value)] if isinstance(tree, list) else []


@pytest.mark.parametrize("protocol", ["closed", "opened"])
def test_results_are_json_and_a_row_for_each_search(
    protocol: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    measured, rows = request.getfixturevalue(protocol)
    result_files.write(tmp_path / "out", measured, rows)
    read = result_files.read(tmp_path / "out")
    assert read.metrics["protocol"] == measured.protocol
    figures = figures_in(read.metrics)
    assert len(figures) > 20
    for figure in figures:
        assert isinstance(figure["n"], int)
        assert (figure["value"] is None) == figure["method"].startswith("too few")
    with open(tmp_path / "out" / "photos.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    assert [float(row["distance"]) for row in table] == [row["distance"] for row in rows]


def test_results_are_not_written_over_something_else(tmp_path: Path, model: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder, said in (
        (tmp_path, "is not empty"),
        (tmp_path / "notes.txt", "is a file"),
        (model, "is a model"),
    ):
        with pytest.raises(InputError, match=said):
            result_files.check_target(folder)


def test_an_evaluation_is_no_better_than_itself(closed: Evaluated, tmp_path: Path) -> None:
    result_files.write(tmp_path / "out", *closed)
    found = comparison.compare(result_files.read(tmp_path / "out"), result_files.of(*closed))
    assert (found.common, found.only_in_a, found.only_in_b) == (36, 0, 0)
    assert [test.name for test in found.tests] == [
        "classifier accuracy",
        "classifier top-5",
        "closest-image agreement",
        "mean average precision",
    ]
    for test in found.tests:
        assert test.a == test.b
        assert test.difference.value == 0
        assert (test.only_a, test.only_b, test.p) in ((0, 0, 1.0), (None, None, None))


def test_a_comparison_counts_what_only_one_has_right(closed: Evaluated) -> None:
    """B is A with all of its closest images right: each mistake of A is one that only B has right."""
    measured, rows = closed
    better = [{**row, "closest_right": 1} for row in rows]
    wrong = sum(not row["closest_right"] for row in rows)
    found = comparison.compare(result_files.of(measured, rows), result_files.of(measured, better))
    (test,) = [test for test in found.tests if test.name == "closest-image agreement"]
    assert (test.only_a, test.only_b) == (0, wrong)
    assert test.difference.value == pytest.approx(wrong / len(rows))
    assert test.p == pytest.approx(2 * 0.5**wrong)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024)]
)
def test_mcnemars_test_is_a_fair_coin(only_a: int, only_b: int, p: float) -> None:
    assert comparison.mcnemar(only_a, only_b) == pytest.approx(p)


def test_evaluations_that_have_nothing_in_common_are_not_compared(
    closed: Evaluated, opened: Evaluated
) -> None:
    with pytest.raises(InputError, match=r"was evaluated as closed and narrow\.model as open"):
        comparison.compare(result_files.of(*closed), result_files.of(*opened))
    measured, rows = closed
    others = [{**row, "path": f"other/{row['path']}"} for row in rows]
    with pytest.raises(InputError, match="have no photo in common"):
        comparison.compare(result_files.of(measured, rows), result_files.of(measured, others))


def test_a_figure_that_is_none_is_said_to_be_none() -> None:
    assert not Figure(None, None, None, 3, "too few: 3, and it takes 30").known
