"""Fine-tuning jobs and their events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "fine_tuning_jobs",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("uid", sa.String(32), sa.ForeignKey("cocktails.uid", ondelete="SET NULL")),
        sa.Column("cocktail_id", sa.String(80), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("finished_at", sa.Float(53)),
        sa.Column("error", sa.JSON),
    )
    op.create_index("ix_fine_tuning_jobs_tenant", "fine_tuning_jobs", ["tenant", "id"])
    op.create_index("ix_fine_tuning_jobs_digest", "fine_tuning_jobs", ["tenant", "request_digest"])
    op.create_index("ix_fine_tuning_jobs_uid", "fine_tuning_jobs", ["uid"])
    job_id = "fine_tuning_jobs.id"
    op.create_table(
        "fine_tuning_metadata",
        sa.Column("job_id", sa.String(40), sa.ForeignKey(job_id, ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(512), nullable=False),
    )
    op.create_table(
        "fine_tuning_events",
        sa.Column("job_id", sa.String(40), sa.ForeignKey(job_id, ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.JSON),
        sa.Column("is_metrics", sa.Boolean, nullable=False),
    )
