"""Calibration of a classifier's probabilities (Guo et al., 2017): pure functions on arrays."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

BINS: Final = 15

# ONNX's softmax returns 0 below float32's range; the logarithm needs a positive number.
_MIN_PROBABILITY: Final = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: photos binned by probability, in bins (low, high] of equal width.

    The first bin includes its lower edge.

    Attributes:
        edges: (bins + 1,).
        counts: (bins,) number of photos.
        confidence: (bins,) mean probability; NaN for an empty bin.
        accuracy: (bins,) share of right predictions; NaN for an empty bin.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def bin_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the bin (n,) of each probability (n,), from 0 to 14."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Reliability:
    """Returns the reliability diagram of n predictions: their probability (n,), and whether right (n,)."""
    number = bin_of(confidence)
    counts = np.bincount(number, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(number, confidence, BINS) / counts
        accuracy = np.bincount(number, right, BINS) / counts
    return Reliability(np.linspace(0, 1, BINS + 1), counts, mean, accuracy)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Returns the expected calibration error: the mean over photos of |accuracy - confidence| of their bin.

    NaN without photos.
    """
    if not len(confidence):
        return float("nan")
    gaps = np.bincount(bin_of(confidence), right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def at_temperature(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Returns the probabilities (n, c) that softmax gives if the logits are divided by `temperature`."""
    logits = np.log(np.maximum(probabilities.astype(np.float64), _MIN_PROBABILITY)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def losses(probabilities: NDArray[np.float64], actual: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the negative log-likelihood (n,), in nats, of true labels (n,) under probabilities (n, c)."""
    own = np.take_along_axis(probabilities, actual[:, None], axis=1)[:, 0]
    return np.asarray(-np.log(np.maximum(own, _MIN_PROBABILITY)))


def fitted_temperature(probabilities: NDArray[np.float32], actual: NDArray[np.int64]) -> float:
    """Returns the temperature, from 1/20 to 20, that minimises the mean loss of n >= 1 predictions (n, c)."""
    limit = np.log(20)
    found = minimize_scalar(
        lambda log: losses(at_temperature(probabilities, float(np.exp(log))), actual).mean(),
        bounds=(-limit, limit),
        method="bounded",
    )
    return float(np.exp(found.x))
