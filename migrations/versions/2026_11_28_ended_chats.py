"""
Chats that ended long ago are found, and go without a look at every other job.

When a job or a file goes, the database asks whether a job points to it.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

POINTERS = ("retry_of", "output_file_id", "error_file_id")


def _only(rows: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(rows), "sqlite_where": sa.text(rows)}


def upgrade() -> None:
    op.create_index("ix_jobs_chats", "jobs", ["created_at"], **_only("priority = -1000"))
    for name in POINTERS:
        op.create_index(f"ix_jobs_{name}", "jobs", [name], **_only(f"{name} IS NOT NULL"))


def downgrade() -> None:
    for name in reversed(POINTERS):
        op.drop_index(f"ix_jobs_{name}", "jobs")
    op.drop_index("ix_jobs_chats", "jobs")
