"""Tables of a gallery's database. `migrations/` and `schema` create them; `reader` and `writer` use them."""

from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)

# SQLite's integers have 64 bits whatever their type is called; PostgreSQL's Integer has 32.
INTEGER: Final[TypeEngine[Any]] = Integer().with_variant(BigInteger(), "postgresql")

# Texts compare by their code points in every database, as Python's do: names in order, paths below a folder.
TEXT: Final[TypeEngine[Any]] = Text().with_variant(Text(collation="C"), "postgresql")


def text_of(length: int) -> TypeEngine[Any]:
    """Returns the type of texts of at most so many characters, which neither database enforces."""
    return String(length).with_variant(Text(collation="C"), "postgresql")


# One row. The counters only increase, in the transaction that uses them, so no id is reused. The revision
# increases with every transaction; `revision_check` is its negation, which reveals a flipped bit in either.
gallery_table = Table(
    "gallery",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("uuid", text_of(36), nullable=False),
    Column("created_at", text_of(32), nullable=False),
    Column("next_face_id", INTEGER, nullable=False),
    Column("next_segment_id", INTEGER, nullable=False),
    Column("generation_id", INTEGER, ForeignKey("generation.id"), nullable=False),
    Column("revision", INTEGER, nullable=False),
    Column("revision_check", INTEGER, nullable=False),
    Column("next_identity_id", INTEGER, nullable=False),
    Column("next_generation_id", INTEGER, nullable=False),
    # JSON of the work that committed transactions have deferred (see `retrieval.storage.deferred`).
    Column("unfinished", TEXT, nullable=True),
    Column("next_basis_id", INTEGER, nullable=False),
    # Also recorded in the vectors folder, so that a writer detects the folder of another gallery; NULL in a
    # gallery of an older version until its first write.
    Column("folder_id", text_of(36), nullable=True),
)

# A model and its vectors. One generation is active; another may be incomplete, or kept to switch back to.
generation_table = Table(
    "generation",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("fingerprint", text_of(64), nullable=False),
    Column("dimension", INTEGER, nullable=False),
    Column("folder", text_of(64), nullable=False),
    Column("card_sha256", text_of(64), nullable=False),
    Column("created_at", text_of(32), nullable=False),
    # Faces with lower ids were compared with their photos, or are suspects; NULL if none was compared.
    Column("checked_before", INTEGER, nullable=True),
)

# Id ranges of suspects: faces that a model may have embedded while its files were damaged. Until they are
# compared with their photos, or removed, `faceprint verify` reports them.
suspect_table = Table(
    "suspect",
    metadata,
    Column("generation_id", INTEGER, ForeignKey("generation.id"), primary_key=True),
    Column("first_id", INTEGER, primary_key=True),
    Column("end_id", INTEGER, nullable=False),
)

identity_table = Table(
    "identity",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("name", TEXT, nullable=False, unique=True),
    # A JSON object, as `retrieval.database.metadata` writes it; NULL without metadata.
    Column("metadata", JSON(none_as_null=True), nullable=True),
)

# Former names of identities, so that a folder with a former name still gives the same identity.
alias_table = Table(
    "alias",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("name", TEXT, nullable=False, unique=True),
    Column("identity_id", INTEGER, ForeignKey("identity.id"), nullable=False, index=True),
)

# Mergers: an identity id and the id that it was merged into. Erasing the latter erases the former too.
merger_table = Table(
    "merger",
    metadata,
    Column("identity_id", INTEGER, primary_key=True),
    Column("into_id", INTEGER, nullable=False),
)

# Merges that can be undone; the id is that of the entry in the audit log. `filled` is a JSON list of the keys
# that the remaining identity's metadata got from the merged one, `faces` how many faces moved.
merge_table = Table(
    "merge",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("merged_at", text_of(32), nullable=False),
    Column("identity_id", INTEGER, nullable=False, unique=True),
    # Perhaps merged itself since: not a foreign key.
    Column("into_id", INTEGER, nullable=False),
    Column("name", TEXT, nullable=False),
    Column("metadata", JSON(none_as_null=True), nullable=True),
    Column("filled", TEXT, nullable=False),
    Column("faces", INTEGER, nullable=False),
)

# The faces that moved with a merge, as far as they exist.
merge_face_table = Table(
    "merge_face",
    metadata,
    Column("merge_id", INTEGER, ForeignKey("merge.id"), primary_key=True),
    Column("face_id", INTEGER, ForeignKey("face.id"), primary_key=True, index=True),
)

# The former names that moved with a merge.
merge_name_table = Table(
    "merge_name",
    metadata,
    Column("merge_id", INTEGER, ForeignKey("merge.id"), primary_key=True),
    Column("name", TEXT, primary_key=True),
)

# The outputs of models that got another label by a merge, and the photos that got another folder in the split
# of the model's card: a JSON list of [part, path below the folder].
merge_label_table = Table(
    "merge_label",
    metadata,
    Column("merge_id", INTEGER, ForeignKey("merge.id"), primary_key=True),
    Column("fingerprint", text_of(64), primary_key=True),
    Column("output", INTEGER, primary_key=True),
    Column("photos", TEXT, nullable=False),
)

# The photos that faces were enrolled from. The id is that of the first face, so it is never used again. A
# photo is closed (1) once one of several faces was removed: it gets no face any more, so that a forgotten one
# does not come back. Photos are found by `sha256_key`, see `photo_keys`; `Writer` keeps each SHA-256 single.
photo_table = Table(
    "photo",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("sha256", text_of(64), nullable=False),
    Column("closed", INTEGER, nullable=False),
    Column("sha256_key", INTEGER, nullable=False, index=True),
)

# A face is a place in a photo. `box` is JSON, [left, top, width, height] in pixels, with `landmarks`, five
# [x, y]; or "picture" for a picture that was embedded as it is by a model with a face detector; or empty for
# a model without one.
face_table = Table(
    "face",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("identity_id", INTEGER, ForeignKey("identity.id"), nullable=True, index=True),
    Column("enrolled_at", text_of(32), nullable=False),
    Column("metadata", JSON(none_as_null=True), nullable=True),
    Column("photo_id", INTEGER, ForeignKey("photo.id"), nullable=False),
    Column("box", TEXT, nullable=False),
    Column("landmarks", TEXT, nullable=True),
    Column("score", Float, nullable=True),
    Column("sharpness", Float, nullable=True),
    Column("yaw", Float, nullable=True),
    UniqueConstraint("photo_id", "box"),
)

# Paths of a photo: one or more; none for a photo that was enrolled as bytes. Size, time and inode are those
# of the file when it was read: while they are the same, it is not read again. NULL if not reliable.
file_table = Table(
    "file",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("photo_id", INTEGER, ForeignKey("photo.id"), nullable=False, index=True),
    Column("path", TEXT, nullable=False, unique=True),
    Column("size", BigInteger, nullable=True),
    Column("mtime_ns", BigInteger, nullable=True),
    Column("inode", BigInteger, nullable=True),
)

segment_table = Table(
    "segment",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("rows", INTEGER, nullable=False),
    Column("bytes", INTEGER, nullable=False),
    Column("sha256", text_of(64), nullable=False),
    Column("generation_id", INTEGER, ForeignKey("generation.id"), nullable=False, index=True),
)

# Quantizer bases, trained on a generation's vectors so that searches read fewer bytes; 0 coordinates if no
# basis helps.
basis_table = Table(
    "basis",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("generation_id", INTEGER, ForeignKey("generation.id"), nullable=False, index=True),
    Column("rows", INTEGER, nullable=False),
    Column("coordinates", INTEGER, nullable=False),
    Column("bytes", INTEGER, nullable=False),
    Column("sha256", text_of(64), nullable=False),
    Column("learned_at", text_of(32), nullable=False),
    Column("detail", TEXT, nullable=False),
)

# The existing files of codes, each of one segment in one basis.
codes_table = Table(
    "codes",
    metadata,
    Column("segment_id", INTEGER, ForeignKey("segment.id"), primary_key=True),
    Column("basis_id", INTEGER, ForeignKey("basis.id"), nullable=False, index=True),
    Column("bytes", INTEGER, nullable=False),
    Column("sha256", text_of(64), nullable=False),
    Column("error", Float, nullable=False),
)

# The calibration of a generation: distance thresholds beyond which a search returns no identity, and how they
# were measured. The operating points are JSON, as in `Calibration.fields`.
calibration_table = Table(
    "calibration",
    metadata,
    Column("generation_id", INTEGER, ForeignKey("generation.id"), primary_key=True),
    Column("found_at", text_of(32), nullable=False),
    Column("strangers", text_of(16), nullable=False),
    Column("faces", INTEGER, nullable=False),
    Column("identities", INTEGER, nullable=False),
    Column("searches", INTEGER, nullable=False),
    Column("people", INTEGER, nullable=False),
    Column("trained", INTEGER, nullable=False),
    Column("fpir", Float, nullable=False),
    Column("points", TEXT, nullable=False),
)

# The hosts that enrolled photos were fetched from; stored addresses are fetched from no other host.
host_table = Table("host", metadata, Column("name", TEXT, primary_key=True))

# Receipts of erasures. Their tombstones hold the ids that a restored backup must not contain.
erasure_table = Table(
    "erasure",
    metadata,
    Column("id", text_of(36), primary_key=True),
    Column("at", text_of(32), nullable=False),
    Column("who", TEXT, nullable=False),
    Column("what", text_of(16), nullable=False),
    Column("faces", INTEGER, nullable=False),
)

tombstone_table = Table(
    "tombstone",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("erasure_id", text_of(36), ForeignKey("erasure.id"), nullable=False, index=True),
    Column("kind", text_of(16), nullable=False),
    Column("target", INTEGER, nullable=False),
)

# The audit log. It holds numbers only: a name or a path here would survive the erasure of its person.
audit_table = Table(
    "audit",
    metadata,
    Column("id", INTEGER, primary_key=True),
    Column("began_at", text_of(32), nullable=False),
    Column("ended_at", text_of(32), nullable=False),
    Column("who", TEXT, nullable=False),
    Column("via", TEXT, nullable=False),
    Column("action", text_of(32), nullable=False),
    Column("faces", INTEGER, nullable=False),
    Column("detail", TEXT, nullable=False),
)

# Doubts of audits: those of the last one that was kept, and all that were decided about (`state`: "open",
# "dismissed" or "confirmed"). The id states the kind, and faces and identities by their ids, never by name.
# `place` is the order in the last audit, NULL where that did not find it; `merge_id` is the merge that
# confirmed it.
doubt_table = Table(
    "doubt",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("state", text_of(16), nullable=False),
    Column("place", INTEGER, nullable=True),
    Column("score", Float, nullable=True),
    Column("measured", JSON(none_as_null=True), nullable=True),
    Column("decided_at", text_of(32), nullable=True),
    Column("merge_id", INTEGER, nullable=True),
)

# The faces that show a doubt, side by side in parts: whether a face is doubted (1), and its identity then.
doubt_face_table = Table(
    "doubt_face",
    metadata,
    Column("doubt_id", TEXT, ForeignKey("doubt.id"), primary_key=True),
    Column("part", INTEGER, primary_key=True),
    Column("place", INTEGER, primary_key=True),
    Column("face_id", INTEGER, ForeignKey("face.id"), nullable=False, index=True),
    Column("doubted", INTEGER, nullable=False),
    Column("identity_id", INTEGER, nullable=True),
)

# The identities that a doubt is about; perhaps merged since.
doubt_identity_table = Table(
    "doubt_identity",
    metadata,
    Column("doubt_id", TEXT, ForeignKey("doubt.id"), primary_key=True),
    Column("place", INTEGER, primary_key=True),
    Column("identity_id", INTEGER, nullable=False),
)
