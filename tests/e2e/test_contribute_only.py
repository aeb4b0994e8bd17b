"""Sites that send updates and can open nothing, as in the paper's figure 3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federations import Federation, make_config, make_federation
from sessions import make_sessions

from flep_fl.config import config_of, shared_part
from flep_fl.contracts.errors import ConfigError, ContributeOnlyError, TransferError
from flep_fl.contracts.protocol import Instruction
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.sessions import session_factory
from flep_fl.model_security.held_state import STATE_FILE
from flep_fl.model_security.keyring import CheckKey, ModelKey, state_key
from flep_fl.model_security.ledger import Ledger
from flep_fl.model_security.seal import parse_header
from flep_fl.model_security.transfer import open_state
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


def test_its_kit_opens_no_state_that_analysts_hand_over(tmp_path: Path) -> None:
    """The state holds the global model; with the key of the sum check alone the cloud could read it."""
    config = make_config(*PUBLIC, "federation.optimizer=fedadam")
    create_kits(shared_part(config), ["a", "b", "c"], tmp_path, address="127.0.0.1:9092")
    kit, contributor = load_site_kit(tmp_path / "a"), load_site_kit(tmp_path / "c")
    make = session_factory(kit, config_of(kit.federation.shared), tmp_path / "state")
    session = make(lambda: {"w": np.ones(4, dtype=np.float32)})
    ask = Instruction("transfer", "", "", 1, 2, 1, "", 0, "", challenge="00", donor="a")
    _, sealed = session.state_statement(ask)
    session._held._keep(session._held.holding, session._held.state)
    session.ledger.close()
    assert sealed is not None and kit.model_key is not None
    key = CheckKey.from_bytes(contributor.check_key)
    with pytest.raises(TransferError):
        open_state(key, "transfer", sealed)
    with pytest.raises(TransferError):
        open_state(key, "kept", (tmp_path / "state" / STATE_FILE).read_bytes())
    alone = ModelKey.from_bytes(kit.model_key).derive(b"flep-fl/state-key/v1", CheckKey.SIZE)
    with pytest.raises(TransferError):
        open_state(CheckKey.from_bytes(alone), "transfer", sealed)
    right = state_key(ModelKey.from_bytes(kit.model_key), key)
    assert open_state(right, "transfer", sealed)[0] == session._held.holding


def test_a_name_that_is_no_site_is_refused(tmp_path: Path) -> None:
    config = make_config(*PUBLIC)
    with pytest.raises(ConfigError, match=r"contribute_only names c.*a, b, d"):
        create_kits(shared_part(config), ["a", "b", "d"], tmp_path / "kits", address="127.0.0.1:9092")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_cloud_cannot_move_the_first_model_of_a_site_that_has_signed(
    tmp_path: Path, restarted: bool
) -> None:
    """It takes the cloud's name for a model that it cannot open, once; and never after a sum."""
    federation = make_sessions(tmp_path, size=1)
    analyst = federation.analysts["c"]
    analyst.membership = replace(analyst.membership, contribute_only=True)
    strategy = federation.strategy()
    strategy.members.gather(federation.grid, quorum=3, timeout=10)

    def order(name: str, number: int) -> str:
        strategy._start = name
        node = federation.node("c")
        messages = strategy._messages("round", number, {node: strategy.members.present[node]})
        reply = next(iter(federation.grid.send_and_receive(list(messages.values()))))
        if restarted:
            federation.restart("c")
        return reply.error.reason if reply.has_error() else str(reply.content["flep"]["status"])

    def signed() -> list[str]:
        headers = analyst.open().ledger.entries.headers.values()
        return [parse_header(bytes.fromhex(header)).previous for header in headers]

    assert order("5" * 64, 1) == "ok"
    for other in ("6" * 64, ""):
        assert order(other, 2) == "stale"
    assert signed() == ["5" * 64]
    assert order("5" * 64, 2) == "ok", "the run goes on"
    session = analyst.open()
    session.ledger.adopt("7" * 64, 2)  # it has accepted a sum
    session._model_of = "7" * 64
    restarted = False
    for other in ("6" * 64, "5" * 64, ""):
        assert order(other, 3) == "stale"
        assert session._model_of == session.accepted == "7" * 64
    assert signed() == ["5" * 64] * 2
