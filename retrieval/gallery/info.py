"""Counts and sizes of a gallery, for `Gallery.info`."""

from dataclasses import dataclass
from typing import Any

from retrieval.database.identity_names import twins
from retrieval.gallery.active_model import ActiveModel


@dataclass(frozen=True)
class GalleryInfo:
    """Counts and sizes of a gallery; sizes in bytes.

    `twins` are identities with names that differ only in case, width, spaces or composition of accents.
    `coordinates` is the number of bytes of a code; 0 if codes do not pay, None if no quantizer was trained
    yet. `calibration` is the result of `Calibration.fields`; None if the gallery is not calibrated. `follows`
    says which published gallery it is a copy of, and how old: the result of `Follower.facts`; None for a
    gallery. `vectors` is the address of the vectors of a gallery in databases; None for one in a folder.
    """

    folder: str
    uuid: str
    created_at: str
    faces: int
    identities: int
    faces_without_identity: int
    files: int
    largest: tuple[tuple[str, int], ...]
    segments: int
    vector_bytes: int
    codes_bytes: int
    coded_faces: int
    coordinates: int | None
    database_bytes: int
    fingerprint: str
    other_fingerprint: str | None
    dimension: int
    classifier_labels: int
    input_size: int
    erasures: int
    calibration: dict[str, Any] | None = None
    twins: tuple[tuple[str, ...], ...] = ()
    follows: dict[str, Any] | None = None
    vectors: str | None = None


def gallery_info(model: ActiveModel) -> GalleryInfo:
    """Returns the counts and sizes of the gallery that `model` belongs to."""
    with model.vault.store.read() as reader:
        generation = model.refresh(reader)
        row, segments, identities = reader.gallery(), reader.segments(), reader.identities()
        others = [one for one in reader.generations().values() if one.id != generation.id]
        files, erasures = reader.file_count(), len(reader.receipts())
        coded, sizes = reader.codes(), model.vault.sizes(reader)
        bases = list(reader.bases(generation.id).values())
        calibration = model.vault.state(reader).calibration
        vectors = None if model.vault.in_folder else reader.vectors_address(generation.id)
    follower = model.vault.follower
    named = [(name, number) for name, number in identities if name is not None]
    return GalleryInfo(
        folder=model.vault.name,
        uuid=row.uuid,
        created_at=row.created_at,
        faces=sum(number for _, number in identities),
        identities=len(named),
        faces_without_identity=sum(number for name, number in identities if name is None),
        files=files,
        largest=tuple(named[:10]),
        segments=len(segments),
        vector_bytes=sizes.vectors,
        codes_bytes=sizes.codes,
        coded_faces=sum(
            one.rows for one in segments if one.generation_id == generation.id and one.id in coded
        ),
        coordinates=bases[-1].coordinates if bases else None,
        database_bytes=sizes.database,
        fingerprint=generation.fingerprint,
        other_fingerprint=others[0].fingerprint if others else None,
        dimension=generation.dimension,
        classifier_labels=len(model.bundle.labels),
        input_size=model.bundle.input_size,
        erasures=erasures,
        calibration=None if calibration is None else calibration.fields(),
        twins=twins(name for name, _ in named),
        follows=None if follower is None else follower.current().facts(),
        vectors=vectors,
    )
