"""Reembedding: a second generation of vectors by another model, built beside the active one.

Every batch is durable by itself, so a run that was interrupted goes on where it stopped. The gallery goes
over to the new generation in one transaction, and can go back for as long as the old one is kept.
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

# Vectors that become durable together.
_COMMIT: Final = 512

# Faces whose neighbours are compared, and how many neighbours of each.
_SAMPLE: Final = 200
_NEIGHBOURS: Final = 10


@dataclass(frozen=True, slots=True)
class Drift:
    """How far another model's answers are from today's, on a sample of the gallery's own faces.

    Attributes:
        sample: how many faces were asked about.
        neighbours: how many of each one's nearest are compared.
        overlap: share of the nearest that are the same faces, on average.
        same_person_before, same_person_after: share of the faces with an identity whose nearest other face
            is the same person's; None where no face has one.
        distance_ratio: median distance to the nearest other face, after over before.
    """

    sample: int
    neighbours: int
    overlap: float
    same_person_before: float | None
    same_person_after: float | None
    distance_ratio: float | None


@dataclass(frozen=True, slots=True)
class Reembedded:
    """What embedding a gallery anew did.

    Attributes:
        embedded: vectors that this run added; those of an interrupted one were kept.
        faces: in the gallery.
        lost: faces whose photos cannot be read, are gone or have changed.
        drift: None where there was nothing to compare.
        switched: whether the new model answers from now on.
        interrupted: whether it was stopped; the same command goes on from there.
        reasons: of each lost face by its id, in words.
        unfetched: ids of the lost faces that have an address which was not allowed to be fetched. While there
            are any, the gallery stays with its model, whatever `give_up` says.
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
    """Embeds every face with another model, from its photo, and lets that model answer from then on.

    Args:
        vault: of the gallery; others may enroll, forget and search meanwhile.
        bundle: the other model.
        embedder: loads a model.
        switch: go over to the other model when every face has its vector; otherwise only get it ready.
        give_up: remove faces whose photos are gone or have changed, instead of staying with the old model.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.
        on_progress: called with the faces done and all of them.
        should_stop: asked after each batch.

    Raises:
        InputError: the model serves already, or a third generation would be needed.
        StorageError, GalleryBusy: what was embedded until then is kept for the next run.
    """
    generation = _target(vault, bundle)
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
            missing = [number for number in _missing(vault, reader, generation) if number not in lost]
        for start in range(0, len(missing), _COMMIT):
            for part in _embedded(vault, missing[start : start + _COMMIT], loaded, fetch=fetch):
                lost |= {face.id: face for face in part.lost}
                reasons |= part.reasons
                unfetched |= part.unfetched
                embedded += _add(vault, generation, part)
            on_progress(total - len(missing) + min(start + _COMMIT, len(missing)), total)
            if should_stop():
                return replace(done(), interrupted=True)
        with vault.store.read() as reader:
            drift = _drift(vault, reader, generation)
        if not switch or unfetched or (lost and not give_up):
            return done(drift)
        if _switch(vault, generation, lost):
            return done(drift, switched=True)


def other_model(vault: Vault) -> ModelBundle:
    """The model that does not serve: the former one, or one in the making.

    Raises:
        InputError: there is none.
    """
    with vault.store.read() as reader:
        return ModelBundle.load(vault.folder / _other(vault, reader).folder)


def drop_other(vault: Vault) -> int:
    """Deletes the generation that does not serve; returns how many vectors it had.

    Raises:
        InputError: there is none.
    """
    with vault.writing() as writer:
        generation = _other(vault, writer)
        segments = writer.segments(generation.id)
        writer.replace_segments([segment.id for segment in segments], [])
        writer.remove_generation(generation.id)
        rows = sum(segment.rows for segment in segments)
        vault.log(writer, "drop-generation", faces=rows, generation=generation.id)
    return rows


def _other(vault: Vault, reader: Reader) -> Generation:
    serving = vault.serving(reader)
    for generation in reader.generations().values():
        if generation.id != serving.id:
            return generation
    raise InputError(f"{vault.folder} has one model only; there is no other to go back to or to drop.")


def _target(vault: Vault, bundle: ModelBundle) -> Generation:
    """The generation of a model, made where it does not exist."""
    with vault.writing() as writer:
        serving = vault.serving(writer)
        if serving.fingerprint == bundle.fingerprint:
            raise InputError(f"{vault.folder} is searched with this model already; nothing is to be done.")
        for generation in writer.generations().values():
            if generation.fingerprint == bundle.fingerprint:
                return generation
        if len(writer.generations()) > 1:
            raise InputError(
                f"{vault.folder} keeps another model beside the one that serves; drop it first with "
                f"`faceprint reembed {vault.folder} --drop-other`."
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


def _ids(vault: Vault, reader: Reader, generation: Generation) -> Ids:
    """Every id that a generation has a vector of, ascending."""
    flat = vault.vectors(generation)
    parts = [flat.rows(segment.id)[0] for segment in reader.segments(generation.id)]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _missing(vault: Vault, reader: Reader, generation: Generation) -> list[int]:
    """Faces that a generation has no vector of."""
    faces = np.fromiter(reader.face_ids(), np.int64)
    return [int(number) for number in np.setdiff1d(faces, _ids(vault, reader, generation))]


def _embedded(vault: Vault, ids: Sequence[int], embedder: Embedder, *, fetch: bool) -> Iterator[Embedded]:
    with vault.store.read() as reader:
        faces, fetching = list(reader.faces(ids).values()), Fetching(fetch, reader.hosts())
    return embed_again(faces, embedder, fetching)


def _add(vault: Vault, generation: Generation, part: Embedded) -> int:
    """Makes vectors durable; of faces that were forgotten meanwhile none is kept. Returns how many."""
    with vault.writing() as writer:
        alive = np.fromiter(writer.faces(part.ids.tolist()), np.int64)
        kept = np.isin(part.ids, alive) & ~np.isin(part.ids, _ids(vault, writer, generation))
        if kept.any():
            checked = vault.vectors(generation).checked(part.vectors[kept])
            vault.append(writer, generation, part.ids[kept], checked)
    return int(kept.sum())


def _switch(vault: Vault, generation: Generation, lost: Mapping[int, Face]) -> bool:
    """Goes over to a generation, without the lost; says no where others were enrolled meanwhile."""
    with vault.writing() as writer:
        missing = _missing(vault, writer, generation)
        if set(missing) - lost.keys():
            return False
        before = vault.serving(writer)
        vault.remove(writer, missing)
        writer.set_gallery(generation_id=generation.id)
        numbers = {"generation": generation.id, "before": before.id, "given_up": len(missing)}
        vault.log(writer, "switch-model", faces=writer.count(), **numbers)
    return True


def _drift(vault: Vault, reader: Reader, generation: Generation) -> Drift | None:
    """Compares a generation's answers with today's, on faces that both have."""
    serving = vault.serving(reader)
    both = np.intersect1d(_ids(vault, reader, serving), _ids(vault, reader, generation))
    if len(both) < 2:
        return None
    sample = np.sort(np.random.default_rng(0).choice(both, min(_SAMPLE, len(both)), replace=False))
    found = [_neighbours(vault, reader, one, sample) for one in (serving, generation)]
    overlaps = [
        len(np.intersect1d(before, after)) / len(before)
        for (_, before), (_, after) in zip(*found, strict=True)
    ]
    same = [_same_person(reader, sample, [ids for _, ids in answers]) for answers in found]
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
    """The nearest other faces of each face of a sample: distances and ids."""
    flat = vault.vectors(generation)
    segments = [segment.id for segment in reader.segments(generation.id)]
    queries = np.empty((len(sample), generation.dimension), np.float32)
    for segment in segments:
        ids, matrix = flat.rows(segment)
        _, here, there = np.intersect1d(sample, ids, return_indices=True)
        queries[here] = matrix[there]
    answers = flat.search(segments, queries, _NEIGHBOURS + 1)
    return [
        (distances[ids != number][:_NEIGHBOURS], ids[ids != number][:_NEIGHBOURS])
        for number, (distances, ids) in zip(sample, answers, strict=True)
    ]


def _same_person(reader: Reader, sample: Ids, answers: Sequence[Ids]) -> float | None:
    """Share of the faces with an identity whose nearest other face is of the same one."""
    pairs = [(int(number), int(ids[0])) for number, ids in zip(sample, answers, strict=True)]
    faces = reader.faces({number for pair in pairs for number in pair})
    same = [
        faces[number].identity == faces[nearest].identity
        for number, nearest in pairs
        if faces[number].identity is not None
    ]
    return float(np.mean(same)) if same else None
