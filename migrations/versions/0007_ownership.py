"""The id of the folder of vectors, how far a model is proven, and the hosts that photos were fetched from."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not in batch mode, which would make the tables anew.
    op.add_column("gallery", sa.Column("folder_id", sa.String(36), nullable=True))
    op.add_column("generation", sa.Column("checked_before", sa.Integer(), nullable=True))
    op.create_table(
        "host",
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_host"),
    )


def downgrade() -> None:
    """The folder of vectors is taken for the gallery's own, and no model for proven."""
    op.drop_table("host")
    op.drop_column("generation", "checked_before")
    op.drop_column("gallery", "folder_id")
