"""The names of this package, until every importer names the module that has each."""

from retrieval.transfer.export import export
from retrieval.transfer.export_reader import read_export, rows
from retrieval.transfer.import_ import Imported, import_export
from retrieval.transfer.manifest import MANIFEST, Export
from retrieval.transfer.vector_files import count_embeddings, read_embeddings, write_embeddings

__all__ = [
    "MANIFEST",
    "Export",
    "Imported",
    "count_embeddings",
    "export",
    "import_export",
    "read_embeddings",
    "read_export",
    "rows",
    "write_embeddings",
]
