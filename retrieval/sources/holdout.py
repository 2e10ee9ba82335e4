"""The holdout: which photos of each identity a training leaves out. A pure function that needs no torch."""

import hashlib

import numpy as np


def held_out(identity: str, number: int, fraction: float, seed: int) -> frozenset[int]:
    """Returns which of an identity's photos are held out; random, but fixed by the arguments.

    The random permutation depends on the seed and the identity's name alone.

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
