"""What it takes to undo a merge of identities, and what was decided about the doubts of an audit."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_merges()
    _create_doubts()


def downgrade() -> None:
    """No earlier merge can be undone then, and a dismissed doubt is one again."""
    for name in ("doubt_identity", "doubt_face", "doubt", "merge_label", "merge_name", "merge_face", "merge"):
        op.drop_table(name)


def _create_merges() -> None:
    op.create_table(
        "merge",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("merged_at", sa.String(32), nullable=False),
        sa.Column("identity_id", sa.Integer(), nullable=False),
        sa.Column("into_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("filled", sa.Text(), nullable=False),
        sa.Column("faces", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_merge"),
        sa.UniqueConstraint("identity_id", name="uq_merge_identity_id"),
    )
    op.create_table(
        "merge_face",
        sa.Column("merge_id", sa.Integer(), nullable=False),
        sa.Column("face_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["merge_id"], ["merge.id"], name="fk_merge_face_merge_id_merge"),
        sa.ForeignKeyConstraint(["face_id"], ["face.id"], name="fk_merge_face_face_id_face"),
        sa.PrimaryKeyConstraint("merge_id", "face_id", name="pk_merge_face"),
    )
    op.create_index("ix_merge_face_face_id", "merge_face", ["face_id"])
    op.create_table(
        "merge_name",
        sa.Column("merge_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["merge_id"], ["merge.id"], name="fk_merge_name_merge_id_merge"),
        sa.PrimaryKeyConstraint("merge_id", "name", name="pk_merge_name"),
    )
    op.create_table(
        "merge_label",
        sa.Column("merge_id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("output", sa.Integer(), nullable=False),
        sa.Column("photos", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["merge_id"], ["merge.id"], name="fk_merge_label_merge_id_merge"),
        sa.PrimaryKeyConstraint("merge_id", "fingerprint", "output", name="pk_merge_label"),
    )


def _create_doubts() -> None:
    op.create_table(
        "doubt",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("place", sa.Integer(), nullable=True),
        sa.Column("score", sa.Float(), nullable=True),
        sa.Column("measured", sa.JSON(), nullable=True),
        sa.Column("decided_at", sa.String(32), nullable=True),
        sa.Column("merge_id", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_doubt"),
    )
    op.create_table(
        "doubt_face",
        sa.Column("doubt_id", sa.Text(), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("face_id", sa.Integer(), nullable=False),
        sa.Column("doubted", sa.Integer(), nullable=False),
        sa.Column("identity_id", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["doubt_id"], ["doubt.id"], name="fk_doubt_face_doubt_id_doubt"),
        sa.ForeignKeyConstraint(["face_id"], ["face.id"], name="fk_doubt_face_face_id_face"),
        sa.PrimaryKeyConstraint("doubt_id", "part", "place", name="pk_doubt_face"),
    )
    op.create_index("ix_doubt_face_face_id", "doubt_face", ["face_id"])
    op.create_table(
        "doubt_identity",
        sa.Column("doubt_id", sa.Text(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("identity_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["doubt_id"], ["doubt.id"], name="fk_doubt_identity_doubt_id_doubt"),
        sa.PrimaryKeyConstraint("doubt_id", "place", name="pk_doubt_identity"),
    )
