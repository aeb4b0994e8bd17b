"""One federation of three sites, its keys made once for all tests of this room."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flep_fl.model_security.authenticator import ProjectionContext, authenticate
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import CheckKey, ModelKey
from flep_fl.model_security.profiles import ENCRYPTIONS, PROFILES, Profile, get_profile
from flep_fl.model_security.seal import Expectation, UpdateHeader, new_nonce, seal_update

SITES = ("a", "b", "c")
VARIANTS = {f"{name}-{kind}": get_profile(name, kind) for name in PROFILES for kind in ENCRYPTIONS}
"""Every profile, with symmetric and with public encryption."""


@dataclass(frozen=True)
class Federation:
    signing: dict[str, Ed25519PrivateKey]
    cloud: Ed25519PrivateKey
    check_key: CheckKey
    expected: Expectation

    @property
    def public(self) -> dict[str, Ed25519PublicKey]:
        return {name: key.public_key() for name, key in self.signing.items()}

    def header(self, sender: str, **changes: object) -> UpdateHeader:
        e = self.expected
        header = UpdateHeader(
            federation=e.federation, run=e.run, round=e.round, attempt=e.attempt or 1, sender=sender,
            nonce=new_nonce(), previous=e.previous or "", key_id=e.key_id, layout=e.layout,
            profile=e.profile, config=e.config, mode=e.mode,
        )  # fmt: skip
        return replace(header, **changes)

    def seal(self, sender: str, payload: bytes, **changes: object) -> bytes:
        return seal_update(self.header(sender, **changes), payload, self.signing[sender])

    @property
    def context(self) -> ProjectionContext:
        e = self.expected
        return ProjectionContext(e.key_id, e.federation, e.run, e.round)

    def tagged(self, header: UpdateHeader, vector: np.ndarray) -> np.ndarray:
        checks = authenticate(self.check_key, self.context, header.tag_input(), vector)
        return np.concatenate([vector, checks])


@pytest.fixture(scope="session")
def model_keys() -> dict[str, ModelKey]:
    return {name: ModelKey.generate(profile) for name, profile in PROFILES.items()}


@pytest.fixture(scope="session")
def ciphers(model_keys: dict[str, ModelKey]) -> dict[str, CkksModelCipher]:
    """Ciphers by name of the profile, and by that and the encryption."""
    made = {variant: CkksModelCipher(model_keys[p.name], p) for variant, p in VARIANTS.items()}
    return made | {name: made[f"{name}-symmetric"] for name in PROFILES}


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def profile(variant: str) -> Profile:
    return VARIANTS[variant]


@pytest.fixture(scope="module")
def key(profile: Profile, model_keys: dict[str, ModelKey]) -> ModelKey:
    return model_keys[profile.name]


@pytest.fixture(scope="module")
def cipher(variant: str, ciphers: dict[str, CkksModelCipher]) -> CkksModelCipher:
    return ciphers[variant]


@pytest.fixture(scope="session")
def federation(model_keys: dict[str, ModelKey]) -> Federation:
    return Federation(
        signing={name: Ed25519PrivateKey.generate() for name in SITES},
        cloud=Ed25519PrivateKey.generate(),
        check_key=CheckKey.generate(),
        expected=Expectation(
            federation="plant", run="run-1", round=2, attempt=1, previous="5" * 64,
            key_id=model_keys["default"].key_id, layout="1" * 64, profile=PROFILES["default"].digest,
            config="3" * 64, mode="ckks",
        ),
    )  # fmt: skip
