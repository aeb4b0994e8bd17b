"""The data sets of a private database and their key epochs."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from flep_fl.contracts.errors import ConfigError, DatabaseError, UnknownDatasetError
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.private_database import schema
from flep_fl.private_database.rows import Dataset
from flep_fl.private_database.sealing import KEY_BYTES
from flep_fl.private_database.vault import Vault

MAX_NAME_BYTES = 256
TEST_FRACTION = 0.2


class Catalogue(Vault):
    """A private database with data sets; every data set has key epochs of its own."""

    def add_dataset(
        self,
        name: str,
        classes: Sequence[str],
        *,
        test_fraction: float = TEST_FRACTION,
        bundle: ImageKeyBundle | None = None,
        noise_secret: bytes | None = None,
    ) -> Dataset:
        """Add a data set.

        Parameters
        ----------
        name, classes
            Its name and its class names; sealed.
        test_fraction
            Chance of a record that comes without a split to be held out, 0..1.
        bundle
            Key bundle of its first epoch; it can be set later (:meth:`set_bundle`).
        noise_secret
            Secret of the image cipher's noise; drawn where None.

        Raises
        ------
        DatabaseError
            There is one of that name.
        ConfigError
            A setting is unusable.
        """
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ConfigError("the data set's name is unusable", expected=f"1 to {MAX_NAME_BYTES} bytes")
        if not classes or not 0 <= test_fraction <= 1:
            raise ConfigError("a data set needs class names, and a test fraction between 0 and 1")
        index = self.blind_index("dataset", name)
        description = {
            "name": name,
            "classes": list(classes),
            "test_fraction": test_fraction,
            "noise_secret": (noise_secret or secrets.token_bytes(KEY_BYTES)).hex(),
        }
        sealed = self.seal_json(description, what="dataset", place=index.hex())
        row = {"name_index": index, "sealed": sealed, "epoch": 0, "releases": 0}
        with self.write() as connection:
            if connection.execute(_dataset_row(index)).one_or_none() is not None:
                raise DatabaseError(f"the private database has a data set {name} already")
            number = connection.execute(
                insert(schema.datasets).returning(schema.datasets.c.id), row
            ).scalar_one()
            if bundle is not None:
                self._add_epoch(connection, number, bundle)
        return self.dataset(name)

    def set_bundle(self, name: str, bundle: ImageKeyBundle, connection: Connection | None = None) -> None:
        """Begin a data set's next key epoch: everything that is released from now on is under this bundle.

        Raises
        ------
        UnknownDatasetError
            There is no such data set.
        DatabaseError
            The bundle's epoch is not later than the current one.
        """
        if connection is None:
            with self.write() as writer:
                self.set_bundle(name, bundle, writer)
            return
        found = self.dataset(name, connection)
        if bundle.epoch <= found.epoch:
            raise DatabaseError(
                f"a key epoch of {name} cannot begin twice",
                expected=f"an epoch after {found.epoch}",
                found=f"epoch {bundle.epoch}",
            )
        self._add_epoch(connection, found.number, bundle)

    def bundle(self, name: str, epoch: int) -> ImageKeyBundle:
        """Return the key bundle of one epoch of a data set; raise :class:`DatabaseError` for unknown ones."""
        number = self.dataset(name).number
        query = select(schema.epochs.c.sealed_bundle).where(
            schema.epochs.c.dataset_id == number, schema.epochs.c.epoch == epoch
        )
        with self.database.read() as connection:
            sealed = connection.execute(query).scalar()
        if sealed is None:
            raise DatabaseError(
                f"the data set {name} has no key bundle of epoch {epoch}",
                remedy="Give it one: python -m scripts.owner action=rotate dataset=NAME",
            )
        plain = self.unseal(sealed, what="bundle", place=f"{number}/{epoch}")
        return ImageKeyBundle.from_bytes(plain)

    def dataset(self, name: str | None = None, connection: Connection | None = None) -> Dataset:
        """Return a data set as it is now; without a name the only one that there is.

        Raises
        ------
        UnknownDatasetError
            There is none of that name, or there are several and no name was given.
        """
        if name is None:
            found = self.all_datasets()
            if len(found) != 1:
                raise UnknownDatasetError(
                    "the private database has not exactly one data set", found=len(found), remedy="Name one"
                )
            return found[0]
        query = _dataset_row(self.blind_index("dataset", name))
        if connection is None:
            with self.database.read() as reader:
                row = reader.execute(query).one_or_none()
        else:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise UnknownDatasetError(
                "the private database has no such data set", remedy="Check the name, or add it first"
            )
        return self._opened(row)

    def all_datasets(self) -> list[Dataset]:
        """Return all data sets, oldest first."""
        with self.database.read() as connection:
            rows = connection.execute(select(schema.datasets).order_by(schema.datasets.c.id)).all()
        return [self._opened(row) for row in rows]

    def _add_epoch(self, connection: Connection, number: int, bundle: ImageKeyBundle) -> None:
        sealed = self.seal(bundle.to_bytes(), what="bundle", place=f"{number}/{bundle.epoch}")
        row = {"dataset_id": number, "epoch": bundle.epoch, "sealed_bundle": sealed}
        connection.execute(insert(schema.epochs), row)
        connection.execute(
            update(schema.datasets).where(schema.datasets.c.id == number).values(epoch=bundle.epoch)
        )

    def _opened(self, row: Any) -> Dataset:
        fields = json.loads(self.unseal(row.sealed, what="dataset", place=row.name_index.hex()))
        noise = fields["noise_secret"]
        return Dataset(
            number=row.id,
            name=fields["name"],
            classes=tuple(fields["classes"]),
            test_fraction=fields["test_fraction"],
            epoch=row.epoch,
            releases=row.releases,
            noise_secret=None if noise is None else bytes.fromhex(noise),
        )


def _dataset_row(index: bytes) -> Any:
    return select(schema.datasets).where(schema.datasets.c.name_index == index)
