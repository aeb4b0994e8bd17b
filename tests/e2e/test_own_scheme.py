"""Another scheme than CKKS is one class behind the ports; it federates like the built-in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from federations import make_config, make_federation
from own_schemes import MaskAdder, MaskCipher

from flep_fl.contracts.errors import ConfigError, TargetError
from flep_fl.contracts.ports import Adder
from flep_fl.model_security.schemes import load_scheme

pytestmark = pytest.mark.e2e

OWN = ("ckks.scheme=own_schemes.Masks", "allow_targets=[own_schemes]", "federation.rounds=2")


def test_a_federation_with_a_scheme_of_its_own(tmp_path: Path) -> None:
    federation = make_federation(tmp_path / "own", *OWN, "cloud=trusted")
    federation.run()
    reference = make_federation(tmp_path / "open", "cloud=open", "federation.rounds=2")
    reference.run()
    assert isinstance(federation.strategy._make_adder(10), MaskAdder)
    for name, site in federation.sites.items():
        assert isinstance(site.session._cipher, MaskCipher)
        assert site.session.accepted_round == 2 and not site.session.halted
        for key, value in site.session.model.items():
            assert np.allclose(value, reference.sites[name].session.model[key], rtol=0, atol=1e-4)
    assert (federation.out / "cloud" / "model.npz").exists()


def test_the_verifiable_sum_holds_for_it_as_well(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, *OWN)

    class Dropping:
        def __init__(self, honest: Adder) -> None:
            self._honest, self.result, self.count = honest, honest.result, 0

        def add(self, payload: bytes) -> None:
            self.count += 1
            if self.count != 2:
                self._honest.add(payload)

    honest = federation.strategy._make_adder
    federation.strategy._make_adder = lambda size: Dropping(honest(size))
    federation.run()
    assert all(site.session.halted for site in federation.sites.values())


def test_a_scheme_needs_permission_and_its_methods() -> None:
    assert load_scheme("ckks", []) is None
    with pytest.raises(ConfigError, match=r"ckks\.scheme"):
        make_config("ckks.scheme=own_schemes.Masks")
    with pytest.raises(TargetError, match="allow_targets"):
        load_scheme("own_schemes.Masks", [])
    for name in ("own_schemes.NotOne", "own_schemes.UNIT", "own_schemes.nothing"):
        with pytest.raises(TargetError, match=r"ckks\.scheme"):
            load_scheme(name, ["own_schemes"])
    for setting in ("ckks.encryption=public", "cloud=mixed"):
        with pytest.raises(ConfigError, match=r"ckks\.scheme"):
            make_config(*OWN, setting)
