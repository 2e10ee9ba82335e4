"""Opens the face detector that a user names: a file, or one that is downloaded."""

import os
from pathlib import Path
from typing import Final

from retrieval.errors import InputError, RunError
from retrieval.images.face_detector import FaceDetector
from retrieval.system import download
from retrieval.system.files import open_plain, why

# OpenCV zoo's face_detection_yunet_2023mar.onnx (Wu et al., "YuNet: a tiny millisecond-level face detector",
# 2023; MIT licence).
YUNET: Final = "yunet"
YUNET_URL: Final = (
    "https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/"
    "face_detection_yunet_2023mar.onnx"
)
YUNET_SHA256: Final = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"

# The largest file of a detector in bytes; YuNet has 232,589.
_MAX_BYTES: Final = 64 * 2**20


def open_detector(detector: str | os.PathLike[str], *, url: str = YUNET_URL) -> FaceDetector:
    """Returns a face detector.

    Args:
        detector: the path of an ONNX file of the YuNet family, or "yunet": OpenCV zoo's file of 2023, which
            is downloaded once and kept in the cache folder.
        url: where "yunet" is downloaded from; the file must have the same SHA-256.

    Raises:
        InputError: there is no such file, or it is not such a detector.
        RunError: the download failed.
    """
    if detector == YUNET:
        return FaceDetector(_yunet(url), YUNET)
    path = Path(detector)
    try:
        with open_plain(path) as file:
            graph = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"The face detector {path} cannot be read ({why(error)}); give `detector='{YUNET}'` or the path "
            "of an ONNX file."
        ) from error
    if len(graph) > _MAX_BYTES:
        raise InputError(f"{path} is too large for a face detector; name another file.")
    return FaceDetector(graph, str(path))


def _yunet(url: str) -> bytes:
    try:
        return download.fetch(url, sha256=YUNET_SHA256, most=_MAX_BYTES)
    except download.Failed as error:
        raise RunError(
            f"The face detector YuNet cannot be downloaded ({error}); get {url} in another way and give its "
            "path as `detector`."
        ) from error
