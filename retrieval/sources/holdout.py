"""The holdout: which photos of each identity are held out. Pure, and importable without torch."""

import hashlib

import numpy as np


def held_out(identity: str, number: int, fraction: float, seed: int) -> frozenset[int]:
    """Which of an identity's photos are validation: a function of the seed and the identity alone.

    Args:
        identity: its name.
        number: how many readable photos it has, at least 2.
        fraction: share to hold out, rounded to the nearest photo, at least one and never all.
        seed: of the split.

    Returns:
        Indices into the identity's readable photos, in the order in which the folder is walked.
    """
    name_seed = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big")
    order = np.random.default_rng([seed, name_seed]).permutation(number)
    wanted = round(fraction * number)
    return frozenset(order[: min(max(wanted, 1), number - 1)].tolist())
