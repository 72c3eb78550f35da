"""Runs Keel's migrations on the connection that the caller opened (keel.store.engine.alembic_config)."""

from alembic import context

from keel.store.engine import VERSION_TABLE
from keel.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
