"""Jobs know the Idempotency-Key that they were asked for with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("video_jobs", sa.Column("idempotency_key", sa.String(64)))
    op.create_index("video_jobs_by_key", "video_jobs", ["idempotency_key"], unique=True)


def downgrade() -> None:
    op.drop_index("video_jobs_by_key")
    op.drop_column("video_jobs", "idempotency_key")
