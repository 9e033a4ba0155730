"""Validation examples, and the loss of the mixture on them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("cocktails", sa.Column("validation_loss", sa.Float(53)))
    op.create_table(
        "validation_examples",
        sa.Column("uid", sa.String(32), sa.ForeignKey("cocktails.uid", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("body", sa.JSON, nullable=False),
    )
