"""Several files a face, generations of vectors, erasures with tombstones, an audit log, a revision."""

import hashlib
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _generations()
    _files()
    _gallery()
    op.create_table(
        "alias",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("identity_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["identity_id"], ["identity.id"], name="fk_alias_identity_id_identity"),
        sa.PrimaryKeyConstraint("id", name="pk_alias"),
        sa.UniqueConstraint("name", name="uq_alias_name"),
    )
    op.create_index("ix_alias_identity_id", "alias", ["identity_id"])
    op.create_table(
        "merger",
        sa.Column("identity_id", sa.Integer(), nullable=False),
        sa.Column("into_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("identity_id", name="pk_merger"),
    )
    op.create_table(
        "erasure",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("what", sa.String(16), nullable=False),
        sa.Column("faces", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_erasure"),
    )
    op.create_table(
        "tombstone",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("erasure_id", sa.String(36), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasure.id"], name="fk_tombstone_erasure_id_erasure"),
        sa.PrimaryKeyConstraint("id", name="pk_tombstone"),
    )
    op.create_index("ix_tombstone_erasure_id", "tombstone", ["erasure_id"])
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("began_at", sa.String(32), nullable=False),
        sa.Column("ended_at", sa.String(32), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("via", sa.Text(), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("faces", sa.Integer(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )


def _generations() -> None:
    """The model moves out of the gallery's row: there can be two while a gallery is embedded anew."""
    op.create_table(
        "generation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("folder", sa.String(64), nullable=False),
        sa.Column("card_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_generation"),
    )
    connection = op.get_bind()
    connection.execute(
        sa.text(
            "INSERT INTO generation (id, fingerprint, dimension, folder, card_sha256, created_at) "
            "SELECT 1, fingerprint, dimension, 'model', :card, created_at FROM gallery"
        ),
        {"card": _card_sha256(connection)},
    )
    with op.batch_alter_table("segment") as segment:
        segment.add_column(sa.Column("generation_id", sa.Integer(), nullable=False, server_default="1"))
        segment.create_foreign_key(
            "fk_segment_generation_id_generation", "generation", ["generation_id"], ["id"]
        )
    with op.batch_alter_table("segment") as segment:
        segment.alter_column("generation_id", server_default=None)
        segment.create_index("ix_segment_generation_id", ["generation_id"])


def _card_sha256(connection: sa.Connection) -> str:
    """Of the model's card, which older versions did not write down; of nothing where it is missing."""
    card = Path(connection.engine.url.database or "").parent / "model" / "bundle.json"
    return hashlib.sha256(card.read_bytes() if card.is_file() else b"").hexdigest()


def _files() -> None:
    op.create_table(
        "file",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("face_id", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["face_id"], ["face.id"], name="fk_file_face_id_face"),
        sa.PrimaryKeyConstraint("id", name="pk_file"),
        sa.UniqueConstraint("path", name="uq_file_path"),
    )
    op.create_index("ix_file_face_id", "file", ["face_id"])
    # Where a file's content had changed, older versions kept both faces. The path is the newer one's.
    op.execute(
        "INSERT INTO file (face_id, path) SELECT max(id), path FROM face WHERE path IS NOT NULL "
        "GROUP BY path ORDER BY max(id)"
    )
    # Not in batch mode, which would make the table anew under the foreign keys that point to it.
    op.drop_index("ix_face_path", "face")
    op.drop_column("face", "path")


def _gallery() -> None:
    with op.batch_alter_table("gallery") as gallery:
        gallery.drop_column("fingerprint")
        gallery.drop_column("dimension")
        for name, value in {
            "generation_id": "1",
            "revision": "1",
            "revision_check": "-1",
            "next_identity_id": "1",
            "next_generation_id": "2",
        }.items():
            gallery.add_column(sa.Column(name, sa.Integer(), nullable=False, server_default=value))
        gallery.add_column(sa.Column("unfinished", sa.Text(), nullable=True))
    with op.batch_alter_table("gallery") as gallery:
        for name in ("generation_id", "revision", "revision_check", "next_identity_id", "next_generation_id"):
            gallery.alter_column(name, server_default=None)
        gallery.create_foreign_key(
            "fk_gallery_generation_id_generation", "generation", ["generation_id"], ["id"]
        )
    op.execute("UPDATE gallery SET next_identity_id = 1 + coalesce((SELECT max(id) FROM identity), 0)")


def downgrade() -> None:
    """What the older version has no place for is lost: further files, other generations, the logs."""
    op.execute("DELETE FROM segment WHERE generation_id <> (SELECT generation_id FROM gallery)")
    with op.batch_alter_table("gallery") as gallery:
        gallery.add_column(sa.Column("fingerprint", sa.String(64), nullable=False, server_default=""))
        gallery.add_column(sa.Column("dimension", sa.Integer(), nullable=False, server_default="0"))
    for column in ("fingerprint", "dimension"):
        op.execute(
            f"UPDATE gallery SET {column} = "
            f"(SELECT g.{column} FROM generation g WHERE g.id = gallery.generation_id)"
        )
    with op.batch_alter_table("gallery") as gallery:
        gallery.drop_constraint("fk_gallery_generation_id_generation", type_="foreignkey")
        for name in (
            "generation_id",
            "revision",
            "revision_check",
            "next_identity_id",
            "next_generation_id",
            "unfinished",
        ):
            gallery.drop_column(name)
        for name in ("fingerprint", "dimension"):
            gallery.alter_column(name, server_default=None)
    with op.batch_alter_table("segment") as segment:
        segment.drop_index("ix_segment_generation_id")
        segment.drop_constraint("fk_segment_generation_id_generation", type_="foreignkey")
        segment.drop_column("generation_id")
    op.add_column("face", sa.Column("path", sa.Text(), nullable=True))
    op.create_index("ix_face_path", "face", ["path"])
    op.execute(
        "UPDATE face SET path = (SELECT path FROM file f WHERE f.face_id = face.id ORDER BY f.id LIMIT 1)"
    )
    for table in ("audit", "tombstone", "erasure", "merger", "alias", "file", "generation"):
        op.drop_table(table)
