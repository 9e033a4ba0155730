"""Several gateways on one store: who they are, whose each unfinished cocktail is, and what changed since when."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("cocktails", sa.Column("owner", sa.String(32)))
    op.add_column("cocktails", sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("cocktails", sa.Column("change", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("ix_cocktails_change", "cocktails", ["change"])
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("place", sa.String(32), nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "removals",
        sa.Column("uid", sa.String(32), primary_key=True),
        sa.Column("change", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_removals_change", "removals", ["change"])
    op.create_table(
        "changes",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("forgotten", sa.BigInteger, nullable=False),
    )
    # a version asked for is numbered by its change from now on, and comes behind all there are
    op.execute("INSERT INTO changes (id, last, forgotten) SELECT 1, COALESCE(MAX(sequence), 0), 0 FROM cocktails")
