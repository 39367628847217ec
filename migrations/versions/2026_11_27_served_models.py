"""The models that workers serve, with the limits of a prompt."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "served_models",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("max_images", sa.Integer(), nullable=False),
        sa.Column("max_videos", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_served_models"),
    )


def downgrade() -> None:
    op.drop_table("served_models")
