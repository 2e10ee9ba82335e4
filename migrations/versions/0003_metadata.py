"""What people say about faces and identities: a JSON object each."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not in batch mode, which would make the tables anew under the foreign keys that point to them.
    for table in ("face", "identity"):
        op.add_column(table, sa.Column("metadata", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    """What the older version has no place for is lost."""
    for table in ("identity", "face"):
        op.drop_column(table, "metadata")
