"""Frames of a clip are limited by model, and all media by tenant."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

OF_TENANTS = ("max_images", "max_videos", "max_frames")


def upgrade() -> None:
    op.add_column("served_models", sa.Column("max_frames", sa.Integer(), nullable=True))
    for name in OF_TENANTS:
        op.add_column("tenants", sa.Column(name, sa.Integer(), nullable=True))


def downgrade() -> None:
    for name in reversed(OF_TENANTS):
        op.drop_column("tenants", name)
    op.drop_column("served_models", "max_frames")
