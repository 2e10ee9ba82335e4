"""Optimization: learns a basis from a gallery's vectors, and encodes its segments in it."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from retrieval.database.reader import Reader
from retrieval.database.records import BasisRow, Generation, utc_now
from retrieval.index import quantization
from retrieval.index.segments import Vectors
from retrieval.storage import codes
from retrieval.storage.vault import Vault

# The least number of faces for learning a basis, and the factor of growth after which another is learned.
OPTIMIZE_FROM = 4096
_GROWTH: Final = 4

# The most vectors that a basis is learned from, and the most segments that one transaction encodes.
_SAMPLE: Final = 8192
_SEGMENTS_PER_TRANSACTION: Final = 16


@dataclass(frozen=True, slots=True)
class Optimized:
    """The result of an optimization.

    Attributes:
        coordinates: bytes of a code; 0 where codes do not pay, None where there are too few faces to learn.
        learned: whether this call learned a basis, or found that none pays.
        encoded: the number of segments that were encoded.
    """

    coordinates: int | None
    learned: bool
    encoded: int


def optimize(vault: Vault, *, anew: bool = False) -> Optimized:
    """Speeds up searches of the serving generation: learns a basis if one is due, and encodes segments.

    Search results are the same before, during and after. A call after an interruption continues the work.

    Args:
        vault: the gallery.
        anew: learn another basis, whether due or not.

    Raises:
        StorageError, GalleryBusy: the work stopped; segments encoded so far keep their codes.
    """
    with vault.store.read() as reader:
        generation = vault.serving(reader)
        basis = codes.newest_basis(reader, generation)
        rows = sum(segment.rows for segment in reader.segments(generation.id))
    learned = rows > 1 and (anew or rows >= max(OPTIMIZE_FROM, _GROWTH * (basis.rows if basis else 0)))
    if learned:
        sample = vault.on_a_snapshot(lambda reader: _sample(vault, reader, generation))
        basis = _learn(vault, generation, sample, rows)
    if basis is None:
        return Optimized(None, learned, 0)
    return Optimized(basis.coordinates, learned, _encode_all(vault, generation, basis))


def _sample(vault: Vault, reader: Reader, generation: Generation) -> Vectors:
    """Returns a random sample of a generation's vectors, at most 8,192; the same for the same vectors."""
    flat, segments = vault.vectors(generation), reader.segments(generation.id)
    rows = sum(segment.rows for segment in segments)
    chosen = np.random.default_rng(0).choice(rows, min(_SAMPLE, rows), replace=False)
    chosen.sort()
    parts, first = [np.empty((0, generation.dimension), np.float32)], 0
    for segment in segments:
        mine = chosen[(chosen >= first) & (chosen < first + segment.rows)] - first
        parts.append(flat.rows(segment.id)[1][mine])
        first += segment.rows
    return np.concatenate(parts)


def _learn(vault: Vault, generation: Generation, sample: Vectors, rows: int) -> BasisRow:
    """Learns a basis and stores it as the newest of a generation; an empty one where none pays."""
    found = quantization.learn(sample)
    data = found.basis.data() if found.basis is not None else b""
    with vault.writing() as writer:
        number = writer.gallery().next_basis_id
        if found.basis is not None:
            quantization.write_file(vault.vectors(generation).basis_path(number), data)
        row = BasisRow(
            number,
            generation.id,
            rows,
            found.basis.coordinates if found.basis is not None else 0,
            len(data),
            hashlib.sha256(data).hexdigest(),
            utc_now(),
            {
                "sample": len(sample),
                "scan_cost": found.scan_cost,
                "trials": [asdict(trial) for trial in found.trials],
            },
        )
        if generation.id in writer.generations():
            writer.add_basis(row)
        vault.log(writer, "optimize", coordinates=row.coordinates, sample=len(sample))
    return row


def _encode_all(vault: Vault, generation: Generation, basis: BasisRow) -> int:
    """Encodes all segments in a basis, then removes older bases; returns the number of encoded segments."""
    with vault.store.read() as reader:
        encoded_in_it = {one.segment_id for one in reader.codes().values() if one.basis_id == basis.id}
        lacking = [
            segment.id
            for segment in reader.segments(generation.id)
            if segment.rows >= codes.CODES_FROM and segment.id not in encoded_in_it
        ]
        older = [number for number in reader.bases(generation.id) if number != basis.id]
    encoded = 0
    for start in range(0, len(lacking) if basis.coordinates else 0, _SEGMENTS_PER_TRANSACTION):
        with vault.writing() as writer:
            alive = {segment.id: segment for segment in writer.segments(generation.id)}
            for number in lacking[start : start + _SEGMENTS_PER_TRANSACTION]:
                if number in alive and basis.id in writer.bases(generation.id):
                    flat = vault.vectors(generation)
                    rows = flat.stored(number, alive[number].rows, alive[number].sha256)
                    made = codes.encode(flat, codes.Coding(basis, {}), number, [rows])
                    if made is not None:
                        writer.set_codes(made)
                        encoded += 1
    if older:
        with vault.writing() as writer:
            writer.remove_bases(older)
    return encoded
