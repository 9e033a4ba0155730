"""Cocktails, their examples, pins, and kept scores."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "cocktails",
        sa.Column("uid", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("pool_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("ready_at", sa.Float(53)),
        sa.Column("used_at", sa.Float(53), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Float(53), nullable=False),
        sa.Column("losses", sa.JSON, nullable=False),
        sa.Column("merging_weights", sa.JSON),
        sa.Column("entropy", sa.Float(53)),
        sa.Column("mixed_loss", sa.Float(53)),
        sa.Column("recipe", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("warnings", sa.JSON, nullable=False),
        sa.UniqueConstraint("tenant", "name", "digest"),
    )
    op.create_table(
        "examples",
        _uid_of_cocktail(primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_table("items", _uid_of_cocktail(primary_key=True), sa.Column("item", sa.String(64), primary_key=True))
    op.create_index("ix_items_item", "items", ["item"])
    op.create_table(
        "pins",
        sa.Column("tenant", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        _uid_of_cocktail(nullable=False),
    )
    op.create_table("losses", *_score_key(), sa.Column("loss", sa.Float(53), nullable=False))
    op.create_table("embeddings", *_score_key(), sa.Column("vector", sa.LargeBinary, nullable=False))


def _uid_of_cocktail(*, primary_key: bool = False, nullable: bool = False) -> sa.Column[str]:
    key = sa.ForeignKey("cocktails.uid", ondelete="CASCADE")
    return sa.Column("uid", sa.String(32), key, primary_key=primary_key, nullable=nullable)


def _score_key() -> list[sa.Column[str]]:
    return [
        sa.Column("tenant", sa.String(255), primary_key=True),
        sa.Column("item", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(64), primary_key=True),
        sa.Column("variant", sa.String(64), primary_key=True),
    ]
