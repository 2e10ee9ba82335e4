"""Repair of a damaged gallery, for `Gallery.repair` and for galleries that can no longer be opened.

A repair never guesses. A vector is restored from its own photo, if the photo still has its stored SHA-256, or
from a segment of a backup that has the SHA-256 of the segment's row.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from retrieval.database import page_checksums
from retrieval.database.records import Face, Generation
from retrieval.embedding.reread import Embedded, embed_again
from retrieval.errors import BundleError, GalleryDamaged, InputError, StorageError
from retrieval.gallery import suspects
from retrieval.gallery.integrity import (
    Notebook,
    Trouble,
    Verification,
    check_codes,
    check_models,
    check_rows,
    hash_file,
    quiet,
    read_segments,
    verify,
)
from retrieval.index.segments import Ids, basis_name, codes_name
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources.remote import Fetching
from retrieval.storage import leftovers, optimization
from retrieval.storage.backup_contents import files_by_sha256
from retrieval.storage.following import FollowerCard
from retrieval.storage.layout import DATABASE, VECTORS
from retrieval.storage.vault import Vault
from retrieval.system.files import make_folder, make_room, why, write_durably


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of a repair: the damage before and after it, and the faces that were not repaired.

    Attributes:
        before, after: the integrity checks before and after the repair.
        embedded: number of vectors that were embedded again from photos.
        copied: number of files that were copied from the backup or the model.
        given_up: number of faces that were removed because their vectors are unrecoverable.
        lost: faces with unrecoverable vectors; their rows were left unchanged.
        reasons: why the photo of each lost face cannot be used, in words, by face id.
        unfetched: ids of the lost faces with an address that was not allowed to be fetched. While there are
            any, no vector is repaired and no face is removed.
        suspects: number of faces that a damaged model may have embedded: enrolled since the last comparison.
        compared: number of suspects that were embedded again and compared.
        replaced: number of suspects with a vector that differed and was replaced by the new embedding.
    """

    before: Verification
    after: Verification
    embedded: int
    copied: int
    given_up: int
    lost: tuple[Face, ...]
    reasons: Mapping[int, str] = field(default_factory=dict, hash=False)
    unfetched: tuple[int, ...] = ()
    suspects: int = 0
    compared: int = 0
    replaced: int = 0


def repair(
    folder: str | os.PathLike[str],
    *,
    backup: str | os.PathLike[str] | None = None,
    model: ModelBundle | None = None,
    give_up: bool = False,
    fetch: bool = False,
    device: str = "auto",
    engine: str = "auto",
) -> Repaired:
    """Repairs a gallery without guessing, also one that can no longer be opened, and returns the result.

    - Leftovers are removed, and an interrupted erasure is finished.
    - Damaged files are copied from a backup or a model, if these have a file with the recorded SHA-256.
    - Lost vectors are embedded again from photos that still have their SHA-256.
    - If a model was damaged, the faces that were enrolled since the last comparison are suspects, also after
      this repair has ended. They are embedded again: a sample, and all of them if one differs. Vectors that
      differ are replaced. Faces without their photos stay suspects.
    - A damaged database is not changed: restore a backup.

    Args:
        folder: the gallery's.
        backup: a backup of the gallery, as a source of files with the recorded SHA-256.
        model: another copy of the gallery's model.
        give_up: remove faces with unrecoverable vectors, and vectors without a face.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.
        device, engine: see `Embedder.open`.

    Raises:
        GalleryError: there is no gallery in `folder`.
        StorageError, GalleryBusy: what was repaired before the error stays repaired.
    """
    files = files_by_sha256(Path(backup)) if backup is not None else {}
    return mend(
        Path(folder),
        lambda loaded: Embedder.open(loaded, device=device, engine=engine),
        backup=files.get,
        model=model,
        give_up=give_up,
        fetch=fetch,
    )


def mend(
    folder: Path,
    embedder: Callable[[ModelBundle], Embedder],
    *,
    backup: Callable[[str], Path | None] = lambda sha256: None,
    model: ModelBundle | None = None,
    give_up: bool = False,
    fetch: bool = False,
) -> Repaired:
    """Repairs a gallery as `repair` does, with functions that load a model and find the files of a backup.

    Args:
        folder: the gallery's.
        embedder: loads a model.
        backup: returns the file with a given SHA-256 in a backup, or None.
        model, give_up, fetch: as of `repair`.
    """
    if (follower := FollowerCard.of(folder)) is not None:
        raise InputError(
            f"{folder} is a copy of {follower.current().address}; `faceprint follow` fetches what is "
            "damaged or missing."
        )
    before = verify(folder)
    troubles = {finding.trouble for finding in before.findings}
    if not troubles or Trouble.DATABASE_DAMAGED in troubles:
        return Repaired(before, before, 0, 0, 0, ())
    with closing(Vault.open(folder, via="faceprint repair")) as vault:
        vault.restore_folder_id()
        if Trouble.SUMS_DAMAGED in troubles:
            with quiet(folder):
                page_checksums.discard(folder / DATABASE)
        run = _Repair(vault, backup, model, give_up=give_up, fetch=fetch)
        damaged = _damaged_models(before)
        suspects.note(vault, damaged)
        run.repair_models()
        with vault.writing() as writer:
            # A write removes leftovers and runs deferred work; the log entry renews the checksums.
            vault.log(writer, "repair", findings=len(before.findings))
        # Processes that had the damaged model open may have enrolled faces until now.
        suspects.note(vault, damaged)
        if Trouble.CODES_DAMAGED in troubles:
            run.repair_codes()
        if not {Trouble.MODEL_MISSING, Trouble.MODEL_DAMAGED, Trouble.OTHER_MODEL} & run.unrepaired:
            run.repair_vectors(embedder)
            if not run.lost:
                run.repair_suspects(embedder)
        if Trouble.CODES_DAMAGED in troubles:
            with suppress(GalleryDamaged):  # raised if vectors are still damaged; they get no codes yet
                optimization.optimize(vault)
    found = verify(folder)
    after = replace(found, notes=(*found.notes, *run.notes))
    return Repaired(
        before,
        after,
        run.embedded,
        run.copied,
        run.given_up,
        run.lost,
        run.reasons,
        run.unfetched,
        run.suspects,
        run.compared,
        run.replaced,
    )


def _damaged_models(found: Verification) -> set[str]:
    """Returns the folders of the models with a finding."""
    troubles = (Trouble.MODEL_MISSING, Trouble.MODEL_DAMAGED, Trouble.OTHER_MODEL)
    return {one.file.partition("/")[0] for one in found.findings if one.trouble in troubles and one.file}


class _Repair:
    """One repair of one gallery, and its results; most attributes are those of `Repaired`.

    Attributes:
        unrepaired: the kinds of trouble that models still have after `repair_models`.
        notes: remarks for the result.
    """

    def __init__(
        self,
        vault: Vault,
        backup: Callable[[str], Path | None],
        model: ModelBundle | None,
        *,
        give_up: bool,
        fetch: bool,
    ) -> None:
        self._vault = vault
        self._fetch = fetch
        self._backup = backup
        self._model = model
        self._give_up = give_up
        self.embedded = self.copied = self.given_up = 0
        self.lost: tuple[Face, ...] = ()
        self.reasons: dict[int, str] = {}
        self.unfetched: tuple[int, ...] = ()
        self.unrepaired: set[Trouble] = set()
        self.suspects = self.compared = self.replaced = 0
        self.notes: list[str] = []

    def repair_models(self) -> None:
        """Replaces damaged files of models by copies that have the recorded SHA-256."""
        with self._vault.store.read() as reader:
            generations = list(reader.generations().values())
        for generation in generations:
            folder = self._vault.folder / generation.folder
            self._repair_file(folder / "bundle.json", generation.card_sha256)
            with suppress(BundleError):
                for name, digest in ModelBundle.stated_files(folder).items():
                    self._repair_file(folder / name, digest)
        book = Notebook()
        with self._vault.store.read() as reader:
            check_models(self._vault, reader, book)
        self.unrepaired = {finding.trouble for finding in book.findings}

    def _repair_file(self, path: Path, sha256: str, *, beside: Sequence[Path] = ()) -> None:
        if path.is_file() and hash_file(path)[1] == sha256:
            return
        of_model = self._model.folder / path.name if self._model is not None else None
        for source in (of_model, *beside, self._backup(sha256)):
            if source is not None and source.is_file() and hash_file(source)[1] == sha256:
                try:
                    if not path.parent.is_dir():
                        make_room(path.parent)
                    make_folder(path.parent, like=self._vault.folder, exist_ok=True)
                    write_durably(path, source.read_bytes(), inherit=True, anything=True)
                except OSError as error:
                    raise StorageError(f"{path} cannot be written: {why(error)}.") from error
                self.copied += 1
                return

    def repair_codes(self) -> None:
        """Removes damaged codes and bases; `optimization.optimize` makes new ones from the vectors."""
        book = Notebook()
        with self._vault.store.read() as reader:
            check_codes(self._vault, reader, book)
            broken = {finding.file for finding in book.findings}
            bases = [n for n in reader.bases() if f"{VECTORS}/{basis_name(n)}" in broken]
            segments = [
                one.segment_id
                for one in reader.codes().values()
                if f"{VECTORS}/{codes_name(one.segment_id, one.basis_id)}" in broken
            ]
        if bases or segments:
            with self._vault.writing() as writer:
                writer.remove_codes(segments)
                writer.remove_bases(bases)

    def repair_vectors(self, embedder: Callable[[ModelBundle], Embedder]) -> None:
        """Restores damaged segments from the backup, and lost vectors from their photos."""
        with self._vault.store.read() as reader:
            # If the id in a segment's row is damaged, its file still exists under the right id.
            unnamed = list(leftovers.unnamed(self._vault.folder, reader))
            for segment in reader.segments():
                path = self._vault.folder / VECTORS / f"{segment.id:08d}.faiss"
                self._repair_file(path, segment.sha256, beside=unnamed)
        book, verified = Notebook(), dict[int, Ids | None]()
        read_segments(self._vault, book, verified)
        with self._vault.store.read() as reader:
            check_rows(self._vault, reader, book, verified)
            serving = self._vault.serving(reader)
            present = np.concatenate(
                [np.empty(0, np.int64)]
                + [
                    ids
                    for segment in reader.segments(serving.id)
                    if (ids := verified[segment.id]) is not None
                ]
            )
            lost = np.setdiff1d(np.fromiter(reader.face_ids(), np.int64), present)
            faces = list(reader.faces(lost.tolist()).values())
            shared = reader.in_shared_photos(lost.tolist())
            fetching = Fetching(self._fetch, reader.hosts())
        broken = [number for number, ids in verified.items() if ids is None]
        stray = [n for f in book.findings if f.trouble is Trouble.VECTOR_WITHOUT_FACE for n in f.face_ids]
        parts: list[Embedded] = []
        if faces:
            bundle = ModelBundle.load(self._vault.folder / serving.folder)
            parts = list(embed_again(faces, embedder(bundle), fetching, shared=shared))
        unrecoverable = tuple(face for part in parts for face in part.lost)
        self.unfetched = tuple(sorted(number for part in parts for number in part.unfetched))
        if self.unfetched or (unrecoverable and not self._give_up):
            self.lost = unrecoverable
            self.reasons = {number: words for part in parts for number, words in part.reasons.items()}
            return
        with self._vault.writing() as writer:
            writer.replace_segments(broken, [])
            for part in parts:
                if len(part.ids):
                    self._vault.append(writer, serving, part.ids, part.vectors)
                    self.embedded += len(part.ids)
            # A face with a second vector stays; only vectors without a face are removed.
            existing = set(writer.face_ids())
            without_face = [number for number in stray if number not in existing] if self._give_up else []
            gone = [*(face.id for face in unrecoverable), *without_face]
            self._vault.remove(writer, gone)
            self.given_up = len(unrecoverable)
            if gone or parts:
                self._vault.log(writer, "mend", faces=self.embedded, given_up=len(gone))

    def repair_suspects(self, embedder: Callable[[ModelBundle], Embedder]) -> None:
        """Compares suspects with new embeddings of their photos, and replaces vectors that differ."""
        with self._vault.store.read() as reader:
            generations = [one for one in reader.generations().values() if reader.suspects(one.id)]
        for generation in generations:
            self._repair_suspects(generation, embedder)

    def _repair_suspects(self, generation: Generation, embedder: Callable[[ModelBundle], Embedder]) -> None:
        with self._vault.store.read() as reader:
            fetching = Fetching(self._fetch, reader.hosts())
            flat = self._vault.vectors(generation)
            parts = [flat.rows(segment.id)[0] for segment in reader.segments(generation.id)]
            recorded = np.asarray(reader.suspect_ids(generation.id), np.int64)
        ids = np.intersect1d(np.concatenate([np.empty(0, np.int64), *parts]), recorded)
        folder = self._vault.folder / generation.folder
        found = suspects.compare(
            self._vault, generation, lambda one: embedder(ModelBundle.load(folder)), ids, fetching
        )
        replaced = suspects.replace_vectors(self._vault, generation, found) if len(found.ids) else 0
        suspects.record_comparison(self._vault, generation, found)
        self.suspects += found.suspects
        self.compared += found.reembedded
        self.replaced += replaced
        if (skipped := found.suspects - found.reembedded - len(found.lost)) > 0:
            self.notes.append(
                f"{found.reembedded:,} of {found.suspects:,} faces that the damaged model may have embedded "
                f"were compared with their photos, and agree; the other {skipped:,} were not looked at."
            )
