"""Several data sets, devices, grants, cached releases; wrapped keys and tags move away from the pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import context, op

from flep_fl.private_database.sealing import blind_index, index_key, padded, seal, unseal, wrapping_key

revision = "0002"
down_revision = "0001"

_ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_DESCRIPTION_BYTES = 1024
_LOG_BYTES = 512
_TEST_FRACTION = 0.2


def upgrade() -> None:
    """Make the new tables and move what the old ones hold, in the caller's transaction."""
    connection = op.get_bind()
    head = connection.execute(sa.text("SELECT salt, sealed FROM meta WHERE id = 1")).one_or_none()
    log = connection.execute(
        sa.text("SELECT record_id, sealed_grant, released_at FROM releases ORDER BY id")
    ).all()
    op.drop_table("releases")
    op.add_column("meta", sa.Column("sealed_clock", sa.LargeBinary))
    if head is None:  # a database that is being made
        op.drop_table("records")
        _create_tables()
        return
    op.rename_table("records", "records_1")
    _create_tables()
    key = wrapping_key(context.config.attributes["owner_key"], head.salt)
    _move(connection, key, head.sealed, log)
    op.drop_table("records_1")


def _move(connection: sa.Connection, key: bytes, sealed: bytes, log: Sequence[Any]) -> None:
    old = json.loads(unseal(key, sealed, what="description", place="meta"))
    name = old["dataset"]
    description = {
        "name": name,
        "classes": old["classes"],
        "test_fraction": _TEST_FRACTION,
        "noise_secret": None,
    }
    index = blind_index(index_key(key), "dataset", name)
    connection.execute(
        sa.text(
            "INSERT INTO datasets (id, name_index, sealed, epoch, releases) VALUES (1, :index, :sealed, 0, 0)"
        ),
        {
            "index": index,
            "sealed": seal(
                key,
                padded(json.dumps(description).encode(), _DESCRIPTION_BYTES),
                what="dataset",
                place=index.hex(),
            ),
        },
    )
    connection.execute(
        sa.text(
            "INSERT INTO records (record_id, dataset_id, wrapped_key, sealed_tags) "
            "SELECT record_id, 1, wrapped_key, sealed_tags FROM records_1"
        )
    )
    connection.execute(
        sa.text(
            "INSERT INTO images (seq, sealed_image) SELECT records.seq, records_1.sealed_image "
            "FROM records_1 JOIN records ON records.record_id = records_1.record_id"
        )
    )
    for record_id, sealed_grant, released_at in log:
        grant = json.loads(unseal(key, sealed_grant, what="grant", place=record_id))
        entry = {**grant, "at": f"{str(released_at).replace(' ', 'T')}+00:00", "record_id": record_id}
        plain = padded(json.dumps(entry).encode(), _LOG_BYTES)
        connection.execute(
            sa.text("INSERT INTO access_log (sealed) VALUES (:sealed)"),
            {"sealed": seal(key, plain, what="access", place="log")},
        )
    plain = padded(json.dumps({"format": 2}).encode(), _DESCRIPTION_BYTES)
    connection.execute(
        sa.text("UPDATE meta SET version = 2, sealed = :sealed WHERE id = 1"),
        {"sealed": seal(key, plain, what="description", place="meta")},
    )


def _create_tables() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", _ROW, primary_key=True),
        sa.Column("name_index", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("releases", sa.Integer, nullable=False),
    )
    op.create_table(
        "epochs",
        sa.Column("dataset_id", _ROW, sa.ForeignKey("datasets.id"), primary_key=True),
        sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("sealed_bundle", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "records",
        sa.Column("seq", _ROW, primary_key=True),
        sa.Column("record_id", sa.String(32), nullable=False, unique=True),
        sa.Column("dataset_id", _ROW, sa.ForeignKey("datasets.id"), nullable=False),
        sa.Column("origin", sa.LargeBinary, unique=True),
        sa.Column("request", sa.LargeBinary, unique=True),
        sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
        sa.Column("sealed_tags", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_records_dataset_id", "records", ["dataset_id"])
    op.create_table(
        "images",
        sa.Column("seq", _ROW, sa.ForeignKey("records.seq"), primary_key=True, autoincrement=False),
        sa.Column("sealed_image", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "devices",
        sa.Column("device_index", sa.LargeBinary, primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "released",
        sa.Column("dataset_id", _ROW, sa.ForeignKey("datasets.id"), primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("seq", _ROW, sa.ForeignKey("records.seq"), nullable=False),
        sa.Column("bucket", sa.Integer, nullable=False),
        sa.Column("sealed_entry", sa.LargeBinary, nullable=False),
        sa.Column("sealed_parts", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_released_seq", "released", ["seq"])
    op.create_table(
        "snapshots",
        sa.Column("id", _ROW, primary_key=True),
        sa.Column("release_id", sa.String(32), nullable=False, unique=True),
        sa.Column("dataset_id", _ROW, sa.ForeignKey("datasets.id"), nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("last", sa.Integer, nullable=False),
        sa.Column("stale", sa.Boolean, nullable=False),
        sa.Column("sealed_head", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_snapshots_dataset_id", "snapshots", ["dataset_id"])
    op.create_table(
        "grants",
        sa.Column("id", _ROW, primary_key=True),
        sa.Column("grant_id", sa.String(32), nullable=False, unique=True),
        sa.Column("dataset_id", _ROW, sa.ForeignKey("datasets.id"), nullable=False),
        sa.Column("analyst_index", sa.LargeBinary, nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_grants_analyst_index", "grants", ["analyst_index"])
    op.create_table(
        "access_log",
        sa.Column("id", _ROW, primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
