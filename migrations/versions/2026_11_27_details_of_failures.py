"""What is kept of an item that failed, beside its code and message. It had none before."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

JSONS = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("items", sa.Column("error_details", JSONS, nullable=True))


def downgrade() -> None:
    op.drop_column("items", "error_details")
