"""Jobs know since when their picture cannot be read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("video_jobs", sa.Column("unread_since", sa.Double))


def downgrade() -> None:
    op.drop_column("video_jobs", "unread_since")
