"""How many prompt tokens were copied and not read, beside the other counts of tokens. It was not kept before."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

KINDS = {"jobs": sa.BigInteger(), "results": sa.Integer(), "parts": sa.Integer()}


def upgrade() -> None:
    for table, kind in KINDS.items():
        column = sa.Column("num_cached_tokens", kind, server_default="0", nullable=False)
        op.add_column(table, column)


def downgrade() -> None:
    for table in reversed(KINDS):
        op.drop_column(table, "num_cached_tokens")
