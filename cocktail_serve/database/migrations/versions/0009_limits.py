"""Limits of tenants, and what is counted against them: the size of a cocktail's examples, and whose key made it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("limits", sa.JSON))
    op.add_column("cocktails", sa.Column("key_id", sa.String(12)))
    op.add_column("cocktails", sa.Column("example_bytes", sa.BigInteger, nullable=False, server_default="0"))
    for table in ("examples", "validation_examples"):
        of_cocktail = f"SELECT SUM(LENGTH(CAST(body AS TEXT))) FROM {table} WHERE {table}.uid = cocktails.uid"
        op.execute(f"UPDATE cocktails SET example_bytes = example_bytes + COALESCE(({of_cocktail}), 0)")
