"""Whether a classifier's probabilities mean what they say: pure functions on arrays (Guo et al., 2017)."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

BINS: Final = 15

# ONNX's softmax gives 0 where float32 ends.
_LEAST: Final = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Reliability:
    """Photos by their probability, in bins of equal width: (low, high], the first with its low end.

    Attributes:
        edges: (bins + 1,).
        counts: (bins,) how many.
        confidence: (bins,) mean probability; NaN where there is none.
        accuracy: (bins,) share that is right; NaN where there is none.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def bin_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin (n,) of each probability (n,), out of 15."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Reliability:
    """The reliability diagram of n predictions: their probability (n,), and whether they were right (n,)."""
    number = bin_of(confidence)
    counts = np.bincount(number, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(number, confidence, BINS) / counts
        accuracy = np.bincount(number, right, BINS) / counts
    return Reliability(np.linspace(0, 1, BINS + 1), counts, mean, accuracy)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Expected calibration error: mean over photos of their bin's |accuracy - confidence|; NaN for none."""
    if not len(confidence):
        return float("nan")
    gaps = np.bincount(bin_of(confidence), right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def at_temperature(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """What softmax (n, c) would have given had its logits been divided by `temperature`."""
    logits = np.log(np.maximum(probabilities.astype(np.float64), _LEAST)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def losses(probabilities: NDArray[np.float64], actual: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood (n,) of the true labels (n,) under probabilities (n, c), in nats."""
    own = np.take_along_axis(probabilities, actual[:, None], axis=1)[:, 0]
    return np.asarray(-np.log(np.maximum(own, _LEAST)))


def fitted_temperature(probabilities: NDArray[np.float32], actual: NDArray[np.int64]) -> float:
    """The temperature, from 1/20 to 20, at which the loss of n >= 1 predictions (n, c) is least."""
    limit = np.log(20)
    found = minimize_scalar(
        lambda log: losses(at_temperature(probabilities, float(np.exp(log))), actual).mean(),
        bounds=(-limit, limit),
        method="bounded",
    )
    return float(np.exp(found.x))
