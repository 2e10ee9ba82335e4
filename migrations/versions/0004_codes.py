"""Bases learned from a generation's vectors, and the codes of its segments in them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "basis",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("generation_id", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("coordinates", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("learned_at", sa.String(32), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["generation_id"], ["generation.id"], name="fk_basis_generation_id_generation"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_basis"),
    )
    op.create_index("ix_basis_generation_id", "basis", ["generation_id"])
    op.create_table(
        "codes",
        sa.Column("segment_id", sa.Integer(), nullable=False),
        sa.Column("basis_id", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("error", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["segment_id"], ["segment.id"], name="fk_codes_segment_id_segment"),
        sa.ForeignKeyConstraint(["basis_id"], ["basis.id"], name="fk_codes_basis_id_basis"),
        sa.PrimaryKeyConstraint("segment_id", name="pk_codes"),
    )
    op.create_index("ix_codes_basis_id", "codes", ["basis_id"])
    # In two steps: SQLite takes a new column that must have a value only with a default.
    with op.batch_alter_table("gallery") as gallery:
        gallery.add_column(sa.Column("next_basis_id", sa.Integer(), nullable=False, server_default="1"))
    with op.batch_alter_table("gallery") as gallery:
        gallery.alter_column("next_basis_id", server_default=None)


def downgrade() -> None:
    """The files of bases and codes are leftovers then, and searches read every vector."""
    with op.batch_alter_table("gallery") as gallery:
        gallery.drop_column("next_basis_id")
    op.drop_table("codes")
    op.drop_table("basis")
