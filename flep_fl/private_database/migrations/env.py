"""Alembic's entry: runs the migrations on the connection, and in the transaction, that the caller opened."""

from __future__ import annotations

from alembic import context

from flep_fl.private_database.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
