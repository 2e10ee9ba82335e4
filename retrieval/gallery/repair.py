"""Repair: what is damaged comes back without a guess, also where a gallery can no longer be opened.

A vector comes back from its own photo, as long as that has the same SHA-256, or from a segment of a backup
that has the SHA-256 which the row states.
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
from retrieval.errors import BundleError, GalleryDamaged, StorageError
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
from retrieval.storage.backup import files_by_sha256
from retrieval.storage.layout import DATABASE, VECTORS
from retrieval.storage.vault import Vault
from retrieval.system.files import make_folder, make_room, why, write_durably


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was wrong before a repair, what is still wrong after it, and which faces could not be mended.

    Attributes:
        before, after: the verifications.
        embedded: vectors that were made again from their photos.
        copied: files that came from the backup or the model.
        given_up: faces that were removed because nothing can bring their vectors back.
        lost: faces whose vectors cannot be brought back, and whose rows were left as they are.
        reasons: of each lost face by its id, why its photo is no help, in words.
        unfetched: ids of the lost faces that have an address which was not allowed to be fetched. While there
            are any, no vector is mended and no face given up.
        suspects: faces that a damaged model may have embedded: enrolled since the last comparison.
        compared: how many of these were embedded again and compared.
        replaced: how many of these had another vector than their photo gives, and have the latter now.
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
    """Mends what can be mended of a gallery without a guess, also of one that can no longer be opened.

    Leftovers go, an interrupted erasure is finished, damaged files come back from a backup or a model
    where these have them with the SHA-256 that was written down, lost vectors are embedded again from photos
    that still have their SHA-256. Where a model was damaged, faces that were enrolled since the last
    comparison are suspects, also after this repair has ended: they are embedded again (a sample; all of them
    if any differs), vectors that differ are replaced, and faces without their photos stay suspects.
    A damaged database is not touched: restore a backup.

    Args:
        folder: the gallery's.
        backup: a backup of it, for files that have the SHA-256 which was written down.
        model: another copy of its model.
        give_up: remove faces whose vectors nothing can bring back, and vectors without a face.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.
        device, engine: see `Embedder.open`.

    Raises:
        GalleryError: there is no gallery.
        StorageError, GalleryBusy: what was mended until then stays mended.
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
    """As `repair`, with what loads a model and what finds the files of a backup.

    Args:
        folder: the gallery's.
        embedder: loads a model.
        backup: finds a file of a SHA-256 in a backup.
        model, give_up, fetch: as of `repair`.
    """
    before = verify(folder)
    troubles = {finding.trouble for finding in before.findings}
    if not troubles or Trouble.DATABASE_DAMAGED in troubles:
        return Repaired(before, before, 0, 0, 0, ())
    with closing(Vault.open(folder, via="faceprint repair")) as vault:
        vault.claim()
        if Trouble.SUMS_DAMAGED in troubles:
            with quiet(folder):
                page_checksums.discard(folder / DATABASE)
        mender = _Mender(vault, backup, model, give_up=give_up, fetch=fetch)
        damaged = _damaged_models(before)
        suspects.note(vault, damaged)
        mender.mend_models()
        with vault.writing() as writer:
            # Writing removes leftovers and finishes what was interrupted, and the entry renews the sums.
            vault.log(writer, "repair", findings=len(before.findings))
        # Whoever had the damaged model open may have enrolled until now.
        suspects.note(vault, damaged)
        if Trouble.CODES_DAMAGED in troubles:
            mender.mend_codes()
        if not {Trouble.MODEL_MISSING, Trouble.MODEL_DAMAGED, Trouble.OTHER_MODEL} & mender.unmended:
            mender.mend_vectors(embedder)
            if not mender.lost:
                mender.mend_suspects(embedder)
        if Trouble.CODES_DAMAGED in troubles:
            with suppress(GalleryDamaged):  # where vectors are still damaged; their codes have to wait
                optimization.optimize(vault)
    found = verify(folder)
    after = replace(found, notes=(*found.notes, *mender.notes))
    return Repaired(
        before,
        after,
        mender.embedded,
        mender.copied,
        mender.given_up,
        mender.lost,
        mender.reasons,
        mender.unfetched,
        mender.suspects,
        mender.compared,
        mender.replaced,
    )


def _damaged_models(found: Verification) -> set[str]:
    """The folders of the models of which something was found."""
    troubles = (Trouble.MODEL_MISSING, Trouble.MODEL_DAMAGED, Trouble.OTHER_MODEL)
    return {one.file.partition("/")[0] for one in found.findings if one.trouble in troubles and one.file}


class _Mender:
    """One repair of one gallery, and what it has come to."""

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
        self.unmended: set[Trouble] = set()
        self.suspects = self.compared = self.replaced = 0
        self.notes: list[str] = []

    def mend_models(self) -> None:
        """Brings damaged files of models back from where their SHA-256 is found."""
        with self._vault.store.read() as reader:
            generations = list(reader.generations().values())
        for generation in generations:
            folder = self._vault.folder / generation.folder
            self._mend_file(folder / "bundle.json", generation.card_sha256)
            with suppress(BundleError):
                for name, digest in ModelBundle.stated_files(folder).items():
                    self._mend_file(folder / name, digest)
        book = Notebook()
        with self._vault.store.read() as reader:
            check_models(self._vault, reader, book)
        self.unmended = {finding.trouble for finding in book.findings}

    def _mend_file(self, path: Path, sha256: str, *, beside: Sequence[Path] = ()) -> None:
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

    def mend_codes(self) -> None:
        """Makes damaged codes and bases not exist; `Vault.optimize` makes others from the vectors."""
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

    def mend_vectors(self, embedder: Callable[[ModelBundle], Embedder]) -> None:
        """Brings damaged segments back from the backup, and lost vectors from their photos."""
        with self._vault.store.read() as reader:
            # Where the number in a row is damaged, its file is there under the right one.
            unnamed = list(leftovers.unnamed(self._vault.folder, reader))
            for segment in reader.segments():
                path = self._vault.folder / VECTORS / f"{segment.id:08d}.faiss"
                self._mend_file(path, segment.sha256, beside=unnamed)
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
            fetching = Fetching(self._fetch, reader.hosts())
        broken = [number for number, ids in verified.items() if ids is None]
        astray = [n for f in book.findings if f.trouble is Trouble.VECTOR_WITHOUT_FACE for n in f.face_ids]
        mended: list[Embedded] = []
        if faces:
            bundle = ModelBundle.load(self._vault.folder / serving.folder)
            mended = list(embed_again(faces, embedder(bundle), fetching))
        hopeless = tuple(face for part in mended for face in part.lost)
        self.unfetched = tuple(sorted(number for part in mended for number in part.unfetched))
        if self.unfetched or (hopeless and not self._give_up):
            self.lost = hopeless
            self.reasons = {number: words for part in mended for number, words in part.reasons.items()}
            return
        with self._vault.writing() as writer:
            writer.replace_segments(broken, [])
            for part in mended:
                if len(part.ids):
                    self._vault.append(writer, serving, part.ids, part.vectors)
                    self.embedded += len(part.ids)
            # A second vector of a face is no reason to lose the face.
            alive = set(writer.face_ids())
            nobodys = [number for number in astray if number not in alive] if self._give_up else []
            gone = [*(face.id for face in hopeless), *nobodys]
            self._vault.remove(writer, gone)
            self.given_up = len(hopeless)
            if gone or mended:
                self._vault.log(writer, "mend", faces=self.embedded, given_up=len(gone))

    def mend_suspects(self, embedder: Callable[[ModelBundle], Embedder]) -> None:
        """Compares faces that a damaged model may have embedded with their photos; replaces what differs."""
        with self._vault.store.read() as reader:
            generations = [one for one in reader.generations().values() if reader.suspects(one.id)]
        for generation in generations:
            self._mend_suspects(generation, embedder)

    def _mend_suspects(self, generation: Generation, embedder: Callable[[ModelBundle], Embedder]) -> None:
        with self._vault.store.read() as reader:
            fetching = Fetching(self._fetch, reader.hosts())
            flat = self._vault.vectors(generation)
            parts = [flat.rows(segment.id)[0] for segment in reader.segments(generation.id)]
            noted = np.asarray(reader.suspect_ids(generation.id), np.int64)
        ids = np.intersect1d(np.concatenate([np.empty(0, np.int64), *parts]), noted)
        folder = self._vault.folder / generation.folder
        found = suspects.compare(
            self._vault, generation, lambda one: embedder(ModelBundle.load(folder)), ids, fetching
        )
        replaced = suspects.replace_vectors(self._vault, generation, found) if len(found.ids) else 0
        suspects.settle(self._vault, generation, found)
        self.suspects += found.suspects
        self.compared += found.looked_at
        self.replaced += replaced
        if (unseen := found.suspects - found.looked_at - len(found.lost)) > 0:
            self.notes.append(
                f"{found.looked_at:,} of {found.suspects:,} faces that the damaged model may have embedded "
                f"were compared with their photos, and agree; the other {unseen:,} were not looked at."
            )
