"""Reembedding, for `Gallery.reembed`: builds a second generation of vectors with another model.

A generation is a model of the gallery and the vectors that it made of the faces. A gallery has one that is
searched (`Vault.serving`), and beside it at most one other: a new one that is not complete yet, or the former
one, which is kept to go back to.

Each batch is durable by itself, so an interrupted run resumes where it stopped. The gallery switches to the
new generation in one transaction, and can switch back as long as the old generation is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

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

# Other faces near a face: distances, Euclidean, and ids.
_Others: TypeAlias = tuple[NDArray[np.float64], Ids]


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
    run = _Run(vault, _target_generation(vault, bundle), embedder, fetch=fetch)
    while True:
        if not run.embed_missing(on_progress, should_stop):
            return run.result(interrupted=True)
        with vault.store.read() as reader:
            drift = _drift(vault, reader, run.generation)
        if not switch or run.unfetched or (run.lost and not give_up):
            return run.result(drift)
        if _switch(vault, run.generation, run.lost):
            return run.result(drift, switched=True)
        # Faces were enrolled since the last look: they need vectors too.


class _Run:
    """A run that gives every face of a gallery a vector in a generation.

    Attributes:
        generation: of the other model.
        lost: the faces without a usable photo that were found so far, by id.
        unfetched: ids of the lost faces with an address that was not allowed to be fetched.
    """

    def __init__(
        self,
        vault: Vault,
        generation: Generation,
        embedder: Callable[[ModelBundle], Embedder],
        *,
        fetch: bool,
    ) -> None:
        """Loads the model of the generation; for the arguments see `reembed`."""
        self.generation = generation
        self.lost: dict[int, Face] = {}
        self.unfetched: set[int] = set()
        self._vault = vault
        self._embedder = embedder(ModelBundle.load(vault.folder / generation.folder))
        self._fetch = fetch
        self._reasons: dict[int, str] = {}
        self._embedded = 0
        self._total = 0

    def embed_missing(self, on_progress: Callable[[int, int], None], should_stop: Callable[[], bool]) -> bool:
        """Embeds the faces without a vector that are not known to be lost; returns False if stopped."""
        with self._vault.store.read() as reader:
            self._total = reader.count()
            missing = _missing_ids(self._vault, reader, self.generation)
        missing = [face_id for face_id in missing if face_id not in self.lost]
        done = self._total - len(missing)
        for start in range(0, len(missing), _PROGRESS_FACES):
            ids = missing[start : start + _PROGRESS_FACES]
            self._embed(ids)
            done += len(ids)
            on_progress(done, self._total)
            if should_stop():
                return False
        return True

    def _embed(self, ids: Sequence[int]) -> None:
        with self._vault.store.read() as reader:
            faces, fetching = list(reader.faces(ids).values()), Fetching(self._fetch, reader.hosts())
            shared = reader.in_shared_photos(ids)
        for batch in embed_again(faces, self._embedder, fetching, shared=shared):
            self.lost |= {face.id: face for face in batch.lost}
            self._reasons |= batch.reasons
            self.unfetched |= batch.unfetched
            self._embedded += _add_vectors(self._vault, self.generation, batch)

    def result(
        self, drift: Drift | None = None, *, switched: bool = False, interrupted: bool = False
    ) -> Reembedded:
        """Returns the result of the run so far."""
        return Reembedded(
            self._embedded,
            self._total,
            tuple(self.lost.values()),
            drift,
            switched,
            interrupted,
            reasons=self._reasons,
            unfetched=frozenset(self.unfetched),
        )


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
    raise InputError(f"{vault.name} has one model only; there is no other to go back to or to drop.")


def _target_generation(vault: Vault, bundle: ModelBundle) -> Generation:
    """Returns the generation of a model; creates it if it does not exist.

    Raises:
        InputError: the model is active already, or a third generation would be needed.
    """
    with vault.writing() as writer:
        serving = vault.serving(writer)
        if serving.fingerprint == bundle.fingerprint:
            raise InputError(f"{vault.name} is searched with this model already; nothing is to be done.")
        for generation in writer.generations().values():
            if generation.fingerprint == bundle.fingerprint:
                return generation
        if len(writer.generations()) > 1:
            raise InputError(
                f"{vault.name} keeps another model beside the active one; drop it first with "
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
    """Returns the ids of all faces with a vector in a generation, ascending."""
    flat = vault.vectors(generation)
    parts = [flat.rows(segment.id)[0] for segment in reader.segments(generation.id)]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _missing_ids(vault: Vault, reader: Reader, generation: Generation) -> list[int]:
    """Returns the ids of the faces without a vector in a generation, ascending."""
    faces = np.fromiter(reader.face_ids(), np.int64)
    missing: list[int] = np.setdiff1d(faces, _embedded_ids(vault, reader, generation)).tolist()
    return missing


def _add_vectors(vault: Vault, generation: Generation, batch: Embedded) -> int:
    """Commits new vectors; returns how many were added.

    Vectors of faces that were erased meanwhile, or that another run embedded meanwhile, are left out.
    """
    with vault.writing() as writer:
        existing = np.fromiter(writer.faces(batch.ids.tolist()), np.int64)
        kept = np.isin(batch.ids, existing) & ~np.isin(batch.ids, _embedded_ids(vault, writer, generation))
        if kept.any():
            checked = vault.vectors(generation).checked(batch.vectors[kept])
            vault.append(writer, generation, batch.ids[kept], checked)
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
    before = _nearest_others(vault, reader, serving, sample)
    after = _nearest_others(vault, reader, generation, sample)
    overlaps = [
        len(np.intersect1d(ids_before, ids_after)) / len(ids_before)
        for (_, ids_before), (_, ids_after) in zip(before, after, strict=True)
    ]
    median_before, median_after = _median_nearest(before), _median_nearest(after)
    return Drift(
        sample=len(sample),
        neighbours=len(before[0][1]),
        overlap=float(np.mean(overlaps)),
        same_person_before=_same_person_share(reader, sample, before),
        same_person_after=_same_person_share(reader, sample, after),
        distance_ratio=median_after / median_before if median_before else None,
    )


def _nearest_others(vault: Vault, reader: Reader, generation: Generation, sample: Ids) -> list[_Others]:
    """Returns the distances and ids of the nearest other faces of each face in a sample, nearest first."""
    flat = vault.vectors(generation)
    segments = [segment.id for segment in reader.segments(generation.id)]
    queries = np.empty((len(sample), generation.dimension), np.float32)
    for segment in segments:
        ids, matrix = flat.rows(segment)
        _, in_sample, in_segment = np.intersect1d(sample, ids, return_indices=True)
        queries[in_sample] = matrix[in_segment]
    # One more than is compared: the face itself is among them.
    answers = flat.search(segments, queries, _COMPARED_NEIGHBOURS + 1)
    return [
        (distances[ids != face_id][:_COMPARED_NEIGHBOURS], ids[ids != face_id][:_COMPARED_NEIGHBOURS])
        for face_id, (distances, ids) in zip(sample, answers, strict=True)
    ]


def _median_nearest(others: Sequence[_Others]) -> float:
    """Returns the median distance to the nearest other face."""
    return float(np.median([distances[0] for distances, _ in others]))


def _same_person_share(reader: Reader, sample: Ids, others: Sequence[_Others]) -> float | None:
    """Returns the share of faces with an identity for which the nearest other face has the same one."""
    pairs = [(int(face_id), int(ids[0])) for face_id, (_, ids) in zip(sample, others, strict=True)]
    faces = reader.faces({face_id for pair in pairs for face_id in pair})
    same = [
        faces[face_id].identity == faces[nearest].identity
        for face_id, nearest in pairs
        if faces[face_id].identity is not None
    ]
    return float(np.mean(same)) if same else None
