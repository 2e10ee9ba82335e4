"""Training: the loop, its checkpoints, and a whole run from a folder of photos to a folder with a model."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval.errors import InputError, Interrupted, RunError, StorageError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network
from retrieval.system.cpu import usable_cores
from training import run
from training.data import dataset
from training.data.augmentation import Augmentation
from training.data.dataset import Split
from training.fitting.devices import in_software, pick_device, pick_precision
from training.fitting.fit import Epoch, History, Step, _Run, fit
from training.fitting.recipes import RECIPES, FitConfig
from training.networks.initialize import build
from training.run import Observer, TrainingOptions, TrainingResult

NARROW = "resnet14-narrow"
CPU = torch.device("cpu")
SMALL = PhotoReader(Preprocessing(size=32, crop=1.0))
# With the 24 training photos of the drawn faces: three steps an epoch, nine in all.
CONFIG = FitConfig(epochs=3, batch_size=8, warmup_epochs=1.0)
STEPS = 3


def network(labels: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build(labels, weights="none", architecture=NARROW)[0]


def timeless(history: History) -> History:
    """Equal for runs that differ in their clocks alone."""
    return replace(history, epochs=tuple(replace(epoch, seconds=0.0) for epoch in history.epochs))


def same(one: Network, other: Network) -> bool:
    """Whether two networks agree in every bit of every parameter and buffer."""
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


@pytest.fixture(scope="module")
def split(faces: Path) -> Split:
    return dataset.load(faces, validation_fraction=0.3, min_images=None, seed=0)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Two identities that anyone can tell apart: reds and blues."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for name, channel in (("Red", 0), ("Blue", 2)):
        (folder / name).mkdir()
        for number in range(12):
            colour = np.zeros((32, 32, 3), np.uint8)
            colour[:, :, channel] = random.integers(150, 256)
            Image.fromarray(colour).save(folder / name / f"{number:02d}.png")
    return dataset.load(folder, validation_fraction=0.3, min_images=None, seed=0)


@pytest.fixture(scope="module")
def undisturbed(split: Split) -> tuple[Network, History]:
    """A run that nobody interrupts and that writes no checkpoint."""
    fitted = network(6)
    return fitted, fit(fitted, split, SMALL, CONFIG, device=CPU)


def sittings(
    split: Split, checkpoint: Path, stops: Sequence[int]
) -> Iterator[tuple[Network, History | None]]:
    """Trains in sittings, stopping after the given numbers of steps (of all), each with a new network."""
    for sitting, stop in enumerate((*stops, None)):
        # Only the first network may matter: everything else has to come from the checkpoint.
        fitted = network(6, seed=sitting)
        taken = stops[sitting - 1] if sitting else 0
        asked: list[Step] = []
        try:
            history = fit(
                fitted,
                split,
                SMALL,
                CONFIG,
                device=CPU,
                checkpoint=checkpoint,
                resume=True,
                on_step=asked.append,
                should_stop=lambda taken=taken, asked=asked, stop=stop: taken + len(asked) == stop,
            )
        except Interrupted:
            yield fitted, None
        else:
            yield fitted, history


@pytest.mark.parametrize(
    "stops",
    [(1,), (8,), (3,), (2, 5), (3, 4), (5, 6)],
    ids=lambda stops: "+".join(map(str, stops)),
)
def test_an_interrupted_run_ends_bit_for_bit_as_the_undisturbed_one(
    split: Split, undisturbed: tuple[Network, History], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """In the middle of an epoch and at its end (after steps 3 and 6), once and twice."""
    *interrupted, (resumed, history) = sittings(split, tmp_path / "checkpoint", stops)
    assert [said for _, said in interrupted] == [None] * len(stops)
    assert history is not None
    expected, expected_history = undisturbed
    assert timeless(history) == timeless(expected_history)
    assert same(resumed, expected)


def test_a_wish_to_stop_after_the_last_step_comes_too_late(
    split: Split, undisturbed: tuple[Network, History], tmp_path: Path
) -> None:
    ((fitted, history),) = list(sittings(split, tmp_path / "checkpoint", (9,)))[:1]
    assert history is not None
    assert timeless(history) == timeless(undisturbed[1])
    assert same(fitted, undisturbed[0])


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        (1, "Stopped in epoch 1 after step 1."),
        (5, "Stopped in epoch 2 after step 2."),
        (6, "Stopped after epoch 2."),
    ],
)
def test_an_interrupted_run_says_where_it_stopped(split: Split, stop: int, sentence: str) -> None:
    steps: list[Step] = []
    with pytest.raises(Interrupted) as caught:
        fit(
            network(6),
            split,
            SMALL,
            CONFIG,
            device=CPU,
            on_step=steps.append,
            should_stop=lambda: len(steps) == stop,
        )
    assert str(caught.value) == sentence
    assert len(steps) == stop


@pytest.mark.parametrize("stop", [2, 3])
def test_every_step_and_every_epoch_is_told_once_whatever_the_sittings(
    split: Split, undisturbed: tuple[Network, History], tmp_path: Path, stop: int
) -> None:
    steps: list[Step] = []
    epochs: list[Epoch] = []

    def sit(should_stop: Callable[[], bool]) -> None:
        fit(
            network(6),
            split,
            SMALL,
            CONFIG,
            device=CPU,
            checkpoint=tmp_path / "checkpoint",
            resume=True,
            on_step=steps.append,
            on_epoch=epochs.append,
            should_stop=should_stop,
        )

    with pytest.raises(Interrupted):
        sit(lambda: len(steps) == stop)
    sit(lambda: False)
    expected = timeless(undisturbed[1])
    assert timeless(History(epochs=tuple(epochs))).epochs == expected.epochs
    assert [(s.epoch, s.step, s.steps) for s in steps] == [
        (epoch, step, STEPS) for epoch in (1, 2, 3) for step in (1, 2, 3)
    ]
    assert tuple(s.loss for s in steps) == expected.losses
    assert tuple(s.accuracy for s in steps) == expected.accuracies


def test_a_finished_checkpoint_resumes_to_its_end_without_a_step(
    split: Split, undisturbed: tuple[Network, History], tmp_path: Path
) -> None:
    list(sittings(split, tmp_path / "checkpoint", ()))
    other = network(6, seed=5)
    steps: list[Step] = []
    history = fit(
        other,
        split,
        SMALL,
        CONFIG,
        device=CPU,
        checkpoint=tmp_path / "checkpoint",
        resume=True,
        on_step=steps.append,
    )
    assert steps == []
    assert timeless(history) == timeless(undisturbed[1])
    assert same(other, undisturbed[0])


def test_an_epochs_figures_are_the_means_of_its_steps(undisturbed: tuple[Network, History]) -> None:
    _, history = undisturbed
    assert len(history.losses) == len(history.accuracies) == 9
    for number, epoch in enumerate(history.epochs):
        steps = slice(number * STEPS, (number + 1) * STEPS)
        assert epoch.epoch == number + 1
        assert epoch.loss == pytest.approx(np.mean(history.losses[steps]))
        assert epoch.accuracy == pytest.approx(np.mean(history.accuracies[steps]))
        assert epoch.seconds > 0


def test_validation_is_measured_on_the_plain_held_out_photos(
    split: Split, undisturbed: tuple[Network, History]
) -> None:
    fitted, history = undisturbed
    photographs = dataset.Photographs(split.validation, SMALL)
    pixels = torch.stack([photographs[index][0] for index in range(len(photographs))])
    labels = torch.tensor([sample.label for sample in split.validation])
    with torch.inference_mode():
        logits = fitted.eval()(pixels)[1]
    assert history.epochs[-1].validation_accuracy == (logits.argmax(1) == labels).double().mean().item()
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert history.epochs[-1].validation_loss == pytest.approx(expected, rel=1e-4)


def _interrupted(split: Split, checkpoint: Path) -> None:
    steps: list[Step] = []
    with pytest.raises(Interrupted):
        fit(
            network(6),
            split,
            SMALL,
            CONFIG,
            device=CPU,
            weights="none",
            checkpoint=checkpoint,
            on_step=steps.append,
            should_stop=lambda: len(steps) == 2,
        )


@pytest.fixture(scope="module")
def checkpoint(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was stopped after two steps."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    _interrupted(split, path)
    return path


def resumed(split: Split, checkpoint: Path, **changes: Any) -> str:
    """The sentence with which a run refuses to go on."""
    options: dict[str, Any] = {
        "reader": SMALL,
        "config": CONFIG,
        "weights": "none",
        "network": network(6),
    }
    options |= changes
    with pytest.raises(InputError) as caught:
        fit(
            options["network"],
            split,
            options["reader"],
            options["config"],
            device=CPU,
            weights=options["weights"],
            checkpoint=checkpoint,
            resume=True,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"config": replace(CONFIG, learning_rate=0.5)}, "with learning_rate 0.01 (now 0.5)"),
        ({"config": replace(CONFIG, momentum=0.0)}, "with momentum 0.9 (now 0.0)"),
        ({"config": replace(CONFIG, batch_size=4)}, "with batch_size 8 (now 4)"),
        ({"config": replace(CONFIG, epochs=9)}, "with epochs 3 (now 9)"),
        ({"config": replace(CONFIG, seed=1)}, "with seed 0 (now 1)"),
        ({"config": replace(CONFIG, augmentation=Augmentation(flip=False))}, "with flip True (now False)"),
        ({"reader": PhotoReader(Preprocessing(size=40, crop=1.0))}, "with size 32 (now 40)"),
        ({"reader": PhotoReader(Preprocessing(size=32, crop=0.5))}, "with crop 1.0 (now 0.5)"),
        ({"weights": "imagenet"}, "with weights none (now imagenet)"),
        (
            {"config": replace(CONFIG, seed=1, momentum=0.5)},
            "with momentum 0.9 (now 0.5) and with seed 0 (now 1)",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_resuming_with_another_option_names_it(
    split: Split, checkpoint: Path, changes: dict[str, Any], difference: str
) -> None:
    assert resumed(split, checkpoint, **changes) == (
        f"The checkpoint {checkpoint} was made {difference}; "
        "resume with the same data and options, or train into another folder."
    )


def test_resuming_with_another_architecture_names_it(split: Split, checkpoint: Path) -> None:
    other = network(6)
    other.architecture = "resnet50"
    assert "with architecture resnet14-narrow (now resnet50);" in resumed(split, checkpoint, network=other)


@pytest.mark.parametrize(
    "change",
    [
        lambda split: replace(split, train=split.train[:-1]),
        lambda split: replace(split, validation=split.validation[1:]),
        lambda split: replace(split, train=split.validation, validation=split.train),
    ],
    ids=["fewer", "fewer-held-out", "exchanged"],
)
def test_resuming_with_other_photos_is_refused(
    split: Split, checkpoint: Path, change: Callable[[Split], Split]
) -> None:
    assert resumed(change(split), checkpoint) == (
        f"The checkpoint {checkpoint} was made from other photos; "
        "resume with the same data and options, or train into another folder."
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a checkpoint",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data.replace(b'\\"step\\"', b'\\"stop\\"', 1),
        lambda data: data.replace(b'"identity"', b'"idenitty"', 1),
    ],
    ids=["empty", "text", "half", "a-byte-short", "progress", "identity"],
)
def test_a_damaged_checkpoint_is_an_input_error(
    split: Split, checkpoint: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = checkpoint.read_bytes()
    damaged = tmp_path / "checkpoint.safetensors"
    damaged.write_bytes(damage(whole))
    assert damaged.read_bytes() != whole
    assert resumed(split, damaged) == (
        f"The checkpoint {damaged} is damaged; remove it and train from the start."
    )


EPOCH = asdict(Epoch(1, 0.5, 0.5, 0.5, 0.5, 1.0))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"epoch": "1"}, "the field epoch: expected int, got str"),
        ({"step": 1.5}, "the field step: expected int, got float"),
        ({"step": True}, "the field step: expected int, got bool"),
        ({"seconds": None}, "the field seconds: expected float, got null"),
        ({"losses": [0.5, "0.5"]}, "the field losses[1]: expected float, got str"),
        ({"accuracies": {}}, "the field accuracies: expected array, got object"),
        ({"epochs": [EPOCH, None]}, "the field epochs[1]: expected object, got null"),
        ({"epochs": [{**EPOCH, "loss": "low"}]}, "the field epochs[0].loss: expected float, got str"),
        ({"epochs": [{"epoch": 1}]}, "the field epochs[0]: object missing required field loss"),
        ({"what": 1}, None),
        ({"epochs": [{**EPOCH, "what": 1}]}, None),
    ],
)
def test_a_field_of_a_checkpoint_that_has_another_type_is_named(
    split: Split, checkpoint: Path, tmp_path: Path, change: dict[str, Any], problem: str | None
) -> None:
    """A field that nobody knows is damage too: what it would mean for the run cannot be told."""
    with safe_open(checkpoint, framework="pt") as file:
        state = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    state["progress"] = json.dumps({**json.loads(state["progress"]), **change})
    changed = tmp_path / "checkpoint.safetensors"
    save_file(tensors, changed, metadata=state)
    named = f"{changed} is damaged ({problem})" if problem else f"The checkpoint {changed} is damaged"
    assert resumed(split, changed) == f"{named}; remove it and train from the start."


def test_weights_are_no_checkpoint(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file(network(6).state_dict(), path)
    assert "is damaged; remove it and train from the start." in resumed(split, path)


def test_a_checkpoint_that_cannot_be_written_is_a_storage_error(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "gone" / "checkpoint.safetensors"
    with pytest.raises(StorageError) as caught:
        fit(network(6), split, SMALL, replace(CONFIG, epochs=1), device=CPU, checkpoint=path)
    assert str(caught.value) == (f"The checkpoint cannot be written to {path}: no such file or directory.")


def test_a_run_that_diverges_says_what_to_lower(split: Split) -> None:
    with pytest.raises(
        RunError, match=r"^Training diverged in epoch 1 \(the loss is (nan|inf)\); lower `learning_rate`\.$"
    ):
        fit(network(6), split, SMALL, replace(CONFIG, learning_rate=1e30), device=CPU)


def test_a_run_whose_very_last_step_diverges_says_so_too(split: Split) -> None:
    """The only step's own loss is finite; what it does to the network shows on the held-out photos."""
    config = replace(CONFIG, epochs=1, batch_size=99, learning_rate=1e30)
    steps: list[Step] = []
    with pytest.raises(
        RunError, match=r"^Training diverged in epoch 1 \(the loss is (nan|inf)\); lower `learning_rate`\.$"
    ):
        fit(network(6), split, SMALL, config, device=CPU, on_step=steps.append)
    assert [math.isfinite(step.loss) for step in steps] == [True]


@pytest.mark.parametrize(
    ("warmup_epochs", "expected"),
    [
        (2.0, [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]),
        (1.0, [2, 4, 6, 8, 8, 8, 8, 8, 8, 8]),
        (0.5, [4, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
        (0.0, [8] * 10),
    ],
)
def test_the_rate_rises_linearly_while_warming_up_and_then_stays(
    split: Split, warmup_epochs: float, expected: list[int]
) -> None:
    """With four steps an epoch."""
    config = FitConfig(learning_rate=8.0, warmup_epochs=warmup_epochs)
    started = _Run(network(6), split, SMALL, config, CPU, "fp32", 0, "none")
    assert [started._rate(step, 4) for step in range(10)] == pytest.approx(expected)


def test_a_cosine_falls_from_the_full_rate_to_nothing_after_warming_up(split: Split) -> None:
    """With four steps an epoch and one of three epochs of warming up, half is left in the middle."""
    config = FitConfig(learning_rate=8.0, warmup_epochs=1.0, epochs=3, schedule="cosine")
    started = _Run(network(6), split, SMALL, config, CPU, "fp32", 0, "none")
    rates = [started._rate(step, 4) for step in range(13)]
    assert rates[:5] == pytest.approx([2, 4, 6, 8, 8])
    assert rates[8] == pytest.approx(4)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0)


def test_a_run_that_only_warms_up_reaches_the_full_rate_at_its_end(split: Split) -> None:
    config = FitConfig(learning_rate=8.0, warmup_epochs=1.0, epochs=1, schedule="cosine")
    started = _Run(network(6), split, SMALL, config, CPU, "fp32", 0, "none")
    assert [started._rate(step, 4) for step in range(4)] == pytest.approx([2, 4, 6, 8])


def test_steps_in_bfloat16_learn_too_and_leave_float32(colours: Split) -> None:
    fitted = network(2)
    config = FitConfig(epochs=4, batch_size=8, warmup_epochs=1.0, augmentation=Augmentation(0.05))
    history = fit(fitted, colours, SMALL, config, device=CPU, precision="bf16")
    assert history.epochs[-1].validation_accuracy > 0.9
    assert {parameter.dtype for parameter in fitted.parameters()} == {torch.float32}
    exact = fit(network(2), colours, SMALL, config, device=CPU)
    assert history.losses != exact.losses


def test_a_margin_is_taken_from_the_cosine_of_the_own_identity_alone(split: Split) -> None:
    """With a margin of 0.25 and a scale of 16, 4 are missing from one logit."""
    config = FitConfig(classifier="cosine", margin=0.25)
    started = _Run(
        build(6, weights="none", architecture=f"{NARROW}-cosine")[0],
        split,
        SMALL,
        config,
        CPU,
        "fp32",
        0,
        "none",
    )
    logits, labels = torch.tensor([[9.0, 5.0, 0.0]]), torch.tensor([0])
    expected = torch.nn.functional.cross_entropy(torch.tensor([[5.0, 5.0, 0.0]]), labels)
    assert started._loss(logits, labels).item() == pytest.approx(expected.item())


def test_the_automatic_precision_is_float32_on_a_cpu() -> None:
    assert pick_precision("auto", CPU) == "fp32"
    assert pick_precision("bf16", CPU) == "bf16"


def test_bfloat16_is_in_software_on_a_cpu_of_256_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, plain in (("DEFAULT", True), ("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda known=capability: known)
        assert in_software("bf16", CPU) is plain
        assert not in_software("fp32", CPU)
    assert not in_software("bf16", torch.device("cuda"))


def test_the_first_of_four_steps_of_warming_up_is_taken_at_a_quarter_of_the_rate(split: Split) -> None:
    def one_step(**options: float) -> Network:
        fitted = network(6)
        fit(fitted, split, SMALL, FitConfig(epochs=1, batch_size=99, **options), device=CPU)
        return fitted

    warming = one_step(learning_rate=0.04, warmup_epochs=4.0)
    assert same(warming, one_step(learning_rate=0.01))
    assert not same(warming, one_step(learning_rate=0.04))


def test_two_colours_are_learned(colours: Split) -> None:
    """Chance is a half; the loss falls."""
    config = FitConfig(epochs=4, batch_size=8, warmup_epochs=1.0, augmentation=Augmentation(0.05))
    history = fit(network(2), colours, SMALL, config, device=CPU)
    first, last = history.epochs[0], history.epochs[-1]
    assert last.loss < 0.3 * first.loss
    assert last.accuracy > 0.9
    assert last.validation_accuracy > 0.9


def test_another_seed_ends_elsewhere(split: Split, undisturbed: tuple[Network, History]) -> None:
    """From the same parameters: order and augmentation follow the seed."""
    fitted = network(6)
    fit(fitted, split, SMALL, replace(CONFIG, seed=1), device=CPU)
    assert not same(fitted, undisturbed[0])


def test_the_automatic_device_is_the_gpu_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "abacus", ""])
def test_a_device_that_does_not_exist_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError) as caught:
        pick_device(name)
    assert str(caught.value) == f"There is no device {name} here; use `device='auto'` or `device='cpu'`."


OPTIONS = TrainingOptions(
    weights="none", preprocessing=SMALL.preprocessing, architecture=NARROW, device="cpu"
)
WHOLE_RUN = FitConfig(epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A whole run on the drawn faces."""
    return run.train(faces, tmp_path_factory.mktemp("models") / "faces", config=WHOLE_RUN, options=OPTIONS)


@pytest.fixture(scope="module")
def again(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """The same run, interrupted and resumed, its folder given with a detour."""
    out = tmp_path_factory.mktemp("models") / "again"
    detour = faces / ".." / faces.name
    stopped_after(4, detour, out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors"]
    return run.train(detour, out, config=WHOLE_RUN, options=replace(OPTIONS, resume=True))


def stopped_after(step: int, folder: Path, out: Path, options: TrainingOptions = OPTIONS) -> None:
    steps: list[Step] = []
    observer = Observer(on_step=steps.append, should_stop=lambda: len(steps) == step)
    with pytest.raises(Interrupted):
        run.train(folder, out, config=WHOLE_RUN, options=options, observer=observer)


def test_a_run_leaves_the_model_its_report_and_nothing_else(trained: TrainingResult) -> None:
    assert sorted(path.name for path in trained.bundle.folder.iterdir()) == [
        "MODELCARD.md",
        "bundle.json",
        "closest_photos.png",
        "loss_and_error.png",
        "metrics.json",
        "model.onnx",
        "model.safetensors",
        "report.html",
        "training_progress.png",
    ]
    assert ModelBundle.load(trained.bundle.folder) == trained.bundle
    trained.bundle.verify()


def test_the_figures_of_a_run_say_what_was_trained_on_what_and_how_well(trained: TrainingResult) -> None:
    metrics = json.loads((trained.bundle.folder / "metrics.json").read_text("utf-8"))
    seconds = metrics.pop("seconds")
    assert metrics == {
        "device": "CPU, 1 thread"
        if torch.get_num_threads() == 1
        else f"CPU, {torch.get_num_threads()} threads",
        "images": 36,
        "classes": 6,
        "train_images": 24,
        "validation_images": 12,
        "left_out": 0,
        "validation_accuracy": trained.history.epochs[-1].validation_accuracy,
        "closest_image_agreement": trained.evaluation.closest_image_agreement,
        "epochs": [asdict(epoch) for epoch in trained.history.epochs],
    }
    assert len(metrics["epochs"]) == 2
    assert seconds >= round(sum(epoch["seconds"] for epoch in metrics["epochs"]), 1)
    del metrics["epochs"]
    assert trained.bundle.figures == {**metrics, "seconds": seconds}


def test_the_report_of_a_run_is_one_file_that_asks_for_nothing_else(trained: TrainingResult) -> None:
    html = (trained.bundle.folder / "report.html").read_text("utf-8")
    sources = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?([^"'\s>]+)""", html)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?://", html)


@pytest.mark.parametrize("name", ["training_progress", "loss_and_error", "closest_photos"])
def test_the_pictures_of_a_run_are_pngs_with_something_on_them(trained: TrainingResult, name: str) -> None:
    with Image.open(trained.bundle.folder / f"{name}.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 200
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or ()) > 20


def test_the_recorded_split_is_the_one_that_its_options_give(trained: TrainingResult, faces: Path) -> None:
    card = trained.bundle.split
    found = dataset.load(
        faces,
        validation_fraction=card["validation_fraction"],
        min_images=card["min_images"],
        seed=trained.bundle.recipe["seed"],
    )
    assert found == trained.split
    for half, samples in (("train", found.train), ("validation", found.validation)):
        assert [faces / name for name in card[half]] == [sample.path for sample in samples]
    assert len(card["train"]) == 24
    assert len(card["validation"]) == 12


def test_the_recipe_of_a_run_is_in_its_card(trained: TrainingResult) -> None:
    assert trained.bundle.recipe == {
        **WHOLE_RUN.plain(),
        "warmup_epochs": 1.0,
        "weights": "none",
        "started_fresh": ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"],
        "optimizer": "SGD with momentum",
        "precision": "fp32",
    }
    assert trained.bundle.labels == trained.split.labels
    assert trained.bundle.preprocessing == SMALL.preprocessing
    assert trained.bundle.architecture == NARROW
    assert trained.bundle.dimension == 2048


def test_the_same_seed_gives_the_same_model_even_when_interrupted(
    trained: TrainingResult, again: TrainingResult
) -> None:
    assert again.bundle.fingerprint == trained.bundle.fingerprint
    assert timeless(again.history) == timeless(trained.history)
    assert again.split.labels == trained.split.labels
    assert again.bundle.recipe == trained.bundle.recipe
    differing = {"seconds"}
    assert {key: value for key, value in again.bundle.figures.items() if key not in differing} == {
        key: value for key, value in trained.bundle.figures.items() if key not in differing
    }


def test_a_folder_given_with_a_detour_is_recorded_as_the_same_split(
    trained: TrainingResult, again: TrainingResult
) -> None:
    assert again.bundle.split == trained.bundle.split


def _warm_up(checkpoint: Path) -> float:
    with safe_open(checkpoint, framework="pt") as file:
        return float(json.loads(file.metadata()["identity"])["warmup_epochs"])


@pytest.mark.parametrize(("given", "warmup_epochs"), [("layer1", 1.0), ("everything", 0.0)])
def test_a_run_warms_up_for_an_epoch_when_something_starts_fresh(
    faces: Path, tmp_path: Path, given: str, warmup_epochs: float
) -> None:
    state: dict[str, Tensor] = Network(6, architecture=NARROW).state_dict()
    if given == "layer1":
        state = {
            name: tensor for name, tensor in state.items() if name.startswith(("conv1", "bn1", "layer1"))
        }
    save_file(state, tmp_path / "start.safetensors")
    options = replace(OPTIONS, weights=str(tmp_path / "start.safetensors"))
    stopped_after(1, faces, tmp_path / "out", options)
    assert _warm_up(tmp_path / "out" / "checkpoint.safetensors") == warmup_epochs


def test_a_run_that_stopped_is_not_resumed_from_other_weights(faces: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("other", 2)):
        save_file(network(6, seed=seed).state_dict(), tmp_path / f"{name}.safetensors")
    one, other = (str(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    stopped_after(1, faces, tmp_path / "out", replace(OPTIONS, weights=one))
    with pytest.raises(InputError, match=r"with weights one\.safetensors \(now other\.safetensors\)"):
        run.train(
            faces, tmp_path / "out", config=WHOLE_RUN, options=replace(OPTIONS, weights=other, resume=True)
        )


def _refusal(faces: Path, out: Path, *, resume: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        run.train(faces, out, config=WHOLE_RUN, options=replace(OPTIONS, resume=resume))
    return str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["bundle.json"], "{} holds a finished model already; choose another folder with `out`."),
        (
            ["bundle.json", "checkpoint.safetensors"],
            "{} holds a finished model already; choose another folder with `out`.",
        ),
        (["holiday.jpg"], "{} is not empty and holds no model; choose another folder with `out`."),
        (["report.html"], "{} is not empty and holds no model; choose another folder with `out`."),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_a_run_never_writes_into_a_folder_that_is_in_use(
    faces: Path, tmp_path: Path, files: list[str], sentence: str, resume: bool
) -> None:
    for name in files:
        (tmp_path / name).write_text("mine")
    assert _refusal(faces, tmp_path, resume=resume) == sentence.format(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(files, "mine")


def test_an_unfinished_run_goes_on_only_when_asked_to(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_text("half a run")
    assert _refusal(faces, tmp_path) == (
        f"{tmp_path} holds an unfinished run; go on with `resume=True`, or choose another folder with `out`."
    )
    assert _refusal(faces, tmp_path, resume=True).startswith(
        f"The checkpoint {tmp_path / 'checkpoint.safetensors'} is damaged;"
    )


def test_a_file_is_no_folder_for_a_model(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    assert (
        _refusal(faces, tmp_path / "model") == f"{tmp_path / 'model'} is a file; choose a folder with `out`."
    )


def test_a_folder_below_a_file_cannot_be_made(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError) as caught:
        run.train(faces, tmp_path / "file" / "model", config=WHOLE_RUN, options=OPTIONS)
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'model'} cannot be made or written to: not a directory; choose another `out`."
    )


@pytest.mark.parametrize("leftover", [None, ".checkpoint.safetensors.part", ".DS_Store"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_is_free_and_hidden_files_do_not_count(
    faces: Path, tmp_path: Path, leftover: str | None, resume: bool
) -> None:
    """A machine that was lost while it wrote the first checkpoint leaves half of one, under a hidden name."""
    if leftover:
        (tmp_path / leftover).write_text("half")
    stopped_after(1, faces, tmp_path, replace(OPTIONS, resume=resume))
    assert (tmp_path / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize(
    ("asked", "device", "workers"),
    [(None, "cpu", 0), (3, "cpu", 3), (0, "cuda", 0), (None, "cuda", min(8, usable_cores()))],
)
def test_without_a_wish_only_a_gpu_gets_worker_processes(
    asked: int | None, device: str, workers: int
) -> None:
    assert run.workers_for(torch.device(device), asked=asked) == workers


def test_the_modern_recipe_makes_a_model_of_its_own(faces: Path, tmp_path: Path) -> None:
    """Its embeddings have unit length, its classifier cosines; its graph agrees with its network."""
    recipe = RECIPES["modern"]
    options = replace(OPTIONS, embedding=recipe.embedding)
    result = run.train(faces, tmp_path / "model", config=replace(recipe.config, epochs=1), options=options)
    assert result.bundle.architecture == f"{NARROW}-cosine"
    assert result.bundle.embedding.length == "unit"
    assert (result.bundle.recipe["recipe"], result.bundle.recipe["margin"]) == (
        "modern",
        recipe.config.margin,
    )
    found = Embedder.open(result.bundle, device="cpu").embed(np.zeros((2, 32, 32, 3), np.uint8))
    assert np.linalg.norm(found.vectors, axis=1) == pytest.approx([1, 1])
