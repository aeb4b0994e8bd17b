"""Two data owners, two analysts, one federation: images come over HTTP, each owner with its own keys."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federations import SMALL, make_config
from owner_server import OwnerServer

from flep_fl.config import shared_part
from flep_fl.contracts.errors import ConfigError, DataError, EmptyDatasetError
from flep_fl.contracts.owner_records import Analyst
from flep_fl.data_analyst.restore import RestoredSplit
from flep_fl.data_owner.sources import load_source
from flep_fl.data_security.keys import ImageKeyBundle, NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.site_data import _joined, load_site_data
from flep_fl.private_database.grants import create_grant
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.store import OwnerDatabase
from flep_fl.provision.kits import create_kits, load_cloud_kit, load_site_kit

TWO = (*SMALL, "federation.sites=2", "federation.min_contributors=2", "federation.rounds=1", "noise.std=0")


class Owner:
    """A data owner with half of the digits."""

    def __init__(
        self,
        folder: Path,
        number: int,
        cipher: str,
        classes: tuple[str, ...] | None = None,
        hold_out: bool = True,
    ):
        self.signing = Ed25519PrivateKey.generate()
        self.database = OwnerDatabase.create(folder / f"owner-{number}.db", secrets.token_bytes(32))
        source = load_source("digits", limit=240, seed=0)
        parameters = get_preset(cipher).parameters
        bundle = ImageKeyBundle.generate(parameters, NoiseParameters(std=0.0), cipher_name=cipher)
        self.database.add_dataset(f"digits-{number}", classes or source.classes, bundle=bundle)
        chosen = range(number, 240, 2)
        self.images = [np.asarray(source.images[i]) for i in chosen]
        self.database.ingest(
            self.images,
            [source.labels[i] for i in chosen],
            ["test" if hold_out and i % 5 == 0 else "train" for i in range(len(chosen))],
        )
        self.name = f"digits-{number}"
        self.book = ReleaseBook(self.database, self.signing)
        self.book.release()
        self.server = OwnerServer(self.book, self.signing)
        self.server.page = 50

    def grant(self, kit, share):
        identity = kit.federation.sites[kit.name]
        analyst = Analyst(kit.name, identity.verify_key, identity.encryption_key)
        create_grant(self.database, dataset=self.name, analyst=analyst, not_after=4e9, share=share)

    def close(self):
        self.server.stop()
        self.database.close()


@pytest.fixture
def owners(tmp_path):
    made = [Owner(tmp_path, 0, "flep"), Owner(tmp_path, 1, "aead")]
    yield made
    for owner in made:
        owner.close()


def kits_for(folder, config):
    create_kits(shared_part(config), ["a", "b"], folder / "kits", address=config.runtime.address)
    return [load_site_kit(folder / "kits" / name) for name in ("a", "b")]


def test_two_owners_and_two_analysts_train_together(tmp_path: Path, owners: list[Owner]) -> None:
    config = make_config(*TWO)
    kits = kits_for(tmp_path, config)
    addresses = ",".join(owner.server.url for owner in owners)
    config = make_config(*TWO, f"data.owners=[{addresses}]")
    for number, kit in enumerate(kits):
        for owner in owners:
            owner.grant(kit, (number, 2))
    found = [load_site_data(kit, config, None) for kit in kits]
    # Together the two analysts hold every image of both owners once.
    assert sum(len(data.train) + len(data.test) for data in found) == 240
    assert all(len(data.train) > 60 for data in found)
    plain = {image.tobytes() for owner in owners for image in owner.images}
    whole = [image for data in found for image in (*data.train.images, *data.test.images)]
    exact = [np.rint(image[0]).astype(np.uint8).tobytes() in plain for image in whole]
    assert sum(exact) >= 120  # the owner with the lossless cipher; the other's wire has six bits a detail
    sites = {kit.name: prepare_site(kit, config, None, tmp_path / "out" / kit.name) for kit in kits}
    strategy = cloud_strategy(load_cloud_kit(tmp_path / "kits" / "cloud"), config, tmp_path / "out" / "cloud")
    grid = LocalGrid({number: site.app for number, site in enumerate(sites.values(), start=2)})
    run_server_app(cloud_app(strategy), grid, {})
    assert strategy.rounds[0].error == ""
    assert strategy.rounds[0].replied == ["a", "b"]
    for site in sites.values():
        assert site.model_file.is_file()


def test_owners_of_different_classes_do_not_mix(tmp_path: Path, owners: list[Owner]) -> None:
    other = Owner(tmp_path, 3, "aead", classes=tuple("abcdefghij"))
    try:
        kit, _ = kits_for(tmp_path, make_config(*TWO))
        for owner in (owners[0], other):
            owner.grant(kit, (0, 1))
        addresses = f"{owners[0].server.url},{other.server.url}"
        with pytest.raises(DataError, match="different classes"):
            load_site_data(kit, make_config(*TWO, f"data.owners=[{addresses}]"), None)
    finally:
        other.close()


def test_one_of_several_owners_may_hold_nothing_out(tmp_path: Path, owners: list[Owner]) -> None:
    other = Owner(tmp_path, 3, "aead", hold_out=False)
    try:
        kit, _ = kits_for(tmp_path, make_config(*TWO))
        for owner in (owners[1], other):
            owner.grant(kit, (0, 1))
        addresses = f"{owners[1].server.url},{other.server.url}"
        data = load_site_data(kit, make_config(*TWO, f"data.owners=[{addresses}]"), None)
        assert (len(data.train), len(data.test)) == (96 + len(other.images), 24)
        with pytest.raises(EmptyDatasetError, match="the test split has no record"):
            load_site_data(kit, make_config(*TWO, f"data.owners=[{other.server.url}]"), None)
    finally:
        other.close()


def test_owners_of_different_image_sizes_do_not_mix() -> None:
    def split(side: int) -> RestoredSplit:
        return RestoredSplit(np.zeros((3, 1, side, side), np.float32), np.arange(3), (f"skipped-{side}",))

    both = _joined([split(8), None, split(8)], "train")
    assert both.images.shape == (6, 1, 8, 8) and both.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert both.skipped == ("skipped-8", "skipped-8")
    with pytest.raises(DataError, match="differ in size or channels"):
        _joined([split(8), split(9)], "train")


def test_an_archive_or_owners_but_not_both(tmp_path: Path) -> None:
    kit, _ = kits_for(tmp_path, make_config(*TWO))
    with pytest.raises(ConfigError, match="either archive"):
        load_site_data(kit, make_config(*TWO), None)
    config = make_config(*TWO, "data.owners=[http://127.0.0.1:1]")
    with pytest.raises(ConfigError, match="either archive"):
        load_site_data(kit, config, tmp_path)
    twice = make_config(*TWO, "data.owners=[http://127.0.0.1:1,http://127.0.0.1:1/]")
    with pytest.raises(ConfigError, match="twice"):
        load_site_data(kit, twice, None)
