"""How Alembic reaches the tables: over the connection that is being opened."""

from __future__ import annotations

from alembic import context

from darkroom.server.jobs import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
