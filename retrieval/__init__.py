"""faceprint: who is this, and which stored photos are closest?

from retrieval import Gallery, ModelBundle, ingest

gallery = Gallery.create("my.gallery", ModelBundle.load("my.model"))
report = ingest(gallery, ["photos/"])
result = gallery.search("who.jpg", k=5)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retrieval.auditing import audit
    from retrieval.backup import BackedUp, Restored
    from retrieval.bundle import ModelBundle, Preprocessing
    from retrieval.decisions import Decision
    from retrieval.doubts import Audited, Doubt
    from retrieval.embedder import Embedder, Embeddings
    from retrieval.embedding import EmbedReport, embed
    from retrieval.engines import PrecisionDrift
    from retrieval.errors import FaceprintError, Reason, UnreadableImage
    from retrieval.exchange import Export, Imported
    from retrieval.gallery import Gallery, repair
    from retrieval.info import GalleryInfo
    from retrieval.ingestion import IngestReport, ingest, ingest_photos
    from retrieval.metadata import Annotated
    from retrieval.missing import Kept, Missing, Renamed, Unseen
    from retrieval.moves import Relabelled
    from retrieval.photos import Photo
    from retrieval.reembedding import Drift, Reembedded
    from retrieval.relocation import Relocated
    from retrieval.searching import Match, Prediction, SearchResult
    from retrieval.store import AuditEntry, Calibration, Face, NewFace, OperatingPoint, Receipt
    from retrieval.strangers import Calibrated, StrangerReport, calibrate
    from retrieval.vault import Compacted, Optimized
    from retrieval.verdicts import Outcome, Status
    from retrieval.verification import Finding, Repaired, Trouble, Verification, verify
    from retrieval.where import Condition, Where

__all__ = [
    "Annotated",
    "AuditEntry",
    "Audited",
    "BackedUp",
    "Calibrated",
    "Calibration",
    "Compacted",
    "Condition",
    "Decision",
    "Doubt",
    "Drift",
    "EmbedReport",
    "Embedder",
    "Embeddings",
    "Explanation",
    "Export",
    "Face",
    "FaceprintError",
    "Finding",
    "Gallery",
    "GalleryInfo",
    "Imported",
    "IngestReport",
    "Kept",
    "Match",
    "Missing",
    "ModelBundle",
    "NewFace",
    "OperatingPoint",
    "Optimized",
    "Outcome",
    "PeopleResult",
    "PersonMatch",
    "Photo",
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
    "SearchResult",
    "Status",
    "StrangerReport",
    "Trouble",
    "UnreadableImage",
    "Unseen",
    "Verification",
    "Where",
    "audit",
    "calibrate",
    "embed",
    "ingest",
    "ingest_photos",
    "repair",
    "verify",
]

_HOMES = {
    "Annotated": "metadata",
    "AuditEntry": "store",
    "Audited": "doubts",
    "BackedUp": "backup",
    "Calibrated": "strangers",
    "Calibration": "store",
    "Compacted": "vault",
    "Condition": "where",
    "Decision": "decisions",
    "Doubt": "doubts",
    "Drift": "reembedding",
    "EmbedReport": "embedding",
    "Embedder": "embedder",
    "Embeddings": "embedder",
    "Explanation": "knn",
    "Export": "exchange",
    "Face": "store",
    "FaceprintError": "errors",
    "Finding": "verification",
    "Gallery": "gallery",
    "GalleryInfo": "info",
    "Imported": "exchange",
    "IngestReport": "ingestion",
    "Kept": "missing",
    "Match": "searching",
    "Missing": "missing",
    "ModelBundle": "bundle",
    "NewFace": "store",
    "OperatingPoint": "store",
    "Optimized": "vault",
    "Outcome": "verdicts",
    "PeopleResult": "searching",
    "PersonMatch": "searching",
    "Photo": "photos",
    "PrecisionDrift": "engines",
    "Prediction": "searching",
    "Preprocessing": "bundle",
    "Reason": "errors",
    "Receipt": "store",
    "Reembedded": "reembedding",
    "Relabelled": "moves",
    "Relocated": "relocation",
    "Renamed": "missing",
    "Repaired": "verification",
    "Restored": "backup",
    "SearchResult": "searching",
    "Status": "verdicts",
    "StrangerReport": "strangers",
    "Trouble": "verification",
    "UnreadableImage": "errors",
    "Unseen": "missing",
    "Verification": "verification",
    "Where": "where",
    "audit": "auditing",
    "calibrate": "strangers",
    "embed": "embedding",
    "ingest": "ingestion",
    "ingest_photos": "ingestion",
    "repair": "gallery",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: `faceprint --help` must not wait for FAISS."""
    if name not in _HOMES:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    value = getattr(import_module(f"retrieval.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
