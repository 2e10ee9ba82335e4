"""Alembic's entry: runs on the connection that `database.store` hands over, or on `-x gallery=FOLDER`."""

from alembic import context
from sqlalchemy import URL, Connection, create_engine

from retrieval.database.tables import metadata


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


connection = context.config.attributes.get("connection")
if connection is not None:
    run(connection)
else:
    folder = context.get_x_argument(as_dictionary=True).get("gallery")
    if folder is None:
        raise SystemExit("name a gallery: alembic -x gallery=FOLDER ...")
    with create_engine(URL.create("sqlite", database=f"{folder}/gallery.db")).begin() as opened:
        run(opened)
