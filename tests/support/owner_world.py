"""An owner with a released data set behind a small server, and an analyst with a grant and a keystore."""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from owner_server import OwnerServer

from flep_fl.contracts.owner_records import Analyst, Capture
from flep_fl.data_analyst.fetch import fetch_owner
from flep_fl.data_analyst.keystore import Keystore
from flep_fl.data_analyst.owner_client import AnalystIdentity, OwnerClient, parse_address
from flep_fl.data_analyst.restore import restore_split
from flep_fl.data_security.keys import ImageKeyBundle, NoiseParameters
from flep_fl.data_security.presets import build_cipher, get_preset
from flep_fl.private_database.grants import create_grant
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.store import OwnerDatabase

FAR = 4_000_000_000


def new_bundle():
    return ImageKeyBundle.generate(
        get_preset("aead").parameters, NoiseParameters(std=0.0), cipher_name="aead"
    )


def new_identity():
    return AnalystIdentity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())


class World:
    """An owner with a released data set behind a server, and an analyst with a grant."""

    def __init__(self, folder, count=20):
        self.folder = folder
        self.signing = Ed25519PrivateKey.generate()
        self.database = OwnerDatabase.create(folder / "owner" / "owner.db", secrets.token_bytes(32))
        self.database.add_dataset("cells", ("good", "bad"), bundle=new_bundle())
        self.book = ReleaseBook(self.database, self.signing)
        self.fill(count)
        self.book.release()
        self.server = OwnerServer(self.book, self.signing)
        self.me = new_identity()
        self.grant = self.give(self.me)
        self.keystore = Keystore(folder / "keys" / "keystore.db", key_file=folder / "keys" / "keystore.key")
        self.progress = []
        self.events = []

    def close(self):
        self.server.stop()
        self.keystore.close()
        self.database.close()

    def fill(self, count, start=0):
        rng = np.random.default_rng(start)
        images = rng.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        self.ids = self.database.put_many(
            [
                Capture("cells", "cam", start + i, image, i % 2, "test" if i % 4 == 0 else "train")
                for i, image in enumerate(images)
            ]
        )

    def give(self, identity, **settings):
        analyst = Analyst("ann", identity.verify_key, identity.encryption_key)
        return create_grant(self.database, dataset="cells", analyst=analyst, **{"not_after": FAR, **settings})

    def fetch(self, **settings):
        address = parse_address(settings.pop("address", self.server.url))
        identity = settings.pop("identity", self.me)
        with OwnerClient(address, identity, sleep=lambda _s: None, max_tries=3) as client:
            return fetch_owner(
                address,
                identity,
                self.keystore,
                self.folder / "cache",
                client=client,
                on_progress=lambda *state: self.progress.append(state),
                on_event=self.events.append,
                **settings,
            )

    def asked(self, what):
        return [path for path in self.server.requests if f"/{what}?" in path]


def pixels(fetched):
    cipher = build_cipher(fetched.bundle)
    return [
        restore_split(
            fetched.archive, cipher=cipher, bundle=fetched.bundle, denoise=None, split=split, input_size=None
        )
        for split in ("train", "test")
    ]
