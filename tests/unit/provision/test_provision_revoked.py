"""A revoked site that does not obey: it knows all public facts of the next generation, and signs for itself.

That its node is refused at the door is shown with real processes in ``tests/e2e/test_revoked_site.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federations import make_config
from flwr.app import ConfigRecord, RecordDict

from flep_fl.ai_cloud.members import Members
from flep_fl.config import shared_part
from flep_fl.contracts.errors import ForeignUpdateError, SignatureError
from flep_fl.contracts.protocol import FLEP_RECORD
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.profiles import get_profile
from flep_fl.model_security.seal import (
    Expectation,
    SealedUpdate,
    UpdateHeader,
    new_nonce,
    open_sum,
    open_update,
    seal_control,
    seal_sum,
    seal_update,
)
from flep_fl.provision.kits import (
    CloudKit,
    SiteKit,
    create_kits,
    load_cloud_kit,
    load_site_kit,
    revoke_sites,
)

RUN = "run-1"
LAYOUT = "1" * 64


class Generations:
    """Kits before and after the revocation of d, whose keys the adversary has."""

    def __init__(self, folder: Path) -> None:
        shared = shared_part(make_config("federation.sites=4"))
        create_kits(shared, ("a", "b", "c", "d"), folder, address="127.0.0.1:9092")
        self.stolen: SiteKit = load_site_kit(folder / "d")
        self.old_cloud: CloudKit = load_cloud_kit(folder / "cloud")
        self.old_a: SiteKit = load_site_kit(folder / "a")
        revoke_sites(folder, ["d"])
        self.cloud = load_cloud_kit(folder / "cloud")
        self.sites = {name: load_site_kit(folder / name) for name in "abc"}

    def header(self, sender: str, cloud: CloudKit) -> UpdateHeader:
        return UpdateHeader(
            federation=cloud.federation.federation,
            run=RUN,
            round=1,
            attempt=1,
            sender=sender,
            nonce=new_nonce(),
            previous="",
            key_id=cloud.federation.key_id,
            layout=LAYOUT,
            profile=get_profile("default").digest,
            config=cloud.federation.digest,
            mode="ckks",
        )

    def expectation(self, cloud: CloudKit) -> Expectation:
        header = self.header("a", cloud)
        return Expectation(
            federation=header.federation,
            run=RUN,
            round=1,
            key_id=header.key_id,
            layout=LAYOUT,
            profile=header.profile,
            config=header.config,
            mode="ckks",
            attempt=1,
            previous="",
        )

    def update(self, sender: str, key: Ed25519PrivateKey, cloud: CloudKit) -> bytes:
        return seal_update(self.header(sender, cloud), b"payload", key)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Generations:
    return Generations(tmp_path_factory.mktemp("revoked") / "kits")


def test_the_cloud_refuses_its_updates_under_any_name(made: Generations) -> None:
    expected, keys = made.expectation(made.cloud), made.cloud.federation.site_keys()
    honest = made.update("a", made.sites["a"].signing_key, made.cloud)
    assert open_update(honest, expected=expected, public_keys=keys).header.sender == "a"
    for name in "abcd":
        forged = made.update(name, made.stolen.signing_key, made.cloud)
        with pytest.raises(SignatureError):
            open_update(forged, expected=expected, public_keys=keys)
    old = made.update("a", made.old_a.signing_key, made.old_cloud)
    with pytest.raises(ForeignUpdateError):  # an honest site that still has its old kit
        open_update(old, expected=expected, public_keys=keys)


def test_analysts_refuse_a_sum_that_the_cloud_made_with_it(made: Generations) -> None:
    """The cloud colludes, and adds the revoked site's update all the same."""
    everybody = {**made.cloud.federation.site_keys(), "d": made.stolen.signing_key.public_key()}
    expected = made.expectation(made.cloud)
    signers = {**{name: kit.signing_key for name, kit in made.sites.items()}, "d": made.stolen.signing_key}
    updates: list[SealedUpdate] = [
        open_update(made.update(name, key, made.cloud), expected=expected, public_keys=everybody)
        for name, key in signers.items()
    ]
    for kit in made.sites.values():
        federation = kit.federation
        for chosen, refused in ((updates[:3], False), (updates, True), (updates[1:], True)):
            blob = seal_sum(chosen, b"sum", made.cloud.signing_key)
            arguments = {
                "cloud_key": federation.cloud_key(),
                "site_keys": federation.site_keys(),
                "expected": expected,
                "min_contributors": 3,
            }
            if refused:
                with pytest.raises(SignatureError):
                    open_sum(blob, **arguments)  # type: ignore[arg-type]
            else:
                assert len(open_sum(blob, **arguments).headers) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("claimed", ["d", "a"])
def test_the_cloud_refuses_its_hello_under_any_name(made: Generations, claimed: str) -> None:
    import numpy as np

    layout = ModelLayout.of({"w": np.zeros(3, np.float32)}).to_json()
    members = Members(RUN, made.cloud.federation.site_keys(), lambda *_: None, lambda _line: None)  # type: ignore[arg-type,return-value]
    introduction = {"run": RUN, "site": claimed, "challenge": "c" * 32, "layout": layout}

    def answer(key: Ed25519PrivateKey) -> Any:
        record = ConfigRecord({"site": claimed, "identity": seal_control(introduction, key)})
        return SimpleNamespace(content=RecordDict({FLEP_RECORD: record}))

    with pytest.raises(SignatureError):
        members._identify(answer(made.stolen.signing_key), "c" * 32)
    if claimed == "a":
        members._identify(answer(made.sites["a"].signing_key), "c" * 32)


def test_parties_of_two_generations_disagree_by_name(made: Generations) -> None:
    old, new = made.old_cloud.federation, made.cloud.federation
    assert old.digest != new.digest
    assert old.agreement["kits"] == {"generation": 1, "revision": 0}
    assert new.agreement["kits"] == {"generation": 2, "revision": 0}
    assert replace(new, revision=1).digest != new.digest
    assert json.dumps(new.agreement), "it travels in an instruction"
