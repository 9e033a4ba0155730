"""Batches, and what files are for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("files", sa.Column("purpose", sa.String(32), nullable=False, server_default="fine-tune"))
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("key_id", sa.String(12)),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.String(40), nullable=False),
        sa.Column("completion_window", sa.String(8), nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("output_expires_after_s", sa.Integer),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        *(
            sa.Column(f"{status}_at", sa.Float(53))
            for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        ),
        *(
            sa.Column(name, sa.Integer, nullable=False, server_default="0")
            for name in ("num_total", "num_completed", "num_failed")
        ),
        sa.Column("output_file_id", sa.String(40)),
        sa.Column("error_file_id", sa.String(40)),
        sa.Column("errors", sa.JSON),
        sa.Column("owner", sa.String(32)),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_index("ix_batches_tenant", "batches", ["tenant", "id"])
    op.create_index("ix_batches_status", "batches", ["status"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(40), sa.ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("request", sa.LargeBinary),
        sa.Column("answer", sa.LargeBinary),
        sa.Column("is_error", sa.Boolean),
    )
