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
    from retrieval.bundle import ModelBundle, Preprocessing
    from retrieval.embedder import Embedder, Embeddings
    from retrieval.errors import FaceprintError, Reason, UnreadableImage
    from retrieval.gallery import Gallery, GalleryInfo, Match, Outcome, Prediction, SearchResult, Status
    from retrieval.ingestion import IngestReport, ingest
    from retrieval.photos import Photo
    from retrieval.store import Face

__all__ = [
    "Embedder",
    "Embeddings",
    "Face",
    "FaceprintError",
    "Gallery",
    "GalleryInfo",
    "IngestReport",
    "Match",
    "ModelBundle",
    "Outcome",
    "Photo",
    "Prediction",
    "Preprocessing",
    "Reason",
    "SearchResult",
    "Status",
    "UnreadableImage",
    "ingest",
]

_HOMES = {
    "Embedder": "embedder",
    "Embeddings": "embedder",
    "Face": "store",
    "FaceprintError": "errors",
    "Gallery": "gallery",
    "GalleryInfo": "gallery",
    "IngestReport": "ingestion",
    "Match": "gallery",
    "ModelBundle": "bundle",
    "Outcome": "gallery",
    "Photo": "photos",
    "Prediction": "gallery",
    "Preprocessing": "bundle",
    "Reason": "errors",
    "SearchResult": "gallery",
    "Status": "gallery",
    "UnreadableImage": "errors",
    "ingest": "ingestion",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: `faceprint --help` must not wait for FAISS."""
    if name not in _HOMES:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    value = getattr(import_module(f"retrieval.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
