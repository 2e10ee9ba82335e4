"""Optimizing: a basis is learned from a gallery's vectors, and its segments get codes in it."""

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

# From how many faces on it is worth learning a basis, and after which growth learning another.
OPTIMIZE_FROM = 4096
_GROWTH: Final = 4

# How many vectors a basis is learned from, and how many segments get their codes in one transaction.
_SAMPLE: Final = 8192
_SEGMENTS_PER_TRANSACTION: Final = 16


@dataclass(frozen=True, slots=True)
class Optimized:
    """What optimizing did.

    Attributes:
        coordinates: bytes of a code; 0 where codes do not pay, None where there are too few faces to learn.
        learned: whether a basis was learned, or found not to pay, this time.
        encoded: vector files that got their codes.
    """

    coordinates: int | None
    learned: bool
    encoded: int


def optimize(vault: Vault, *, anew: bool = False) -> Optimized:
    """Makes searches of the serving model's vectors quick: learns a basis if that is due, and encodes.

    Answers are the same before, meanwhile and afterwards. Interrupted, it goes on where it stopped.

    Args:
        anew: learn another basis, whether due or not.

    Raises:
        StorageError, GalleryBusy: what was encoded before stays so.
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
    """Some vectors of a generation, spread over all of them; the same for the same vectors."""
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
    """Learns a basis and makes it the newest of a generation; without one that pays, none has codes."""
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
    """Gives every segment codes in a basis, then older bases go; returns how many it gave."""
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
