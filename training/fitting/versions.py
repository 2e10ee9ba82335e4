"""The versions that results depend on."""

import platform
from importlib.metadata import version

import retrieval


def versions() -> dict[str, str]:
    """Returns the versions of faceprint, Python and the packages that a result may depend on."""
    packages = ("torch", "torchvision", "onnx", "numpy", "pillow")
    return {
        "faceprint": retrieval.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
