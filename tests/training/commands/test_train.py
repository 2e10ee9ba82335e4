"""The training command's output: what it says about the weights that it starts from."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network
from training.commands.train import train
from training.fitting.recipes import FitConfig
from training.run import TrainingOptions

NARROW = "resnet14-narrow"
RECOGNIZED = (
    "layout of the weights: vggface2 (a Caffe network: VGGFace2's mean, stride in the first convolution of "
    "a block); recognized by the file's format, --weights-layout torchvision overrules it"
)
SAID = (
    "layout of the weights: torchvision (ImageNet's mean and deviation, stride in the second convolution "
    "of a block)"
)


def _begun(path: Path) -> str:
    """Writes the first layers of a network as a pickle of arrays."""
    torch.manual_seed(2)
    state = Network(2, architecture=NARROW).state_dict()
    part = {
        name: tensor.numpy()
        for name, tensor in state.items()
        if not name.startswith(("layer4", "fc", "mean", "std"))
    }
    path.write_bytes(pickle.dumps(part, 2))
    return str(path)


def test_resuming_without_a_checkpoint_is_said_to_start_from_the_beginning(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TrainingOptions(
        weights="none",
        architecture=NARROW,
        preprocessing=Preprocessing(size=32, crop=1.0),
        device="cpu",
        resume=True,
    )
    train(faces, tmp_path / "m", config=FitConfig(epochs=1, batch_size=8), options=options)
    note = f"note: {tmp_path / 'm'} has no checkpoint; --resume starts from the beginning"
    assert note in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("asked", "layout", "line"),
    [("auto", "vggface2", RECOGNIZED), ("torchvision", "torchvision", SAID)],
)
def test_training_says_which_layout_its_weights_have_and_the_model_records_it(
    faces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    layout: str,
    line: str,
) -> None:
    options = TrainingOptions(
        weights=_begun(tmp_path / "w.pkl"),
        weights_layout=asked,
        architecture=NARROW,
        preprocessing=Preprocessing(size=32, crop=1.0),
        device="cpu",
    )
    train(faces, tmp_path / "m", config=FitConfig(epochs=1), options=options)
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert "weights: w.pkl; starting fresh: layer4, fc; device: cpu" in lines
    assert line in lines
    bundle = ModelBundle.load(tmp_path / "m")
    assert bundle.architecture == (NARROW if layout == "torchvision" else f"{NARROW}-caffe")
    assert bundle.recipe["weights_layout"] == layout
    assert f"| weights layout | {layout} |" in bundle.description_path.read_text()
    # Opening a model compares its graph with its weights.
    with Embedder.open(bundle, device="cpu", engine="onnxruntime") as embedder:
        assert embedder.embed(np.zeros((1, 32, 32, 3), np.uint8)).vectors.any()


def test_training_from_nothing_says_nothing_of_a_layout(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TrainingOptions(
        weights="none", architecture=NARROW, preprocessing=Preprocessing(size=32, crop=1.0), device="cpu"
    )
    trained = train(faces, tmp_path / "m", config=FitConfig(epochs=1), options=options)
    assert "layout" not in capsys.readouterr().out
    assert "weights_layout" not in trained.bundle.recipe
