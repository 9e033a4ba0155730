"""Tenants and their keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("pools", sa.JSON),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("tenant", sa.String(255), sa.ForeignKey("tenants.name"), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
        sa.Column("revoked_at", sa.Float(53)),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"])
