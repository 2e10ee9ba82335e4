"""Reembedding, for `Gallery.reembed`: builds a second generation of vectors with another model.

Each batch is durable by itself, so an interrupted run resumes where it stopped. The gallery switches to the
new generation in one transaction, and can switch back as long as the old generation is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.database.reader import Reader
from retrieval.database.records import Face, Generation, utc_now
from retrieval.embedding.reread import Embedded, embed_again
from retrieval.errors import InputError
from retrieval.index.segments import Ids
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources.remote import Fetching
from retrieval.storage.layout import MODEL
from retrieval.storage.vault import Vault

# Faces between two calls of `on_progress` and `should_stop`. Each batch of `embed_again` among them is
# committed by itself.
_PROGRESS_FACES: Final = 512

# Faces in the sample of `Drift`, and nearest neighbours of each that are compared.
_SAMPLE_FACES: Final = 200
_COMPARED_NEIGHBOURS: Final = 10


@dataclass(frozen=True, slots=True)
class Drift:
    """The difference between the answers of two models, on a sample of the gallery's own faces.

    Attributes:
        sample: number of faces that were searched for.
        neighbours: number of nearest faces that are compared for each.
        overlap: mean share of the nearest faces that both models return.
        same_person_before, same_person_after: share of the faces with an identity for which the nearest other
            face has the same identity; None if no face has an identity.
        distance_ratio: median distance to the nearest other face, after divided by before; None if the
            median before is 0.
    """

    sample: int
    neighbours: int
    overlap: float
    same_person_before: float | None
    same_person_after: float | None
    distance_ratio: float | None


@dataclass(frozen=True, slots=True)
class Reembedded:
    """The result of reembedding a gallery.

    Attributes:
        embedded: number of vectors that this run added, without those of an interrupted run before it.
        faces: number of faces in the gallery.
        lost: faces without a usable photo: it cannot be read, is gone or has changed.
        drift: the difference between the models' answers; None if there was nothing to compare.
        switched: whether the new model is the active one now.
        interrupted: whether the run was stopped; the same command resumes it.
        reasons: why the photo of each lost face cannot be used, in words, by face id.
        unfetched: ids of the lost faces with an address that was not allowed to be fetched. While there are
            any, the gallery keeps its model, whatever `give_up` says.
    """

    embedded: int
    faces: int
    lost: tuple[Face, ...]
    drift: Drift | None
    switched: bool
    interrupted: bool = False
    reasons: Mapping[int, str] = field(default_factory=dict, hash=False)
    unfetched: frozenset[int] = frozenset()


def reembed(
    vault: Vault,
    bundle: ModelBundle,
    embedder: Callable[[ModelBundle], Embedder],
    *,
    switch: bool = True,
    give_up: bool = False,
    fetch: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Reembedded:
    """Embeds every face from its photo with another model and makes that model the active one.

    Args:
        vault: the gallery's; other threads and processes may enroll, forget and search meanwhile.
        bundle: the other model.
        embedder: loads a model.
        switch: make the other model the active one as soon as every face has its vector; otherwise only
            store the vectors.
        give_up: remove faces without a usable photo, instead of keeping the old model.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.
        on_progress: called after each batch with the number of faces done, and of all faces.
        should_stop: called after each batch; a true result interrupts the run.

    Returns:
        The result; also for a run that was interrupted, and for one that keeps the old model.

    Raises:
        InputError: the model is active already, or a third generation would be needed.
        StorageError, GalleryBusy: vectors that were committed before the error are kept for the next run.
    """
    generation = _target_generation(vault, bundle)
    loaded = embedder(ModelBundle.load(vault.folder / generation.folder))
    lost: dict[int, Face] = {}
    reasons: dict[int, str] = {}
    unfetched: set[int] = set()
    embedded = 0

    def done(drift: Drift | None = None, *, switched: bool = False) -> Reembedded:
        return Reembedded(
            embedded,
            total,
            tuple(lost.values()),
            drift,
            switched,
            reasons=reasons,
            unfetched=frozenset(unfetched),
        )

    while True:
        with vault.store.read() as reader:
            total = reader.count()
            missing = [number for number in _missing_ids(vault, reader, generation) if number not in lost]
        for start in range(0, len(missing), _PROGRESS_FACES):
            for part in _embed_batch(vault, missing[start : start + _PROGRESS_FACES], loaded, fetch=fetch):
                lost |= {face.id: face for face in part.lost}
                reasons |= part.reasons
                unfetched |= part.unfetched
                embedded += _add_vectors(vault, generation, part)
            on_progress(total - len(missing) + min(start + _PROGRESS_FACES, len(missing)), total)
            if should_stop():
                return replace(done(), interrupted=True)
        with vault.store.read() as reader:
            drift = _drift(vault, reader, generation)
        if not switch or unfetched or (lost and not give_up):
            return done(drift)
        if _switch(vault, generation, lost):
            return done(drift, switched=True)


def other_model(vault: Vault) -> ModelBundle:
    """Returns the model that is not active: the former one, or one that is not complete yet.

    Raises:
        InputError: the gallery has one model only.
    """
    with vault.store.read() as reader:
        return ModelBundle.load(vault.folder / _inactive_generation(vault, reader).folder)


def drop_other(vault: Vault) -> int:
    """Deletes the generation that is not active; returns how many vectors it had.

    Raises:
        InputError: the gallery has one model only.
    """
    with vault.writing() as writer:
        generation = _inactive_generation(vault, writer)
        segments = writer.segments(generation.id)
        writer.replace_segments([segment.id for segment in segments], [])
        writer.remove_generation(generation.id)
        rows = sum(segment.rows for segment in segments)
        vault.log(writer, "drop-generation", faces=rows, generation=generation.id)
    return rows


def _inactive_generation(vault: Vault, reader: Reader) -> Generation:
    serving = vault.serving(reader)
    for generation in reader.generations().values():
        if generation.id != serving.id:
            return generation
    raise InputError(f"{vault.folder} has one model only; there is no other to go back to or to drop.")


def _target_generation(vault: Vault, bundle: ModelBundle) -> Generation:
    """The generation of a model; created if it does not exist.

    Raises:
        InputError: the model is active already, or a third generation would be needed.
    """
    with vault.writing() as writer:
        serving = vault.serving(writer)
        if serving.fingerprint == bundle.fingerprint:
            raise InputError(f"{vault.folder} is searched with this model already; nothing is to be done.")
        for generation in writer.generations().values():
            if generation.fingerprint == bundle.fingerprint:
                return generation
        if len(writer.generations()) > 1:
            raise InputError(
                f"{vault.folder} keeps another model beside the active one; drop it first with "
                "`drop_other_model`."
            )
        number = writer.gallery().next_generation_id
        folder = f"{MODEL}-{number}"
        copy = bundle.save(vault.folder / folder, inherit=True)
        generation = Generation(
            number, bundle.fingerprint, bundle.dimension, folder, copy.card_sha256(), utc_now()
        )
        writer.add_generation(generation)
        vault.log(writer, "reembed", generation=number)
    return generation


def _embedded_ids(vault: Vault, reader: Reader, generation: Generation) -> Ids:
    """The ids of all faces with a vector in a generation, ascending."""
    flat = vault.vectors(generation)
    parts = [flat.rows(segment.id)[0] for segment in reader.segments(generation.id)]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _missing_ids(vault: Vault, reader: Reader, generation: Generation) -> list[int]:
    """The ids of the faces without a vector in a generation, ascending."""
    faces = np.fromiter(reader.face_ids(), np.int64)
    return [int(number) for number in np.setdiff1d(faces, _embedded_ids(vault, reader, generation))]


def _embed_batch(vault: Vault, ids: Sequence[int], embedder: Embedder, *, fetch: bool) -> Iterator[Embedded]:
    with vault.store.read() as reader:
        faces, fetching = list(reader.faces(ids).values()), Fetching(fetch, reader.hosts())
        shared = reader.in_shared_photos(ids)
    return embed_again(faces, embedder, fetching, shared=shared)


def _add_vectors(vault: Vault, generation: Generation, part: Embedded) -> int:
    """Commits new vectors, except those of faces that were erased meanwhile; returns how many were added."""
    with vault.writing() as writer:
        existing = np.fromiter(writer.faces(part.ids.tolist()), np.int64)
        kept = np.isin(part.ids, existing) & ~np.isin(part.ids, _embedded_ids(vault, writer, generation))
        if kept.any():
            checked = vault.vectors(generation).checked(part.vectors[kept])
            vault.append(writer, generation, part.ids[kept], checked)
    return int(kept.sum())


def _switch(vault: Vault, generation: Generation, lost: Mapping[int, Face]) -> bool:
    """Makes a generation the active one and removes lost faces.

    Returns False, without a change, if other faces without a vector were enrolled meanwhile.
    """
    with vault.writing() as writer:
        missing = _missing_ids(vault, writer, generation)
        if set(missing) - lost.keys():
            return False
        before = vault.serving(writer)
        vault.remove(writer, missing)
        writer.set_gallery(generation_id=generation.id)
        numbers = {"generation": generation.id, "before": before.id, "given_up": len(missing)}
        vault.log(writer, "switch-model", faces=writer.count(), **numbers)
    return True


def _drift(vault: Vault, reader: Reader, generation: Generation) -> Drift | None:
    """Compares the answers of a generation and the active one, on faces with vectors in both.

    Returns None if there are fewer than 2 such faces.
    """
    serving = vault.serving(reader)
    both = np.intersect1d(_embedded_ids(vault, reader, serving), _embedded_ids(vault, reader, generation))
    if len(both) < 2:
        return None
    sample = np.sort(np.random.default_rng(0).choice(both, min(_SAMPLE_FACES, len(both)), replace=False))
    found = [_neighbours(vault, reader, one, sample) for one in (serving, generation)]
    overlaps = [
        len(np.intersect1d(before, after)) / len(before)
        for (_, before), (_, after) in zip(*found, strict=True)
    ]
    same = [_same_person_share(reader, sample, [ids for _, ids in answers]) for answers in found]
    nearest = [float(np.median([distances[0] for distances, _ in answers])) for answers in found]
    return Drift(
        sample=len(sample),
        neighbours=len(found[0][0][1]),
        overlap=float(np.mean(overlaps)),
        same_person_before=same[0],
        same_person_after=same[1],
        distance_ratio=nearest[1] / nearest[0] if nearest[0] else None,
    )


def _neighbours(
    vault: Vault, reader: Reader, generation: Generation, sample: Ids
) -> list[tuple[NDArray[np.float64], Ids]]:
    """The distances and ids of the nearest other faces of each face in a sample."""
    flat = vault.vectors(generation)
    segments = [segment.id for segment in reader.segments(generation.id)]
    queries = np.empty((len(sample), generation.dimension), np.float32)
    for segment in segments:
        ids, matrix = flat.rows(segment)
        _, here, there = np.intersect1d(sample, ids, return_indices=True)
        queries[here] = matrix[there]
    answers = flat.search(segments, queries, _COMPARED_NEIGHBOURS + 1)
    return [
        (distances[ids != number][:_COMPARED_NEIGHBOURS], ids[ids != number][:_COMPARED_NEIGHBOURS])
        for number, (distances, ids) in zip(sample, answers, strict=True)
    ]


def _same_person_share(reader: Reader, sample: Ids, answers: Sequence[Ids]) -> float | None:
    """The share of faces with an identity for which the nearest other face has the same one."""
    pairs = [(int(number), int(ids[0])) for number, ids in zip(sample, answers, strict=True)]
    faces = reader.faces({number for pair in pairs for number in pair})
    same = [
        faces[number].identity == faces[nearest].identity
        for number, nearest in pairs
        if faces[number].identity is not None
    ]
    return float(np.mean(same)) if same else None
