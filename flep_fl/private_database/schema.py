"""Tables of the private database: sealed columns under random identifiers.

What is not sealed is a count, a size, a random identifier, or the order in which rows came:

- ``records`` has one small row per image: the data key (wrapped under the owner's key) and the tags (sealed
  under the data key), so that a rotation of the owner's key rewrites small rows and no image.
- ``images`` has the sealed pixels.
- ``released`` caches what the image cipher made of a record in one key epoch, sealed under the record's data
  key: who destroys that key destroys the copies as well.
- ``snapshots`` names frozen releases: all rows of ``released`` up to a position.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

FORMAT_VERSION = 2
HEAD = "0002"
"""The newest migration; a database that says so needs none."""

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
}

RowNumber = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts rows by itself for ``INTEGER`` alone."""

metadata = MetaData(naming_convention=NAMING)

meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("sealed_clock", LargeBinary),
)
"""One row: what this database is. ``salt`` makes the wrapping key, ``sealed`` is the test of the owner's key,
``sealed_clock`` the latest time that was seen."""

datasets = Table(
    "datasets",
    metadata,
    Column("id", RowNumber, primary_key=True),
    Column("name_index", LargeBinary, nullable=False, unique=True),
    Column("sealed", LargeBinary, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("releases", Integer, nullable=False),
)
"""``name_index`` is a keyed hash of the name; ``releases`` counts snapshots."""

epochs = Table(
    "epochs",
    metadata,
    Column("dataset_id", ForeignKey("datasets.id"), primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("sealed_bundle", LargeBinary, nullable=False),
)

records = Table(
    "records",
    metadata,
    Column("seq", RowNumber, primary_key=True),
    Column("record_id", String(32), nullable=False, unique=True),
    Column("dataset_id", ForeignKey("datasets.id"), nullable=False, index=True),
    Column("origin", LargeBinary, unique=True),
    Column("request", LargeBinary, unique=True),
    Column("wrapped_key", LargeBinary, nullable=False),
    Column("sealed_tags", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
"""``origin`` and ``request`` are keyed hashes of device and sequence, and of the idempotency key."""

images = Table(
    "images",
    metadata,
    Column("seq", ForeignKey("records.seq"), primary_key=True, autoincrement=False),
    Column("sealed_image", LargeBinary, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("device_index", LargeBinary, primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
)
"""The largest sequence number of every device; it outlives the device's records."""

released = Table(
    "released",
    metadata,
    Column("dataset_id", ForeignKey("datasets.id"), primary_key=True, autoincrement=False),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("seq", ForeignKey("records.seq"), nullable=False, index=True),
    Column("bucket", Integer, nullable=False),
    Column("sealed_entry", LargeBinary, nullable=False),
    Column("sealed_parts", LargeBinary, nullable=False),
)
"""``bucket`` is the start of the record's random identifier; shares are cut by it."""

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", RowNumber, primary_key=True),
    Column("release_id", String(32), nullable=False, unique=True),
    Column("dataset_id", ForeignKey("datasets.id"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Column("stale", Boolean, nullable=False),
    Column("sealed_head", LargeBinary, nullable=False),
    Index("ix_snapshots_dataset_id", "dataset_id"),
)

grants = Table(
    "grants",
    metadata,
    Column("id", RowNumber, primary_key=True),
    Column("grant_id", String(32), nullable=False, unique=True),
    Column("dataset_id", ForeignKey("datasets.id"), nullable=False),
    Column("analyst_index", LargeBinary, nullable=False, index=True),
    Column("sealed", LargeBinary, nullable=False),
)
"""``analyst_index`` is a keyed hash of the analyst's Ed25519 key."""

access_log = Table(
    "access_log",
    metadata,
    Column("id", RowNumber, primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
