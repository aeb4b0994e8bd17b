"""Sites that send updates and can open nothing, as in the paper's figure 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from federations import Federation, make_config, make_federation

from flep_fl.config import shared_part
from flep_fl.contracts.errors import ConfigError, ContributeOnlyError
from flep_fl.flower.compose_site import prepare_site
from flep_fl.model_security.ledger import Ledger
from flep_fl.provision.kits import create_kits, load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he]

PUBLIC = ("ckks.encryption=public", "ckks.contribute_only=[c]", "federation.rounds=2")


@pytest.fixture(scope="module", params=["default", "compact"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    profile = f"ckks.profile={request.param}"
    federation = make_federation(tmp_path_factory.mktemp("public"), *PUBLIC, profile)
    federation.run()
    return federation


def test_every_update_counts_and_the_analysts_agree(run: Federation) -> None:
    for record in run.strategy.rounds:
        assert sorted(record.replied) == ["a", "b", "c"] and not record.failed
        assert record.accuracy is not None, "the analysts evaluate"
    a, b, c = (run.sites[name].session for name in "abc")
    assert a.accepted == b.accepted == c.accepted and c.accepted_round == 2
    for name, value in a.model.items():
        assert np.array_equal(value, b.model[name])
    assert run.sites["a"].model_file.exists() and not run.sites["c"].model_file.exists()


def test_a_contribute_only_site_goes_on_from_its_own_weights(run: Federation) -> None:
    a, c = run.sites["a"].session, run.sites["c"].session
    names = [name for name, value in a.model.items() if not np.array_equal(value, c.model[name])]
    assert names, "it holds what it trained itself, not the global model"
    # and a new process finds them again
    c.ledger.close()
    again = prepare_site(
        load_site_kit(run.folder / "kits" / "c"), run.config, run.folder / "archives" / "c", run.out / "again"
    ).session
    for name, value in c.model.items():
        assert np.array_equal(value, again.model[name])
    again.ledger.close()


def test_its_kit_opens_nothing(run: Federation) -> None:
    kit = load_site_kit(run.folder / "kits" / "c")
    secret = load_site_kit(run.folder / "kits" / "a").model_key
    assert kit.model_key is None and kit.contribute_only and kit.public_key is not None
    assert secret is not None
    for file in (run.folder / "kits" / "c").rglob("*"):
        assert not file.is_file() or secret[-64:] not in file.read_bytes()
    session = run.sites["c"].session
    with pytest.raises(ContributeOnlyError):
        session._cipher.decrypt(b"", 10)
    # the sum that lies in its state folder is the one that the analysts opened
    ledger = Ledger(run.folder / "kits" / "c" / "state")
    blob = ledger.kept_sum()
    ledger.close()
    assert blob is not None
    signed = session._open_sum(blob, 2)
    with pytest.raises(ContributeOnlyError):
        session._cipher.decrypt(signed.payload, session.layout.size + 9)
    analyst = run.sites["a"].session
    assert np.isfinite(analyst._cipher.decrypt(signed.payload, session.layout.size + 9)).all()


def test_a_name_that_is_no_site_is_refused(tmp_path: Path) -> None:
    config = make_config(*PUBLIC)
    with pytest.raises(ConfigError, match=r"contribute_only names c.*a, b, d"):
        create_kits(shared_part(config), ["a", "b", "d"], tmp_path / "kits", address="127.0.0.1:9092")
