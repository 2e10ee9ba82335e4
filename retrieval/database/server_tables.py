"""Tables that a gallery has in a PostgreSQL schema only, beside those of `tables`.

A folder has the model's files and the vectors beside its database. A database on a server has the model in
rows, so that any machine with the address can open the gallery, and the address of the vectors.
"""

from typing import Final

from sqlalchemy import Column, LargeBinary, MetaData, Table

from retrieval.database.tables import INTEGER, TEXT, metadata

server_metadata = MetaData(naming_convention=metadata.naming_convention)

# Where the vectors of a generation are: an address without a user and a password.
vectors_table = Table(
    "vectors",
    server_metadata,
    Column("generation_id", INTEGER, primary_key=True),
    Column("address", TEXT, nullable=False),
)

# The files of a generation's model, in parts that are numbered from 0.
model_file_table = Table(
    "model_file",
    server_metadata,
    Column("generation_id", INTEGER, primary_key=True),
    Column("name", TEXT, primary_key=True),
    Column("part", INTEGER, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

# Bytes of a part.
PART_BYTES: Final = 4 * 2**20
