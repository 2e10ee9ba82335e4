"""What a file was when it was read: size, time and inode, so that an unchanged one need not be read again."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COLUMNS = ("size", "mtime_ns", "inode")


def upgrade() -> None:
    # Not in batch mode, which would make the table anew.
    for name in _COLUMNS:
        op.add_column("file", sa.Column(name, sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Every file is read again by the next ingest."""
    for name in reversed(_COLUMNS):
        op.drop_column("file", name)
