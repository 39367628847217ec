"""
Lists and repeated submissions pass chats by.

Each chat leaves a job and a file that no list shows: indexes that hold them would be scanned past
them, page after page.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _only(rows: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(rows), "sqlite_where": sa.text(rows)}


def upgrade() -> None:
    op.drop_index("ix_jobs_tenant_id_id", "jobs")
    op.create_index("ix_jobs_listed", "jobs", ["tenant_id", "id"], **_only("priority > -1000"))
    op.create_index(
        "ix_jobs_twins",
        "jobs",
        ["tenant_id", "body_sha256", "id"],
        **_only("priority > -1000"),
    )
    op.drop_index("ix_files_tenant_id_id", "files")
    op.create_index(
        "ix_files_listed",
        "files",
        ["tenant_id", "id"],
        **_only("deleted_at IS NULL AND purpose <> 'request'"),
    )


def downgrade() -> None:
    op.drop_index("ix_files_listed", "files")
    op.create_index("ix_files_tenant_id_id", "files", ["tenant_id", "id"])
    op.drop_index("ix_jobs_twins", "jobs")
    op.drop_index("ix_jobs_listed", "jobs")
    op.create_index("ix_jobs_tenant_id_id", "jobs", ["tenant_id", "id"])
