"""The tables of release 0.1: one data set, 8-bit grey images, archives only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables as release 0.1 did."""
    op.create_table(
        "meta",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "records",
        sa.Column("record_id", sa.String(32), primary_key=True),
        sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
        sa.Column("sealed_tags", sa.LargeBinary, nullable=False),
        sa.Column("sealed_image", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "releases",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("record_id", sa.String(32), sa.ForeignKey("records.record_id"), nullable=False),
        sa.Column("sealed_grant", sa.LargeBinary, nullable=False),
        sa.Column("released_at", sa.DateTime, nullable=False),
    )
    op.create_index("ix_releases_record_id", "releases", ["record_id"])
