"""The first table."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "video_jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("seconds", sa.String(16), nullable=False),
        sa.Column("remixed_from", sa.String(64)),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("has_picture", sa.Boolean, nullable=False),
        sa.Column("claim", sa.String(32), nullable=False),
        sa.Column("lease", sa.Double, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
    op.create_index("video_jobs_by_status", "video_jobs", ["status", "id"])


def downgrade() -> None:
    op.drop_table("video_jobs")
