"""Wrapped keys by themselves: who can open them, who made them, and who gets which."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import KitError, KitMismatchError
from flep_fl.provision.identities import GenerationKeys
from flep_fl.provision.kits import create_kits, load_site_kit, rotate_keys
from flep_fl.provision.wrapped_keys import unwrap_keys, wrap_keys

KEYS = GenerationKeys(3, "ab" * 16, b"model" * 9, None, b"c" * 32)
DEALER, SITE = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
NAME = "keys.wrapped"


def wrapped(federation: str = "f", party: str = "a", dealer: Ed25519PrivateKey = DEALER) -> bytes:
    return wrap_keys(KEYS, federation=federation, party=party, recipient=SITE.public_key(), dealer=dealer)


def opened(data: bytes, *, party: str = "a", key: X25519PrivateKey = SITE) -> GenerationKeys:
    dealer = DEALER.public_key().public_bytes_raw()
    return unwrap_keys(data, name=NAME, federation="f", party=party, private_key=key, dealer=dealer)


def test_what_was_wrapped_opens() -> None:
    assert opened(wrapped()) == KEYS
    assert KEYS.check_key not in wrapped()
    assert wrapped() != wrapped(), "encryption is randomised"
    assert "model" not in repr(KEYS).replace("model_key", "")


def test_keys_of_another_dealer_are_refused() -> None:
    with pytest.raises(KitMismatchError, match="dealer"):
        opened(wrapped(dealer=Ed25519PrivateKey.generate()))


def test_keys_for_another_party_or_federation_are_refused() -> None:
    for data in (wrapped(party="b"), wrapped(federation="g")):
        with pytest.raises(KitMismatchError, match="somebody else"):
            opened(data)
    with pytest.raises(KitMismatchError, match=r"decryption\.key"):
        opened(wrapped(), key=X25519PrivateKey.generate())


def test_damage_is_named() -> None:
    whole = wrapped()
    for size in (0, 5, 11, 12, 80, len(whole) - 65, len(whole) - 1):
        with pytest.raises(KitError, match=NAME):
            opened(whole[:size])
    for place in range(0, len(whole), 7):
        with pytest.raises(KitError, match=NAME):
            opened(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


def test_a_contribute_only_site_gets_everything_but_the_model_key(tmp_path: Path) -> None:
    config = make_config("ckks.encryption=public", "ckks.contribute_only=[c]", "federation.sites=4")
    create_kits(shared_part(config), ("a", "b", "c", "d"), tmp_path, address="127.0.0.1:9092")
    for generation in (1, 2):
        analyst, contributor = load_site_kit(tmp_path / "a"), load_site_kit(tmp_path / "c")
        assert contributor.federation.generation == generation
        assert contributor.contribute_only
        assert not analyst.contribute_only
        assert contributor.model_key is None
        assert analyst.model_key is not None
        assert contributor.public_key is not None
        assert contributor.check_key == analyst.check_key
        assert contributor.previous == (), "it could open nothing with them"
        rotate_keys(tmp_path)


def test_a_mixed_federation_records_every_sites_consent(tmp_path: Path) -> None:
    config = make_config("cloud=mixed", "cloud.trusting=[a]")
    create_kits(shared_part(config), ("a", "b", "c"), tmp_path, address="127.0.0.1:9092")
    for name in "abc":
        assert load_site_kit(tmp_path / name).consents == ("mixed",)
    assert load_site_kit(tmp_path / "a").federation.without_consent("mixed") == []
