"""The first tables: the gallery itself, identities, faces, segments."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "gallery",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("uuid", sa.String(36), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("next_face_id", sa.Integer(), nullable=False),
        sa.Column("next_segment_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gallery"),
    )
    op.create_table(
        "identity",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_identity"),
        sa.UniqueConstraint("name", name="uq_identity_name"),
    )
    op.create_table(
        "face",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("identity_id", sa.Integer(), nullable=True),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("enrolled_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["identity_id"], ["identity.id"], name="fk_face_identity_id_identity"),
        sa.PrimaryKeyConstraint("id", name="pk_face"),
        sa.UniqueConstraint("sha256", name="uq_face_sha256"),
    )
    op.create_index("ix_face_identity_id", "face", ["identity_id"])
    op.create_index("ix_face_path", "face", ["path"])
    op.create_table(
        "segment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_segment"),
    )


def downgrade() -> None:
    for table in ("segment", "face", "identity", "gallery"):
        op.drop_table(table)
