"""What the engines of workers have done and hold, for whoever watches them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

JSONS = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "serving_engines",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("alive_until", sa.Double(), nullable=False),
        sa.Column("usage", JSONS, nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_serving_engines"),
    )


def downgrade() -> None:
    op.drop_table("serving_engines")
