"""Import: enrolls the faces of another gallery's export into this one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from retrieval.database.metadata import Metadata, encoded, filled
from retrieval.database.reader import Reader
from retrieval.database.records import Calibration, NewFace
from retrieval.database.tables import identity_table
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import ModelMismatch
from retrieval.storage.any_vault import AnyVault
from retrieval.transfer.export_reader import ExportBatch, rows
from retrieval.transfer.manifest import Export
from retrieval.transfer.parquet_blocks import BLOCK

# Of the statuses of the paths of one face, the first of these is the face's.
_STATUS_ORDER: Final = (Status.ENROLLED, Status.REJECTED, Status.DUPLICATE, Status.KNOWN)


@dataclass(slots=True)
class Imported:
    """The result of an import. `found` is always `enrolled + known + duplicate + rejected`: each row once.

    Attributes:
        enrolled: rows that became faces.
        known: rows that the gallery already held completely.
        duplicate: rows with bytes that the gallery had, under other paths or none.
        rejected: rows with bytes that the gallery has under another identity.
        replaced: paths that led to other faces of the gallery until now.
        interrupted: whether it was stopped before the last row.
    """

    enrolled: int = 0
    known: int = 0
    duplicate: int = 0
    rejected: int = 0
    replaced: int = 0
    interrupted: bool = False

    @property
    def found(self) -> int:
        """The number of rows that were processed."""
        return self.enrolled + self.known + self.duplicate + self.rejected


def import_export(
    vault: AnyVault,
    exported: Export,
    enroll: Callable[[Sequence[NewFace], NDArray[Any]], list[Outcome]],
    *,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Imported:
    """Offers every face of an export to a gallery: its SHA-256, its identity, all of its paths, its vector.

    Duplicates, conflicts and former names are handled as in any enrollment. Face ids and times of enrollment
    are new. Metadata of the gallery stay; metadata of the export add missing keys. A path of another face in
    the gallery is moved to the exported face.

    Args:
        vault: the gallery.
        exported: the result of `read_export`.
        enroll: `Gallery.enroll_vectors`.
        on_outcome: called once for every row that was not enrolled, after its batch is durable.
        should_stop: asked between batches; True ends the import, with everything so far enrolled.

    Raises:
        ModelMismatch: the gallery's model is not the one that made the vectors.
        InputError: a file of the export cannot be read any more.
        StorageError, GalleryBusy: the rows in flight were not enrolled; those before them were.
    """
    report = Imported()
    _require(vault, exported)
    for batch in rows(exported):
        if should_stop():
            report.interrupted = True
            break
        _require(vault, exported)
        _import_batch(batch, enroll, report, on_outcome)
        _import_people(vault, batch)
    if not (report.interrupted or report.rejected):
        _import_calibration(vault, exported)
    return report


def _import_calibration(vault: AnyVault, exported: Export) -> None:
    """Copies the calibration to a gallery without one that has the same model and number of faces."""

    def wanted(reader: Reader) -> Calibration | None:
        serving = vault.serving(reader)
        if exported.calibration is None or reader.calibration(serving) is not None:
            return None
        same = serving.fingerprint == exported.fingerprint and reader.count() == exported.faces
        return Calibration.of({**exported.calibration, "generation": serving.id}) if same else None

    with vault.store.read() as reader:
        if wanted(reader) is None:
            return
    with vault.writing() as writer:
        found = wanted(writer)
        if found is not None:
            writer.set_calibration(found)
            vault.log(writer, "calibrate", faces=found.faces, fpir=found.fpir, searches=found.searches)


def _require(vault: AnyVault, exported: Export) -> None:
    with vault.store.read() as reader:
        fingerprint = vault.state(reader).generation.fingerprint
    if fingerprint != exported.fingerprint:
        raise ModelMismatch(
            f"The export {exported.folder} was made with another model (fingerprint "
            f"{exported.fingerprint[:12]}, not {fingerprint[:12]}); import it into a gallery of that model."
        )


def _import_batch(
    batch: ExportBatch,
    enroll: Callable[[Sequence[NewFace], NDArray[Any]], list[Outcome]],
    report: Imported,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Offers a row once for each of its paths; the later ones are found to be duplicates of the first."""
    offers = [
        (row, NewFace(face.identity, path, face.sha256, face.metadata, region=face.region))
        for row, face in enumerate(batch.faces)
        for path in face.paths or (None,)
    ]
    outcomes: list[list[Outcome]] = [[] for _ in batch.faces]
    for start in range(0, len(offers), BLOCK):
        numbers, faces = zip(*offers[start : start + BLOCK], strict=True)
        once = len(offers) == len(batch.faces) <= BLOCK
        vectors = batch.vectors if once else batch.vectors[list(numbers)]
        for row, outcome in zip(numbers, enroll(faces, vectors), strict=True):
            outcomes[row].append(outcome)
    for found in outcomes:
        outcome = min(found, key=lambda one: _STATUS_ORDER.index(one.status))
        report.replaced += sum(one.replaced is not None for one in found)
        if outcome.status is Status.ENROLLED:
            report.enrolled += 1
            continue
        report.known += outcome.status is Status.KNOWN
        report.duplicate += outcome.status is Status.DUPLICATE
        report.rejected += outcome.status is Status.REJECTED
        on_outcome(outcome)


def _import_people(vault: AnyVault, batch: ExportBatch) -> None:
    """Adds the metadata of a batch's identities; skips an identity without faces in this gallery."""

    def missing(reader: Reader) -> dict[int, Metadata]:
        own: dict[int, Metadata] = {}
        said: dict[int, Metadata] = {}
        for name, (number, here) in reader.identities_named(batch.people).items():
            own[number] = here
            said[number] = filled(said.get(number, here), batch.people[name])
        return {number: one for number, one in said.items() if one.keys() != own[number].keys()}

    with vault.store.read() as reader:
        if not missing(reader):
            return
    with vault.writing() as writer:
        people = missing(writer)
        for metadata in people.values():
            encoded(metadata, "an identity together with that of the export")
        writer.set_metadata(identity_table, people)
        vault.log(writer, "annotate", identities=len(people))
