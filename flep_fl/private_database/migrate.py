"""Bring a database to this release's tables (alembic), in one transaction, or refuse it by name."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from flep_fl.contracts.errors import DatabaseError
from flep_fl.private_database.engine import Database
from flep_fl.private_database.schema import HEAD

_FIRST = "0001"


def upgrade(database: Database, owner_key: bytes | None = None, *, fresh: bool = False) -> None:
    """Run the migrations that a database lacks; nothing changes unless all of them succeed.

    Parameters
    ----------
    database
        Empty (``fresh``), of release 0.1, or of this release.
    owner_key
        For a database that holds records: some columns are sealed anew.
    fresh
        Whether it is to be created.

    Raises
    ------
    DatabaseError
        It is no private database, or one of a newer release.
    """
    with database.read() as connection:
        found = _version(connection)
    if found == HEAD:
        return
    if found is None and not fresh:
        raise DatabaseError(
            f"the file is not a private database of this release: {database.name}",
            expected="the tables of a private database",
        )
    with database.write() as connection:
        _run(connection, owner_key, stamp=found)


def _version(connection: Connection) -> str | None:
    """Return the migration that a database is at; None for one without any of our tables."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if not isinstance(found, str) or found > HEAD:
            raise DatabaseError(
                "the private database was written by a newer release",
                expected=f"version {HEAD} or older",
                found=f"version {found}",
                remedy="Install the release that wrote it",
            )
        return found
    if not {"meta", "records", "releases"} <= tables:
        return None
    version = connection.execute(text("SELECT version FROM meta WHERE id = 1")).scalar()
    if version != 1:
        raise DatabaseError(
            "the private database is of a version that this release cannot migrate",
            expected="format version 1",
            found=version,
        )
    return _FIRST


def _run(connection: Connection, owner_key: bytes | None, *, stamp: str | None) -> None:
    # Imported here: a database of this release is opened without alembic.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes.update(connection=connection, owner_key=owner_key)
    if stamp is not None:
        command.stamp(config, stamp)
    command.upgrade(config, HEAD)
