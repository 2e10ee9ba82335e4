"""Parts of the benchmarks' galleries: a model that never runs, and faces of photos that do not exist."""

import hashlib
from pathlib import Path

import numpy as np

from retrieval.database.records import NewFace
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle


def model(folder: Path, dimension: int) -> ModelBundle:
    """Makes a bundle for the gallery to copy; it cannot embed."""
    return ModelBundle.create(
        folder,
        tensors={"none": np.zeros(1, np.float32)},
        graph=b"never run",
        architecture="none",
        labels=("nobody",),
        preprocessing=Preprocessing(size=32, crop=1.0),
        dimension=dimension,
        recipe={},
        split={},
        figures={},
        versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )


def faces(first: int, count: int, *, kind: str = "bulk", identity: str | None = None) -> list[NewFace]:
    """Returns faces with 20 photos a person, or all of `identity`, at paths of realistic length."""
    return [
        NewFace(
            identity or f"Person {number // 20:06d}",
            f"/data/photos/{kind}/Person_{number // 20:06d}/Photo_{number // 20:06d}_{number % 20:04d}.jpg",
            hashlib.sha256(f"{kind} {number}".encode()).hexdigest(),
        )
        for number in range(first, first + count)
    ]
