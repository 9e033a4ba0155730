"""What tenants used, and who changed what."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(255), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("key_id", sa.String(12), primary_key=True),
        sa.Column("model", sa.String(160), primary_key=True),
        sa.Column("pool", sa.String(64), nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("tokens_in", sa.BigInteger, nullable=False),
        sa.Column("tokens_out", sa.BigInteger, nullable=False),
        sa.Column("scoring_s", sa.Float(53), nullable=False),
        sa.Column("mixing_s", sa.Float(53), nullable=False),
    )
    op.create_index("ix_usage_day", "usage", ["day"])
    op.create_table(
        "usage_writers",
        sa.Column("writer", sa.String(32), primary_key=True),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("written_at", sa.Float(53), nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("actor_tenant", sa.String(255)),
        sa.Column("actor_key", sa.String(12)),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(255)),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("ix_audit_tenant", "audit", ["tenant", "id"])
