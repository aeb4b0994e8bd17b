"""Trust modes end to end: mixed federations, consent, and a trusted cloud's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Federation, make_federation

from flep_fl.contracts.errors import ConfigError, ConsentError
from flep_fl.contracts.ports import Adder
from flep_fl.flower.consent import require_consent, sends_plain_weights
from flep_fl.provision.kits import load_cloud_kit, load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he]


def models(federation: Federation) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for name in federation.sites:
        with np.load(federation.out / "sites" / name / "model.npz") as file:
            found[name] = dict(file)
    return found


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in a)


class Recorder:
    """An adder that keeps what it was given."""

    def __init__(self, honest: Adder, seen: list[bytes], alter: Any = lambda payload: payload) -> None:
        self._honest, self._seen, self._alter = honest, seen, alter

    @property
    def count(self) -> int:
        return self._honest.count

    def add(self, payload: bytes) -> None:
        self._seen.append(payload)
        self._honest.add(self._alter(payload))

    def result(self) -> bytes:
        return self._honest.result()


def record(federation: Federation, **options: Any) -> list[bytes]:
    seen: list[bytes] = []
    honest = federation.strategy._make_adder
    federation.strategy._make_adder = lambda size: Recorder(honest(size), seen, **options)
    return seen


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    federation = make_federation(tmp_path_factory.mktemp("encrypted"), "federation.rounds=1")
    federation.run()
    return models(federation)


@pytest.mark.parametrize("trusting", ["[a]", "[a,b,c]"])
def test_mixed_gives_the_encrypted_result(
    tmp_path: Path, encrypted: dict[str, dict[str, np.ndarray]], trusting: str
) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "cloud=mixed", f"cloud.trusting={trusting}")
    seen = record(federation)
    federation.run()
    for name, model in models(federation).items():
        assert largest_difference(model, encrypted[name]) <= 1e-6
    plain = [payload.startswith(b"FLEPMX1\n") for payload in seen]
    assert sum(plain) == trusting.count(",") + 1
    assert not any(site.session.halted for site in federation.sites.values())
    assert {p.name for p in (federation.out / "cloud").rglob("*") if p.is_file()} >= {"rounds.jsonl"}
    assert not list((federation.out / "cloud").rglob("model.npz")), "this cloud holds no key"


def test_a_cloud_that_tampers_with_a_plain_vector_is_caught(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "cloud=mixed", "cloud.trusting=[b]")

    def alter(payload: bytes) -> bytes:
        if not payload.startswith(b"FLEPMX1\n"):
            return payload
        weight = np.frombuffer(payload[16:24], "<f8") + 1e-3
        return payload[:16] + weight.tobytes() + payload[24:]

    record(federation, alter=alter)
    federation.run()
    assert all(site.session.halted for site in federation.sites.values())
    assert {failure.reason for failure in federation.strategy.closing_failures} == {"sum_rejected"}


def test_nothing_starts_without_the_consent_of_its_kit(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, "federation.rounds=1", "cloud=mixed", "cloud.trusting=[a]")
    kit, cloud = load_site_kit(tmp_path / "kits" / "a"), load_cloud_kit(tmp_path / "kits" / "cloud")
    assert sends_plain_weights(kit, federation.config)
    assert not sends_plain_weights(load_site_kit(tmp_path / "kits" / "b"), federation.config)
    sites = dict(kit.federation.sites)
    sites["b"] = replace(sites["b"], consents=())
    without = replace(kit.federation, sites=sites)
    with pytest.raises(ConsentError, match=r"every site.*: b"):
        require_consent(without, federation.config)
    for name in ("a", "b"):
        other = replace(kit, name=name, federation=without)
        if name == "b":
            with pytest.raises(ConsentError, match="site b does not consent"):
                sends_plain_weights(other, federation.config)
        else:
            assert sends_plain_weights(other, federation.config)
    require_consent(cloud.federation, federation.config)


def test_a_stranger_among_the_trusting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cloud.trusting.*zoe"):
        make_federation(tmp_path, "federation.rounds=1", "cloud=mixed", "cloud.trusting=[zoe]")
