"""What must not grow with the square of the sites."""

from __future__ import annotations

import json

import pytest

from flep_fl.provision.description import KitDescriptions, decode_federation, encode_federation
from flep_fl.provision.identities import Federation, SiteIdentity


def federation(sites: int) -> Federation:
    names = [f"site-{number:04d}" for number in range(sites)]
    return Federation(
        federation="ab" * 16,
        key_id="cd" * 16,
        address="127.0.0.1:9092",
        cloud_verify_key=bytes(32),
        owner_verify_key=bytes(32),
        sites={
            name: SiteIdentity(name, number.to_bytes(32, "big"), bytes(32), "PEM é\n".encode())
            for number, name in enumerate(names)
        },
        shared={"cloud": {"trust": "untrusted"}, "text": 'a "quoted"\nline é'},
    )


@pytest.mark.parametrize("party", ["cloud", "site-0001", 'odd "name"'])
def test_a_description_that_is_put_together_is_the_one_that_json_writes(party):
    them = federation(3)
    whole = {"role": "site", "name": party, **encode_federation(them)}
    expected = json.dumps(whole, indent=2, sort_keys=True).encode() + b"\n"
    assert KitDescriptions(them).of("site", party) == expected


def test_two_kits_share_what_they_say_of_a_site(tmp_path):
    descriptions = KitDescriptions(federation(3))
    one, two = (decode_federation(descriptions.of("site", name), tmp_path) for name in ("a", "b"))
    assert one == two
    assert one.sites["site-0001"] is two.sites["site-0001"]


def test_the_keys_of_the_sites_are_made_once():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    them, same = (
        Federation("f", "k", "a:1", bytes(32), bytes(32), {"a": SiteIdentity("a", public, bytes(32))}, {})
        for _ in range(2)
    )
    assert them.site_keys() is same.site_keys()
    with pytest.raises(TypeError):
        them.site_keys()["b"] = them.site_keys()["a"]
