"""The distance beyond which a search names nobody: where it was found to lie, for a generation's vectors."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "calibration",
        sa.Column("generation_id", sa.Integer(), nullable=False),
        sa.Column("found_at", sa.String(32), nullable=False),
        sa.Column("strangers", sa.String(16), nullable=False),
        sa.Column("faces", sa.Integer(), nullable=False),
        sa.Column("identities", sa.Integer(), nullable=False),
        sa.Column("searches", sa.Integer(), nullable=False),
        sa.Column("people", sa.Integer(), nullable=False),
        sa.Column("trained", sa.Integer(), nullable=False),
        sa.Column("fpir", sa.Float(), nullable=False),
        sa.Column("points", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["generation_id"], ["generation.id"], name="fk_calibration_generation_id_generation"
        ),
        sa.PrimaryKeyConstraint("generation_id", name="pk_calibration"),
    )


def downgrade() -> None:
    """Searches decide nothing then, until the gallery is calibrated again."""
    op.drop_table("calibration")
