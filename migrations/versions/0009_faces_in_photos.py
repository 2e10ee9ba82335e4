"""Several faces a photo: a photo has bytes and files, and each of its faces a place in it."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_MEASURES = ("score", "sharpness", "yaw")


def upgrade() -> None:
    op.create_table(
        "photo",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_photo"),
        sa.UniqueConstraint("sha256", name="uq_photo_sha256"),
    )
    # A photo had one face: it gets the id of that face, which is never used again.
    op.execute("INSERT INTO photo (id, sha256) SELECT id, sha256 FROM face ORDER BY id")
    # First the table that refers to `face`, so that nothing does when that one is made anew.
    with op.batch_alter_table("file", recreate="always") as file:
        file.drop_index("ix_file_face_id")
        file.drop_constraint("fk_file_face_id_face", type_="foreignkey")
        file.alter_column("face_id", new_column_name="photo_id")
    with op.batch_alter_table("file", recreate="always") as file:
        file.create_foreign_key("fk_file_photo_id_photo", "photo", ["photo_id"], ["id"])
    op.create_index("ix_file_photo_id", "file", ["photo_id"])
    with op.batch_alter_table("face", recreate="always") as face:
        face.drop_constraint("uq_face_sha256", type_="unique")
        face.drop_column("sha256")
        face.add_column(sa.Column("photo_id", sa.Integer(), nullable=False, server_default="0"))
        face.add_column(sa.Column("box", sa.Text(), nullable=False, server_default=""))
        face.add_column(sa.Column("landmarks", sa.Text(), nullable=True))
        for name in _MEASURES:
            face.add_column(sa.Column(name, sa.Float(), nullable=True))
    op.execute("UPDATE face SET photo_id = id")
    with op.batch_alter_table("face", recreate="always") as face:
        face.alter_column("photo_id", server_default=None)
        face.alter_column("box", server_default=None)
        face.create_foreign_key("fk_face_photo_id_photo", "photo", ["photo_id"], ["id"])
        face.create_unique_constraint("uq_face_photo_id", ["photo_id", "box"])


def downgrade() -> None:
    """What the older version has no place for is lost: further faces of a photo, and places in photos."""
    op.execute("DELETE FROM face WHERE id NOT IN (SELECT min(id) FROM face GROUP BY photo_id)")
    with op.batch_alter_table("face", recreate="always") as face:
        face.drop_constraint("uq_face_photo_id", type_="unique")
        face.drop_constraint("fk_face_photo_id_photo", type_="foreignkey")
        face.add_column(sa.Column("sha256", sa.String(64), nullable=False, server_default=""))
        for name in ("box", "landmarks", *_MEASURES):
            face.drop_column(name)
    op.execute("UPDATE face SET sha256 = (SELECT p.sha256 FROM photo p WHERE p.id = face.photo_id)")
    with op.batch_alter_table("file", recreate="always") as file:
        file.drop_index("ix_file_photo_id")
        file.drop_constraint("fk_file_photo_id_photo", type_="foreignkey")
        file.alter_column("photo_id", new_column_name="face_id")
    op.execute("UPDATE file SET face_id = (SELECT f.id FROM face f WHERE f.photo_id = file.face_id)")
    with op.batch_alter_table("face", recreate="always") as face:
        face.alter_column("sha256", server_default=None)
        face.drop_column("photo_id")
        face.create_unique_constraint("uq_face_sha256", ["sha256"])
    with op.batch_alter_table("file", recreate="always") as file:
        file.create_foreign_key("fk_file_face_id_face", "face", ["face_id"], ["id"])
    op.create_index("ix_file_face_id", "file", ["face_id"])
    op.drop_table("photo")
