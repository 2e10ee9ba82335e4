"""Faces that a damaged model may have embedded, until they were compared with their photos."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "suspect",
        sa.Column("generation_id", sa.Integer(), nullable=False),
        sa.Column("first_id", sa.Integer(), nullable=False),
        sa.Column("end_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["generation_id"], ["generation.id"], name="fk_suspect_generation_id_generation"
        ),
        sa.PrimaryKeyConstraint("generation_id", "first_id", name="pk_suspect"),
    )


def downgrade() -> None:
    """A model with suspects is taken for never proven: the next finding about it makes all faces suspect."""
    op.execute("UPDATE generation SET checked_before = NULL WHERE id IN (SELECT generation_id FROM suspect)")
    op.drop_table("suspect")
