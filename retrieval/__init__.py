"""faceprint: who is this, and which stored photos are closest?

    from retrieval import Gallery, ModelBundle, ingest

    gallery = Gallery.create("my.gallery", ModelBundle.load("my.model"))
    report = ingest(gallery, ["photos/"])
    result = gallery.search("who.jpg", k=5)

The names in `__all__` are public. Each stands here three times: for type checkers, which need the import and
the literal list, and in `_HOMES`, from which it is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retrieval.bulk.calibrate import Calibrated, StrangerReport, calibrate
    from retrieval.bulk.embed import EmbedReport, embed
    from retrieval.bulk.ingest import ingest, ingest_photos
    from retrieval.bulk.reports import IngestReport
    from retrieval.database.filters import Condition, Where
    from retrieval.database.records import (
        AuditEntry,
        Calibration,
        Face,
        FaceRegion,
        Merge,
        NewFace,
        OperatingPoint,
        Receipt,
    )
    from retrieval.embedding.outcome import Outcome, Status
    from retrieval.errors import FaceprintError, Reason, UnreadableImage
    from retrieval.gallery.annotate import Annotated
    from retrieval.gallery.copying import Copied
    from retrieval.gallery.gallery import Gallery
    from retrieval.gallery.info import GalleryInfo
    from retrieval.gallery.integrity import Finding, Trouble, Verification, verify
    from retrieval.gallery.merges import UndoneMerge
    from retrieval.gallery.moves import Relabelled
    from retrieval.gallery.reembed import Drift, Reembedded
    from retrieval.gallery.relocation import Relocated
    from retrieval.gallery.repair import Repaired, repair
    from retrieval.gallery.sync import Kept, Missing, Renamed, Unseen
    from retrieval.images.detection import DetectedFace
    from retrieval.images.photo_reader import FaceImage, FaceSelection, PhotoReader
    from retrieval.images.preprocessing import FaceAlignment, Preprocessing
    from retrieval.index.knn import Explanation
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.detectors import open_detector
    from retrieval.models.embedder import Embedder, Embeddings
    from retrieval.models.engine import PrecisionDrift
    from retrieval.models.importing import import_model
    from retrieval.quality.audit import audit
    from retrieval.quality.audit_report import Audited, Doubt
    from retrieval.search.decisions import Decision
    from retrieval.search.nearest import Match, PeopleResult, PersonMatch, Prediction, SearchResult
    from retrieval.search.question import PeopleSearchOptions, PhotoSearchOptions, SearchOptions
    from retrieval.sources.photos import Photo
    from retrieval.storage.backup import BackedUp
    from retrieval.storage.compaction import Compacted
    from retrieval.storage.optimization import Optimized
    from retrieval.storage.restore import Restored
    from retrieval.transfer.import_ import Imported
    from retrieval.transfer.manifest import Export

__all__ = [
    "Annotated",
    "AuditEntry",
    "Audited",
    "BackedUp",
    "Calibrated",
    "Calibration",
    "Compacted",
    "Condition",
    "Copied",
    "Decision",
    "DetectedFace",
    "Doubt",
    "Drift",
    "EmbedReport",
    "Embedder",
    "Embeddings",
    "Explanation",
    "Export",
    "Face",
    "FaceAlignment",
    "FaceImage",
    "FaceRegion",
    "FaceSelection",
    "FaceprintError",
    "Finding",
    "Gallery",
    "GalleryInfo",
    "Imported",
    "IngestReport",
    "Kept",
    "Match",
    "Merge",
    "Missing",
    "ModelBundle",
    "NewFace",
    "OperatingPoint",
    "Optimized",
    "Outcome",
    "PeopleResult",
    "PeopleSearchOptions",
    "PersonMatch",
    "Photo",
    "PhotoReader",
    "PhotoSearchOptions",
    "PrecisionDrift",
    "Prediction",
    "Preprocessing",
    "Reason",
    "Receipt",
    "Reembedded",
    "Relabelled",
    "Relocated",
    "Renamed",
    "Repaired",
    "Restored",
    "SearchOptions",
    "SearchResult",
    "Status",
    "StrangerReport",
    "Trouble",
    "UndoneMerge",
    "UnreadableImage",
    "Unseen",
    "Verification",
    "Where",
    "audit",
    "calibrate",
    "embed",
    "import_model",
    "ingest",
    "ingest_photos",
    "open_detector",
    "repair",
    "verify",
]

# The module below `retrieval` that defines each public name; a test compares it with `__all__`.
_HOMES = {
    "Annotated": "gallery.annotate",
    "AuditEntry": "database.records",
    "Audited": "quality.audit_report",
    "BackedUp": "storage.backup",
    "Calibrated": "bulk.calibrate",
    "Calibration": "database.records",
    "Compacted": "storage.compaction",
    "Condition": "database.filters",
    "Copied": "gallery.copying",
    "Decision": "search.decisions",
    "DetectedFace": "images.detection",
    "Doubt": "quality.audit_report",
    "Drift": "gallery.reembed",
    "EmbedReport": "bulk.embed",
    "Embedder": "models.embedder",
    "Embeddings": "models.embedder",
    "Explanation": "index.knn",
    "Export": "transfer.manifest",
    "Face": "database.records",
    "FaceRegion": "database.records",
    "FaceAlignment": "images.preprocessing",
    "FaceImage": "images.photo_reader",
    "FaceSelection": "images.photo_reader",
    "FaceprintError": "errors",
    "Finding": "gallery.integrity",
    "Gallery": "gallery.gallery",
    "GalleryInfo": "gallery.info",
    "Imported": "transfer.import_",
    "IngestReport": "bulk.reports",
    "Kept": "gallery.sync",
    "Match": "search.nearest",
    "Missing": "gallery.sync",
    "ModelBundle": "models.bundle",
    "Merge": "database.records",
    "NewFace": "database.records",
    "OperatingPoint": "database.records",
    "Optimized": "storage.optimization",
    "Outcome": "embedding.outcome",
    "PeopleResult": "search.nearest",
    "PeopleSearchOptions": "search.question",
    "PersonMatch": "search.nearest",
    "Photo": "sources.photos",
    "PhotoReader": "images.photo_reader",
    "PhotoSearchOptions": "search.question",
    "PrecisionDrift": "models.engine",
    "Prediction": "search.nearest",
    "Preprocessing": "images.preprocessing",
    "Reason": "errors",
    "Receipt": "database.records",
    "Reembedded": "gallery.reembed",
    "Relabelled": "gallery.moves",
    "Relocated": "gallery.relocation",
    "Renamed": "gallery.sync",
    "Repaired": "gallery.repair",
    "Restored": "storage.restore",
    "SearchOptions": "search.question",
    "SearchResult": "search.nearest",
    "Status": "embedding.outcome",
    "StrangerReport": "bulk.calibrate",
    "Trouble": "gallery.integrity",
    "UnreadableImage": "errors",
    "UndoneMerge": "gallery.merges",
    "Unseen": "gallery.sync",
    "Verification": "gallery.integrity",
    "Where": "database.filters",
    "audit": "quality.audit",
    "calibrate": "bulk.calibrate",
    "embed": "bulk.embed",
    "import_model": "models.importing",
    "ingest": "bulk.ingest",
    "ingest_photos": "bulk.ingest",
    "open_detector": "models.detectors",
    "repair": "gallery.repair",
    "verify": "gallery.integrity",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: `faceprint --help` must not wait for FAISS.

    Python calls it for a name that this module does not have yet (PEP 562).
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    value = getattr(import_module(f"retrieval.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
