"""The merging weights that were tried for a cocktail."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("cocktails", sa.Column("candidates", sa.JSON))
