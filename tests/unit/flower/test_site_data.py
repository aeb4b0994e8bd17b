"""A site's images from an archive or from owners: whose they must be, and how several sources become one."""

from __future__ import annotations

import secrets
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from federations import make_config

from flep_fl.contracts.archive import ArchiveDescription
from flep_fl.contracts.errors import ArchiveError, ConfigError, KeystoreError
from flep_fl.data_analyst.restore import RestoredSplit
from flep_fl.data_owner.release import seal_archive
from flep_fl.data_security.keys import ImageKeyBundle, NoiseParameters
from flep_fl.data_security.presets import build_cipher, get_preset
from flep_fl.flower import site_data
from flep_fl.flower.site_data import load_site_data
from flep_fl.private_database.store import OwnerDatabase


@pytest.fixture
def kit(tmp_path: Path) -> Any:
    return SimpleNamespace(
        name="a",
        folder=tmp_path / "kit",
        signing_key=Ed25519PrivateKey.generate(),
        decryption_key=X25519PrivateKey.generate(),
        federation=SimpleNamespace(owner_verify_key=bytes(32)),
    )


def test_an_archive_of_another_owner_than_the_kits_is_refused(tmp_path: Path, kit: Any) -> None:
    owner, parameters = Ed25519PrivateKey.generate(), get_preset("aead").parameters
    bundle = ImageKeyBundle.generate(parameters, NoiseParameters(std=0.0), cipher_name="aead")
    with OwnerDatabase.create(
        tmp_path / "o.db", secrets.token_bytes(32), dataset="cells", classes=("good", "bad")
    ) as database:
        images = [np.full((6, 5), 9 * i, np.uint8) for i in range(4)]
        ids = database.ingest(images, [0, 1, 0, 1], ["train", "train", "test", "test"])
        seal_archive(
            database,
            ids,
            cipher=build_cipher(bundle),
            bundle=bundle,
            site="a",
            dataset="cells",
            classes=("good", "bad"),
            majority_class=1,
            recipient_x25519=kit.decryption_key.public_key().public_bytes_raw(),
            signing_key=owner.private_bytes_raw(),
            out=tmp_path / "archive",
        )
    with pytest.raises(ArchiveError, match="another data owner than the one in this site's kit"):
        load_site_data(kit, make_config(), tmp_path / "archive")
    kit.federation.owner_verify_key = owner.public_key().public_bytes_raw()
    data = load_site_data(kit, make_config(), tmp_path / "archive")
    # One source: the most frequent class is the owner's word on the whole data set.
    assert (len(data.train), len(data.test), data.description.majority_class) == (2, 2, 1)


def test_owners_answer_under_the_certificate_authority_that_the_site_names(tmp_path: Path, kit: Any) -> None:
    # It is read before anybody is asked; port 1 answers to nobody.
    config = make_config("data.owners=[https://127.0.0.1:1]", f"data.owner_ca={tmp_path / 'none.crt'}")
    with pytest.raises(ConfigError, match="cannot be read as certificates"):
        load_site_data(kit, config, None)
    (tmp_path / "none.crt").write_text("no certificate\n")
    with pytest.raises(ConfigError, match="cannot be read as certificates"):
        load_site_data(kit, config, None)


def test_keystore_and_records_lie_where_data_cache_says(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_data, "fetch_owner", lambda *_given, **_settings: 1 / 0)
    config = make_config("data.owners=[https://127.0.0.1:1]")
    for cache, folder in ((None, tmp_path / "kit" / "owners"), (str(tmp_path / "here"), tmp_path / "here")):
        config.data.cache = cache
        with pytest.raises(ZeroDivisionError):
            load_site_data(kit, config, None)
        assert sorted(file.name for file in folder.iterdir()) == ["keystore.db", "keystore.key"]
    # A passphrase in the environment takes the place of the key file; neither opens what the other made.
    monkeypatch.setattr("flep_fl.data_analyst.keystore.SCRYPT_COST", 1 << 4)
    monkeypatch.setenv(site_data.PASSPHRASE, "correct horse")
    with pytest.raises(KeystoreError, match="opened another way"):
        load_site_data(kit, config, None)
    config.data.cache = str(tmp_path / "sealed")
    with pytest.raises(ZeroDivisionError):
        load_site_data(kit, config, None)
    assert [file.name for file in (tmp_path / "sealed").iterdir()] == ["keystore.db"]
    monkeypatch.setenv(site_data.PASSPHRASE, "wrong")
    with pytest.raises(KeystoreError, match="does not open"):
        load_site_data(kit, config, None)


def test_the_most_frequent_class_is_that_of_all_owners_together(
    monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    def split(*labels: int) -> RestoredSplit:
        return RestoredSplit(np.zeros((len(labels), 1, 4, 4), np.float32), np.array(labels, np.int64))

    # Of each owner alone 0 and 2 are the most frequent, together it is 1.
    parts = [(split(0, 0, 0, 1, 1), split(0)), (split(2, 2, 2, 1, 1), split(2))]
    classes = ("x", "y", "z")
    described = [SimpleNamespace(parts=two, description=ArchiveDescription(classes, 0)) for two in parts]
    monkeypatch.setattr(site_data, "_from_owners", lambda *_given: described)
    monkeypatch.setattr(site_data, "_restored", lambda _config, one: one.parts)
    data = load_site_data(kit, make_config("data.owners=[https://one:1,https://two:1]"), None)
    assert data.description == ArchiveDescription(classes, 1)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 1, 1]
    assert data.test.labels.tolist() == [0, 2]
