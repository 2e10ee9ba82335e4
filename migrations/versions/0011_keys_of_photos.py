"""Keys by which SQLite finds a photo by its SHA-256, instead of a unique index of the SHA-256 itself."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_COPY = "_alembic_tmp_photo"

# The key in PostgreSQL's terms; see `_key`.
_KEY = """
    ((id >> 19) & 2147483647) << 32
    | CASE WHEN sha256 ~ '^[0-9a-f]{8}' THEN ('x' || left(sha256, 8))::bit(32)::bigint ELSE 0 END
"""


def upgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        # A server keeps the unique index, and finds photos by it.
        op.add_column("photo", sa.Column("sha256_key", sa.BigInteger(), nullable=True))
        op.execute(f"UPDATE photo SET sha256_key = {_KEY}")
        op.alter_column("photo", "sha256_key", nullable=False)
        return
    driver = op.get_bind().connection.driver_connection
    assert driver is not None  # a connection in use has one
    driver.create_function("faceprint_key", 2, _key, deterministic=True)
    # A damaged database may have a text that is not in UTF-8, which sqlite3 hands over as bytes only.
    _replace("faceprint_key(id, CAST(sha256 AS BLOB))", sa.Column("sha256_key", sa.Integer(), nullable=False))
    driver.create_function("faceprint_key", 2, None)
    op.create_index("ix_photo_sha256_key", "photo", ["sha256_key"])


def downgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.drop_column("photo", "sha256_key")
        return
    _replace(None, sa.UniqueConstraint("sha256", name="uq_photo_sha256"))


def _key(number: int, sha256: bytes) -> int:
    """Returns the key of a photo, as `retrieval.database.photo_keys` did at this version."""
    try:
        prefix = int(sha256.decode()[:8], 16) & 0xFFFFFFFF
    except ValueError:
        prefix = 0
    return (number >> 19 & 0x7FFFFFFF) << 32 | prefix


def _replace(key: str | None, *more: sa.Column[int] | sa.UniqueConstraint) -> None:
    """Makes the table anew with more columns or constraints; `key` is the expression of the key.

    `face` and `file` refer to it. SQLite counts their rows that refer to no photo, and forgets each when its
    photo is inserted again, so none may be left at the commit.
    """
    columns = "id, sha256, closed" + (", sha256_key" if key else "")
    values = "id, sha256, closed" + (f", {key}" if key else "")
    _create(_COPY, *(one for one in more if isinstance(one, sa.Column)))
    op.execute(f"INSERT INTO {_COPY} ({columns}) SELECT {values} FROM photo ORDER BY id")
    op.execute("PRAGMA defer_foreign_keys = ON")
    op.execute("DROP TABLE photo")
    _create("photo", *more)
    op.execute(f"INSERT INTO photo ({columns}) SELECT {columns} FROM {_COPY} ORDER BY id")
    op.drop_table(_COPY)


def _create(name: str, *more: sa.Column[int] | sa.UniqueConstraint) -> None:
    op.create_table(
        name,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("closed", sa.Integer(), nullable=False),
        *more,
        sa.PrimaryKeyConstraint("id", name="pk_photo"),
    )
