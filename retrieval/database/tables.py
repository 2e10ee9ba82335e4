"""Tables of a gallery's database. `migrations/` creates them; `reader` and `writer` use them."""

from sqlalchemy import JSON, BigInteger, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)

# One row. The counters only rise, in the transaction that uses them, so no id is ever used again; the
# revision rises with every transaction, and its opposite beside it shows a flipped bit in either.
gallery_table = Table(
    "gallery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("uuid", String(36), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("next_face_id", Integer, nullable=False),
    Column("next_segment_id", Integer, nullable=False),
    Column("generation_id", Integer, ForeignKey("generation.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("revision_check", Integer, nullable=False),
    Column("next_identity_id", Integer, nullable=False),
    Column("next_generation_id", Integer, nullable=False),
    # JSON of the work that committed transactions have deferred (see `retrieval.storage.deferred`).
    Column("unfinished", Text, nullable=True),
    Column("next_basis_id", Integer, nullable=False),
    # Stands in the folder of vectors too, so that a writer never takes another gallery's for its own; NULL
    # until the first writer of a gallery of an older version.
    Column("folder_id", String(36), nullable=True),
)

# A model and its vectors. One generation serves; another may be incomplete, or kept to switch back to.
generation_table = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("folder", String(64), nullable=False),
    Column("card_sha256", String(64), nullable=False),
    Column("created_at", String(32), nullable=False),
    # Faces with lower ids were compared with their photos, or are suspects; NULL where none was compared.
    Column("checked_before", Integer, nullable=True),
)

# Faces that a model may have embedded while its files were damaged, from one id up to another: until they are
# compared with their photos, or gone, the gallery is not whole.
suspect_table = Table(
    "suspect",
    metadata,
    Column("generation_id", Integer, ForeignKey("generation.id"), primary_key=True),
    Column("first_id", Integer, primary_key=True),
    Column("end_id", Integer, nullable=False),
)

identity_table = Table(
    "identity",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    # A JSON object, as `retrieval.database.metadata` writes it; NULL where there is none.
    Column("metadata", JSON(none_as_null=True), nullable=True),
)

# What an identity was called before, so that a folder of the old name still means the same person.
alias_table = Table(
    "alias",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("identity_id", Integer, ForeignKey("identity.id"), nullable=False, index=True),
)

# Which identity became part of which, by number: who forgets the one forgets what was the other.
merger_table = Table(
    "merger",
    metadata,
    Column("identity_id", Integer, primary_key=True),
    Column("into_id", Integer, nullable=False),
)

face_table = Table(
    "face",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("identity_id", Integer, ForeignKey("identity.id"), nullable=True, index=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("enrolled_at", String(32), nullable=False),
    Column("metadata", JSON(none_as_null=True), nullable=True),
)

# Where a face's bytes lie: one path or more, none for what a library call gave as bytes. What the file was
# when it was read, so that it need not be read again while it is that; NULL where that says nothing.
file_table = Table(
    "file",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("face_id", Integer, ForeignKey("face.id"), nullable=False, index=True),
    Column("path", Text, nullable=False, unique=True),
    Column("size", BigInteger, nullable=True),
    Column("mtime_ns", BigInteger, nullable=True),
    Column("inode", BigInteger, nullable=True),
)

segment_table = Table(
    "segment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("generation_id", Integer, ForeignKey("generation.id"), nullable=False, index=True),
)

# What was learned from a generation's vectors, for searches to read less; 0 coordinates where nothing helps.
basis_table = Table(
    "basis",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("generation_id", Integer, ForeignKey("generation.id"), nullable=False, index=True),
    Column("rows", Integer, nullable=False),
    Column("coordinates", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("learned_at", String(32), nullable=False),
    Column("detail", Text, nullable=False),
)

# The files of codes that exist: of which segment, in which basis.
codes_table = Table(
    "codes",
    metadata,
    Column("segment_id", Integer, ForeignKey("segment.id"), primary_key=True),
    Column("basis_id", Integer, ForeignKey("basis.id"), nullable=False, index=True),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("error", Float, nullable=False),
)

# The distances beyond which a search of a generation's vectors returns no identity, and how they were found;
# the operating points are JSON, as `Calibration.fields` gives them.
calibration_table = Table(
    "calibration",
    metadata,
    Column("generation_id", Integer, ForeignKey("generation.id"), primary_key=True),
    Column("found_at", String(32), nullable=False),
    Column("strangers", String(16), nullable=False),
    Column("faces", Integer, nullable=False),
    Column("identities", Integer, nullable=False),
    Column("searches", Integer, nullable=False),
    Column("people", Integer, nullable=False),
    Column("trained", Integer, nullable=False),
    Column("fpir", Float, nullable=False),
    Column("points", Text, nullable=False),
)

# The hosts that enrolled photos were fetched from; no other host is ever asked for a stored address.
host_table = Table("host", metadata, Column("name", Text, primary_key=True))

# Receipts of what was forgotten, and the numbers that a restored backup must not bring back.
erasure_table = Table(
    "erasure",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("at", String(32), nullable=False),
    Column("who", Text, nullable=False),
    Column("what", String(16), nullable=False),
    Column("faces", Integer, nullable=False),
)

tombstone_table = Table(
    "tombstone",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("erasure_id", String(36), ForeignKey("erasure.id"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("target", Integer, nullable=False),
)

# Who did what when. Numbers only: a name or a path here would outlive its person.
audit_table = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("began_at", String(32), nullable=False),
    Column("ended_at", String(32), nullable=False),
    Column("who", Text, nullable=False),
    Column("via", Text, nullable=False),
    Column("action", String(32), nullable=False),
    Column("faces", Integer, nullable=False),
    Column("detail", Text, nullable=False),
)
