"""A bundle on a device: both engines, one answer."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval.errors import BundleError, InputError
from retrieval.images import pixels
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder, Embeddings
from retrieval.models.network import Network
from training.fitting.export import export
from training.networks.initialize import build

ENGINES = ("onnxruntime", "torch")


@pytest.fixture(scope="module")
def photos(faces: Path) -> NDArray[np.uint8]:
    """The drawn faces, (36, 32, 32, 3)."""
    return np.stack([pixels.read(path, size=32) for path in sorted(faces.glob("*/*.jpg"))])


@pytest.fixture(scope="module", params=ENGINES)
def embedder(request: pytest.FixtureRequest, bundle: ModelBundle) -> Embedder:
    return Embedder.open(bundle, device="cpu", engine=request.param)


@pytest.fixture(scope="session")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelBundle, NDArray[np.uint8]]:
    """A whole ResNet50 with ImageNet's weights through layer3, and 20 real photographs at 128 x 128."""
    files = [
        folder / f"{folder.name}_0001.jpg"
        for folder in sorted((shared / "data" / "lfw").iterdir())[:: 5749 // 19]
    ]
    batch = np.stack([pixels.read(path, size=128, crop=0.6) for path in files])
    torch.manual_seed(0)
    weights = shared / "weights" / "resnet50-imagenet-through-layer3.safetensors"
    network, _ = build(62, weights=str(weights))
    made = export(
        network,
        tmp_path_factory.mktemp("models") / "resnet50",
        labels=tuple(f"person {number}" for number in range(62)),
        reader=PhotoReader(Preprocessing(size=128, crop=0.6)),
        recipe={},
        split={},
        figures={},
        sample=batch[:2],
    )
    return made, batch


def relative_difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The longest difference between two rows, as a share of the row's own length."""
    wide, reference = one.astype(np.float64), other.astype(np.float64)
    return float((np.linalg.norm(wide - reference, axis=1) / np.linalg.norm(reference, axis=1)).max())


def assert_agree(one: Embeddings, other: Embeddings) -> None:
    assert one.vectors.shape == other.vectors.shape
    assert relative_difference(one.vectors, other.vectors) < 1e-4
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-3, atol=1e-5)


def both(bundle: ModelBundle, batch: NDArray[np.uint8]) -> list[Embeddings]:
    return [Embedder.open(bundle, device="cpu", engine=engine).embed(batch) for engine in ENGINES]


def test_the_engines_agree_on_drawn_faces(bundle: ModelBundle, photos: NDArray[np.uint8]) -> None:
    assert_agree(*both(bundle, photos))


@pytest.mark.parametrize("level", [0, 255])
def test_the_engines_agree_on_black_and_on_white(bundle: ModelBundle, level: int) -> None:
    assert_agree(*both(bundle, np.full((2, 32, 32, 3), level, np.uint8)))


@pytest.mark.photographs
def test_the_engines_agree_on_real_photographs(real: tuple[ModelBundle, NDArray[np.uint8]]) -> None:
    bundle, batch = real
    assert len(batch) == 20
    one, other = both(bundle, batch)
    assert_agree(one, other)
    assert np.array_equal(one.probabilities.argmax(1), other.probabilities.argmax(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
def test_the_gpu_agrees_with_the_cpu(bundle: ModelBundle, photos: NDArray[np.uint8]) -> None:
    embedder = Embedder.open(bundle)
    assert (embedder.device, embedder.engine) == ("cuda", "torch")
    assert_agree(embedder.embed(photos), both(bundle, photos)[0])


@pytest.mark.photographs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
def test_the_gpu_agrees_with_the_cpu_on_real_photographs(
    real: tuple[ModelBundle, NDArray[np.uint8]],
) -> None:
    bundle, batch = real
    assert_agree(Embedder.open(bundle, device="cuda").embed(batch), both(bundle, batch)[0])


def test_answers_are_float32_rows_and_probabilities_sum_to_one(
    embedder: Embedder, photos: NDArray[np.uint8]
) -> None:
    answer = embedder.embed(photos[:5])
    assert (answer.vectors.shape, answer.vectors.dtype) == ((5, 2048), np.float32)
    assert (answer.probabilities.shape, answer.probabilities.dtype) == ((5, 6), np.float32)
    assert answer.probabilities.min() >= 0
    np.testing.assert_allclose(answer.probabilities.sum(1), 1, atol=1e-5)


def test_answers_are_the_networks(embedder: Embedder, network: Network, photos: NDArray[np.uint8]) -> None:
    answer = embedder.embed(photos)
    with torch.inference_mode():
        vectors, logits = network(torch.from_numpy(photos))
    assert_agree(answer, Embeddings(vectors.numpy(), torch.softmax(logits, 1).numpy()))


def test_different_photos_have_different_embeddings(embedder: Embedder, photos: NDArray[np.uint8]) -> None:
    """Far beyond rounding: agreement between engines would mean nothing otherwise."""
    vectors = embedder.embed(photos).vectors
    assert min(relative_difference(vectors[:1], other[None]) for other in vectors[1:]) > 1e-2


def test_a_batch_is_its_photos_one_by_one(embedder: Embedder, photos: NDArray[np.uint8]) -> None:
    together = embedder.embed(photos)
    alone = [embedder.embed(photo[None]) for photo in photos]
    assert relative_difference(together.vectors, np.concatenate([one.vectors for one in alone])) < 1e-5
    np.testing.assert_allclose(
        together.probabilities, np.concatenate([one.probabilities for one in alone]), rtol=1e-3, atol=1e-6
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="measured on x86-64 alone")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_onnxruntime_gives_a_photo_the_same_bits_in_any_batch_and_on_any_number_of_cores(
    bundle: ModelBundle, photos: NDArray[np.uint8], threads: int
) -> None:
    alone = Embedder.open(bundle, device="cpu", threads=1)
    expected = np.concatenate([alone.embed(photo[None]).vectors for photo in photos])
    with Embedder.open(bundle, device="cpu", threads=threads) as embedder:
        for size in (36, 17, 5, 2):
            parts = [embedder.embed(photos[start : start + size]) for start in range(0, len(photos), size)]
            assert np.array_equal(np.concatenate([part.vectors for part in parts]), expected)


@pytest.mark.photographs
@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_photographs_is_its_photographs_one_by_one(
    real: tuple[ModelBundle, NDArray[np.uint8]], engine: str
) -> None:
    bundle, batch = real
    embedder = Embedder.open(bundle, device="cpu", engine=engine)
    alone = np.concatenate([embedder.embed(photo[None]).vectors for photo in batch[:6]])
    assert relative_difference(embedder.embed(batch[:6]).vectors, alone) < 1e-5


def test_an_empty_batch_has_empty_answers(embedder: Embedder) -> None:
    answer = embedder.embed(np.empty((0, 32, 32, 3), np.uint8))
    assert (answer.vectors.shape, answer.vectors.dtype) == ((0, 2048), np.float32)
    assert (answer.probabilities.shape, answer.probabilities.dtype) == ((0, 6), np.float32)


@pytest.mark.parametrize("kind", ["read-only", "backwards", "strided", "fortran"])
def test_how_an_array_lies_in_memory_does_not_show(
    embedder: Embedder, photos: NDArray[np.uint8], kind: str
) -> None:
    plain = photos[:4].copy()
    expected = embedder.embed(plain)
    if kind == "read-only":
        view = plain.copy()
        view.flags.writeable = False
    elif kind == "backwards":
        view = plain[:, :, :, ::-1].copy()[:, :, :, ::-1]
    elif kind == "strided":
        view = np.repeat(plain, 2, axis=2)[:, :, ::2]
    else:
        view = np.asfortranarray(plain)
    assert np.array_equal(view, plain)
    answer = embedder.embed(view)
    assert np.array_equal(answer.vectors, expected.vectors)
    assert np.array_equal(plain, photos[:4])


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "float32 (1, 32, 32, 3)"),
        (np.zeros((1, 32, 32, 3), np.int8), "int8 (1, 32, 32, 3)"),
        (np.zeros((32, 32, 3), np.uint8), "uint8 (32, 32, 3)"),
        (np.zeros((1, 3, 32, 32), np.uint8), "uint8 (1, 3, 32, 32)"),
        (np.zeros((1, 32, 31, 3), np.uint8), "uint8 (1, 32, 31, 3)"),
        (np.zeros((1, 64, 64, 3), np.uint8), "uint8 (1, 64, 64, 3)"),
        (np.zeros((2, 32, 32), np.uint8), "uint8 (2, 32, 32)"),
        (np.zeros((2, 32, 32, 4), np.uint8), "uint8 (2, 32, 32, 4)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "uint8 (0, 8, 8, 3)"),
        (np.zeros(0, np.uint8), "uint8 (0,)"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_another_dtype_or_shape_is_an_input_error(embedder: Embedder, batch: NDArray[Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        embedder.embed(batch)
    assert str(caught.value) == f"This model takes uint8 pixels of shape (n, 32, 32, 3), not {said}."


def test_threads_share_an_embedder(embedder: Embedder, photos: NDArray[np.uint8]) -> None:
    expected = embedder.embed(photos[:8])
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda index: embedder.embed(photos[index : index + 1]), [*range(8)] * 4))
    for index, answer in enumerate(answers):
        row = expected.vectors[index % 8 : index % 8 + 1]
        assert relative_difference(answer.vectors, row) < 1e-5


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"device": "cpu"}, ("cpu", "onnxruntime")),
        ({"device": "cpu", "engine": "onnxruntime"}, ("cpu", "onnxruntime")),
        ({"device": "cpu", "engine": "torch"}, ("cpu", "torch")),
        ({"engine": "onnxruntime"}, ("cpu", "onnxruntime")),
        ({}, ("cuda", "torch") if torch.cuda.is_available() else ("cpu", "onnxruntime")),
    ],
    ids=["cpu", "cpu-onnxruntime", "cpu-torch", "onnxruntime", "auto"],
)
def test_the_engine_follows_the_device_unless_one_is_named(
    bundle: ModelBundle, options: dict[str, str], chosen: tuple[str, str]
) -> None:
    embedder = Embedder.open(bundle, **options)
    assert (embedder.device, embedder.engine) == chosen
    assert embedder.bundle is bundle


def refusal(bundle: ModelBundle, kind: type[Exception], **options: str) -> str:
    with pytest.raises(kind) as caught:
        Embedder.open(bundle, **options)
    return str(caught.value)


def test_an_unknown_engine_is_an_input_error(bundle: ModelBundle) -> None:
    assert refusal(bundle, InputError, engine="steam") == (
        "There is no engine steam; choose one of auto, onnxruntime, torch."
    )


@pytest.mark.parametrize("device", ["cuda:99", "abacus", ""])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_an_unknown_device_is_an_input_error(bundle: ModelBundle, device: str, engine: str) -> None:
    assert refusal(bundle, InputError, device=device, engine=engine) == (
        f"There is no device {device} here; use `device='auto'` or `device='cpu'`."
    )


def test_onnxruntime_does_not_pretend_to_run_on_a_gpu(bundle: ModelBundle) -> None:
    assert refusal(bundle, InputError, device="cuda", engine="onnxruntime") == (
        "The onnxruntime engine runs on the CPU, not on cuda; use the torch engine."
    )


FILE_OF = {"onnxruntime": "model.onnx", "torch": "model.safetensors"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", ["empty", "text", "half", "exchanged"])
def test_a_damaged_file_is_a_bundle_error(
    bundle: ModelBundle, tmp_path: Path, engine: str, damage: str
) -> None:
    copy = bundle.save(tmp_path / "copy")
    path = copy.folder / FILE_OF[engine]
    whole = path.read_bytes()
    other = copy.graph_path if engine == "torch" else copy.weights_path
    content = {
        "empty": b"",
        "text": b"not a model\n",
        "half": whole[: len(whole) // 2],
        "exchanged": other.read_bytes(),
    }[damage]
    path.write_bytes(content)
    assert refusal(copy, BundleError, device="cpu", engine=engine) == (
        f"{path} is not the file that bundle.json names; copy the model whole again."
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_file_is_a_bundle_error(bundle: ModelBundle, tmp_path: Path, engine: str) -> None:
    copy = bundle.save(tmp_path / "copy")
    path = copy.folder / FILE_OF[engine]
    path.unlink()
    assert refusal(copy, BundleError, device="cpu", engine=engine) == (
        f"{path} cannot be read (no such file or directory); copy the model whole again."
    )


def test_weights_for_other_labels_are_a_bundle_error(bundle: ModelBundle) -> None:
    fewer = replace(bundle, labels=bundle.labels[:-1])
    assert "model.safetensors cannot be loaded" in refusal(fewer, BundleError, device="cpu", engine="torch")


def test_an_architecture_of_a_newer_version_is_a_bundle_error(bundle: ModelBundle) -> None:
    newer = replace(bundle, architecture="resnet9000")
    assert refusal(newer, BundleError, device="cpu", engine="torch") == (
        "This version of faceprint has no architecture resnet9000; upgrade faceprint."
    )


def in_a_new_process(program: str, bundle: ModelBundle) -> str:
    """What a program prints that has `model`, the bundle, and `batch`, a black picture."""
    start = (
        "import sys, numpy as np\n"
        "from retrieval.models.bundle import ModelBundle\n"
        "from retrieval.models.embedder import Embedder\n"
        "model, batch = ModelBundle.load(sys.argv[1]), np.zeros((1, 32, 32, 3), np.uint8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + program, str(bundle.folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_embedding_on_the_cpu_imports_neither_torch_nor_training(bundle: ModelBundle) -> None:
    program = (
        "vectors = Embedder.open(model, device='cpu').embed(batch).vectors\n"
        "print(vectors.shape, sorted({'torch', 'torchvision', 'training'} & set(sys.modules)))\n"
    )
    assert in_a_new_process(program, bundle) == "(1, 2048) []"


def test_without_torch_the_torch_engine_says_how_to_install_it_and_the_default_works(
    bundle: ModelBundle,
) -> None:
    """None in sys.modules is how Python itself marks a package that cannot be imported."""
    program = (
        "sys.modules['torch'] = None\n"
        "print(Embedder.open(model).embed(batch).vectors.shape)\n"
        "from retrieval.errors import MissingDependency\n"
        "try:\n"
        "    Embedder.open(model, engine='torch', device='cpu')\n"
        "except MissingDependency as error:\n"
        "    print(error)\n"
    )
    assert in_a_new_process(program, bundle).splitlines() == [
        "(1, 2048)",
        "The torch engine needs torch; install it with pip install 'faceprint[gpu]', or use `device='cpu'`.",
    ]
