"""``ckks_mod`` and ``EncryptedFedAvg`` round an ordinary Flower app: same training, nothing in the clear."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_apps import App, Weights, arrays, first_model, make_grid, make_kits, run
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, message_size_mod
from flwr.serverapp.strategy import FedAdam, FedAvg

from flep_fl import EncryptedFedAvg, ckks_mod
from flep_fl.config import config_of
from flep_fl.contracts.errors import (
    ConfigError,
    ForeignUpdateError,
    KitError,
    LayoutError,
    ModelWithheldError,
    QuorumError,
    StaleUpdateError,
)
from flep_fl.contracts.protocol import Instruction
from flep_fl.flower.compose_cloud import cloud_terms
from flep_fl.flower.sessions import session_factory
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.contribution import average
from flep_fl.model_security.first_model import first_model_digest, kept_first_model
from flep_fl.model_security.ledger import Ledger
from flep_fl.model_security.profiles import get_profile, vector_length
from flep_fl.model_security.seal import (
    open_update,
    seal_control,
    seal_sum,
    sum_digest,
)
from flep_fl.model_security.session import AnalystSession
from flep_fl.provision.kits import load_cloud_kit, load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he]

CONFIG = {"lr": 0.05, "steps": 7, "name": "x", "flag": True, "blob": b"\x00\xff", "list": [0.5, 1.5]}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("untrusted"), "federation.rounds=2")


def site_model(kits: Path, name: str) -> Weights:
    with np.load(kits / name / "model" / "model.npz") as file:
        return {key: file[key] for key in file.files}


def assert_close(one: Weights, other: Weights, tolerance: float = 1e-6) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_allclose(one[name], other[name], atol=tolerance)


# --- the same training as with Flower's own strategy -------------------------------------------------


@pytest.mark.parametrize("trust", ["untrusted", "trusted", "open"])
def test_an_app_trains_as_with_fedavg_and_sees_the_same(tmp_path: Path, trust: str) -> None:
    stock, private = App(), App()
    arguments: dict[str, Any] = {
        "num_rounds": 2,
        "train_config": ConfigRecord(CONFIG),
        "evaluate_config": ConfigRecord({"batch": 9}),
    }
    expected = run(make_grid(stock.make()), FedAvg(), **arguments)
    kits = make_kits(tmp_path, f"cloud={trust}", "federation.rounds=2")
    grid = make_grid(private.make([ckks_mod(kits)]))
    found = run(grid, EncryptedFedAvg(kits / "cloud"), **arguments)

    for name in "abc":
        assert_close(site_model(kits, name), arrays(expected.arrays))
    if trust != "untrusted":
        assert_close(arrays(found.arrays), arrays(expected.arrays))
    assert sorted(map(_what, stock.seen)) == sorted(map(_what, private.seen))
    for mine, theirs in zip(_by_site(stock), _by_site(private), strict=True):
        assert_close(mine[3], theirs[3])


def _what(call: tuple[int, str, ConfigRecord, Weights]) -> tuple[int, str, str, list[str]]:
    number, kind, config, weights = call
    return number, kind, str(sorted(config.items())), list(weights)


def _by_site(app: App) -> list[tuple[int, str, ConfigRecord, Weights]]:
    return sorted(app.seen, key=lambda call: (call[0], call[2]["server-round"], call[1]))


def test_the_record_names_are_the_users(kits: Path) -> None:
    app = App(arrays_key="model", config_key="settings", weight_key="examples")
    grid = make_grid(app.make([ckks_mod(kits)]))
    strategy = EncryptedFedAvg(
        kits / "cloud", arrayrecord_key="model", configrecord_key="settings", weighted_by_key="examples"
    )
    run(grid, strategy, num_rounds=1)
    assert {call[1] for call in app.seen} == {"train", "evaluate"}
    weighted = sum((w * 0.9 + i) * (10 * (i + 1)) for i, w in enumerate([first_model()["first"]] * 3)) / 60
    np.testing.assert_allclose(site_model(kits, "a")["first"], weighted, atol=1e-6)


def test_no_model_and_no_count_leaves_a_site(kits: Path) -> None:
    grid = make_grid(App().make([ckks_mod(kits)]))
    run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=1)
    assert len(grid.replies) == 12  # hello, train, evaluate, close
    for reply in grid.replies:
        for name, content in reply.content.items():
            assert name in {"flep", "payload", "metrics", "app-metrics"}
            if isinstance(content, MetricRecord):
                assert not {"num-examples", "private"} & set(content)
            if isinstance(content, ArrayRecord):
                assert [array.stype for array in content.values()] == ["flep.sealed.v1"]


# --- the server's side --------------------------------------------------------------------------------


def test_an_untrusted_clouds_result_says_where_the_model_is(kits: Path) -> None:
    result = run(make_grid(App().make([ckks_mod(kits)])), EncryptedFedAvg(kits / "cloud"), num_rounds=1)
    assert "Global Arrays" in repr(result)
    for read in (result.arrays.to_torch_state_dict, result.arrays.to_numpy_ndarrays):
        with pytest.raises(ModelWithheldError, match="cloud=trusted"):
            read()
    with pytest.raises(ModelWithheldError):
        result.arrays["first"]


def test_metrics_are_unweighted_means_of_what_sites_let_out(kits: Path) -> None:
    grid = make_grid(App().make([ckks_mod(kits)]))
    result = run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=2)
    assert {n: dict(m) for n, m in result.train_metrics_clientapp.items()} == {
        1: {"train_loss": 2.0},
        2: {"train_loss": 2.0},
    }
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert dict(result.evaluate_metrics_clientapp[2]) == pytest.approx({"eval_acc": 0.2})


def test_a_site_may_let_more_out(kits: Path) -> None:
    grid = make_grid(App().make([ckks_mod(kits, metrics=("private", "num-examples"))]))
    result = run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=1)
    assert set(result.evaluate_metrics_clientapp[1]) == {"private", "num-examples"}
    assert dict(result.train_metrics_clientapp[1]) == {"num-examples": 20.0}


def test_a_trusted_cloud_may_evaluate_itself(tmp_path: Path) -> None:
    kits = make_kits(tmp_path, "cloud=trusted", "federation.rounds=2")
    seen: list[tuple[int, float]] = []

    def evaluate(number: int, model: ArrayRecord) -> MetricRecord:
        seen.append((number, float(model["scale"].numpy())))
        return MetricRecord({"n": number})

    result = run(
        make_grid(App().make([ckks_mod(kits)])), EncryptedFedAvg(kits / "cloud"), evaluate_fn=evaluate
    )
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 0.5 and seen[1][1] != 0.5
    assert set(result.evaluate_metrics_serverapp) == {0, 1, 2}


def test_analysts_and_a_trusted_cloud_take_the_same_optimisers_steps(tmp_path: Path) -> None:
    kits = make_kits(tmp_path, "cloud=trusted", "federation.rounds=2", "federation.optimizer=fedadam")
    result = run(make_grid(App().make([ckks_mod(kits)])), EncryptedFedAvg(kits / "cloud"))
    for name in "abc":
        assert_close(site_model(kits, name), arrays(result.arrays), 0.0)
    stock = run(make_grid(App().make()), FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3), num_rounds=2)
    single = {name: value.astype(np.float32) for name, value in arrays(stock.arrays).items()}
    assert_close(arrays(result.arrays), single, 1e-5)  # Flower's own turns float64


def test_what_does_not_fit_the_kit_is_refused_by_name(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make_grid(App().make([ckks_mod(kits)]))
    monkeypatch.delenv("FLEP_KIT", raising=False)
    with pytest.raises(ConfigError, match=r"federation\.rounds=3"):
        run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=3)
    with pytest.raises(ConfigError, match="evaluate_fn"):
        run(grid, EncryptedFedAvg(kits / "cloud"), evaluate_fn=lambda number, model: None)
    with pytest.raises(LayoutError, match="initial_arrays"):
        EncryptedFedAvg(kits / "cloud").start(grid=grid)
    with pytest.raises(ConfigError, match="fraction_train"):
        EncryptedFedAvg(kits / "cloud", fraction_train=0.5)
    with pytest.raises(ConfigError, match="proximal_mu"):
        EncryptedFedAvg(kits / "cloud", proximal_mu=-1.0)
    with pytest.raises(KitError, match="not named"):
        EncryptedFedAvg()
    assert grid.replies == []


def test_fraction_evaluate_samples_and_zero_asks_nobody(kits: Path) -> None:
    app = App()
    run(
        make_grid(app.make([ckks_mod(kits)])),
        EncryptedFedAvg(kits / "cloud", fraction_evaluate=0.3),
        num_rounds=2,
    )
    assert sum(call[1] == "evaluate" for call in app.seen) == 2
    quiet = App()
    result = run(
        make_grid(quiet.make([ckks_mod(kits)])),
        EncryptedFedAvg(kits / "cloud", fraction_evaluate=0.0),
        num_rounds=2,
    )
    assert {call[1] for call in quiet.seen} == {"train"}
    assert result.evaluate_metrics_clientapp == {}
    assert_close(site_model(kits, "a"), site_model(kits, "c"))


# --- the site's side -----------------------------------------------------------------------------------


def test_the_kit_is_the_nodes_own_word_first(kits: Path, tmp_path: Path) -> None:
    """All three nodes share one app; each says in its node configuration who it is."""
    app = App()
    grid = make_grid(app.make([ckks_mod(tmp_path / "nowhere")]))
    for number, name in enumerate("cab"):
        grid._contexts[2 + number].node_config["kit"] = str(kits / name)
    strategy = EncryptedFedAvg(kits / "cloud")
    run(grid, strategy, num_rounds=1)
    assert {strategy.members.present[2 + i].site for i in range(3)} == {"a", "b", "c"}
    assert strategy.members.present[2].site == "c"


@pytest.mark.parametrize(
    ("folder", "node", "words"),
    [
        (None, {}, "does not know its startup kit"),
        ("nowhere", {}, "There is no startup kit"),
        ("kits", {"partition-id": 3}, "kits of 3 sites"),
        ("kits", {"partition-id": "a"}, "kits of 3 sites"),
    ],
)
def test_a_node_without_a_kit_says_what_is_missing(
    kits: Path,
    folder: str | None,
    node: dict[str, Any],
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FLEP_KIT", raising=False)
    mod = ckks_mod(None if folder is None else kits.parent / folder)
    grid = make_grid(App().make([mod]), 1, **node)
    grid._contexts[2].node_config.update(node)
    grid.send_and_receive([Message(RecordDict(), 2, "train")])
    assert grid.replies[0].content.config_records["flep"]["status"] == "error"
    assert words in caplog.text


def test_what_an_app_raises_stays_at_the_site(kits: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(message: Message) -> None:
        raise RuntimeError("weights are 0.125")

    grid = make_grid(App(fail=fail).make([ckks_mod(kits)]))
    with pytest.raises(QuorumError):
        run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=1)
    failed = [r for r in grid.replies if r.content.config_records["flep"]["status"] != "ok"]
    assert len(failed) == 3
    for reply in failed:
        assert not reply.has_error()
        assert dict(reply.content.config_records["flep"]) == {"status": "error"}
    assert "weights are 0.125" in caplog.text


def test_what_the_mod_raises_stays_at_the_site_too(kits: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flower sends the text of an exception to the cloud; nothing may be raised, whatever comes."""
    grid = make_grid(App().make([ckks_mod(kits)]), 1)
    content = RecordDict({"flep": ConfigRecord({"instruction": b"not signed"})})
    for kind in ("train", "evaluate"):
        grid.send_and_receive([Message(content, 2, kind)])
    assert [dict(r.content.config_records["flep"]) for r in grid.replies] == [{"status": "malformed"}] * 2
    (kits / "b" / "state").mkdir(exist_ok=True)
    held = Ledger(kits / "a" / "state")
    try:
        grid.send_and_receive([Message(content, 2, "train")])
    finally:
        held.close()
    assert dict(grid.replies[-1].content.config_records["flep"]) == {"status": "error"}
    assert "Another process uses the kit" in caplog.text


def test_between_two_messages_nothing_lives_but_the_state_folder(kits: Path) -> None:
    """Every message may come to a new process: between any two, the state is free for another one."""
    grid = make_grid(App().make([ckks_mod(kits)]))
    execute = grid._execute

    def checked(message: Message) -> Message:
        for name in "abc":
            Ledger(kits / name / "state").close()  # raises when the lock is still held
        return execute(message)

    grid._execute = checked  # type: ignore[method-assign]
    run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=2)
    assert len(grid.replies) == 18


def test_the_final_model_is_a_state_dict_and_safetensors(kits: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    run(make_grid(App().make([ckks_mod(kits)])), EncryptedFedAvg(kits / "cloud"), num_rounds=1)
    expected = site_model(kits, "b")
    state = torch.load(kits / "b" / "model" / "model.pt", weights_only=True)
    assert_close({name: value.numpy() for name, value in state.items()}, expected, 0.0)
    loaded = load_file(kits / "b" / "model" / "model.safetensors")
    assert_close({name: loaded[name] for name in expected}, expected, 0.0)
    assert (kits / "b" / "model" / "model.pt").stat().st_mode & 0o777 == 0o600


# --- other mods ----------------------------------------------------------------------------------------


def test_noise_and_clipping_happen_before_encryption(tmp_path: Path) -> None:
    kits = make_kits(tmp_path, "federation.rounds=1")
    noisy = LocalDpMod(clipping_norm=0.5, sensitivity=0.01, epsilon=1.0, delta=1e-5)
    std = 0.01 * np.sqrt(2 * np.log(1.25 / 1e-5))
    weights = {"w": np.zeros(20_000, dtype=np.float32), "scale": np.array(0.5, dtype=np.float32)}
    run(make_grid(App().make([ckks_mod(kits), noisy])), EncryptedFedAvg(kits / "cloud"), weights)
    for number, name in enumerate("abc"):
        update = decrypted_upload(kits, name)["w"]
        # Unclipped, the update of site i is i everywhere, of norm 141 i; clipped it has norm 0.5.
        mean = (0.5 / np.sqrt(20_001)) * (number > 0)
        assert abs(update.mean() - mean) < 6 * std / np.sqrt(20_000)
        assert update.std() == pytest.approx(std, rel=0.05)


def decrypted_upload(kits: Path, name: str) -> Weights:
    """Open the bytes that left a site with the analysts' key."""
    kit = load_site_kit(kits / name)
    config = config_of(kit.federation.shared)
    session = session_factory(kit, config, kit.folder / "state")(None)
    session.ledger.close()
    blob = (kits / name / "state" / "upload.bin").read_bytes()
    update = open_update(blob, expected=session._expectation(1), public_keys=kit.federation.site_keys())
    values = session._cipher.decrypt(update.payload, vector_length(session.layout.size, checked=True))
    return dict(session.layout.unflatten(average(values[: session.layout.size + 1])))


def test_noise_outside_of_encryption_is_refused_by_name(kits: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    noisy = LocalDpMod(clipping_norm=0.5, sensitivity=0.01, epsilon=1.0, delta=1e-5)
    grid = make_grid(app.make([noisy, ckks_mod(kits)]))
    lines: list[str] = []
    strategy = EncryptedFedAvg(kits / "cloud", on_event=lines.append)
    with pytest.raises(QuorumError, match="mod_order"):
        run(grid, strategy, num_rounds=1, timeout=2.0)
    assert app.seen == [], "nothing may be trained for an update that nobody can use"
    assert "ModOrderError" in caplog.text
    assert "mods=[ckks_mod(...), LocalDpMod]" in caplog.text


def test_mods_that_only_look_may_stand_outside(kits: Path) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    grid = make_grid(App().make([message_size_mod, ckks_mod(kits), message_size_mod]))
    run(grid, EncryptedFedAvg(kits / "cloud"), num_rounds=1)
    assert_close(site_model(kits, "a"), site_model(kits, "b"))


def test_fedprox_code_finds_its_mu(kits: Path) -> None:
    app = App()
    run(
        make_grid(app.make([ckks_mod(kits)])), EncryptedFedAvg(kits / "cloud", proximal_mu=0.25), num_rounds=1
    )
    assert [call[2]["proximal-mu"] for call in app.seen if call[1] == "train"] == [0.25] * 3
    assert all("proximal-mu" not in call[2] for call in app.seen if call[1] == "evaluate")


# --- a cloud that shows two first models ----------------------------------------------------------------


class Cheat:
    """A cloud with the right key that says what it likes to each site."""

    def __init__(self, kits: Path) -> None:
        self.kit = load_cloud_kit(kits / "cloud")
        self.config = config_of(self.kit.federation.shared)
        self.terms = cloud_terms(self.kit, self.config)
        self.sessions: dict[str, AnalystSession] = {}
        for name in "abc":
            kit = load_site_kit(kits / name)
            self.sessions[name] = session_factory(kit, self.config, kits / name / "state")(None)

    def say(self, site: str, model: Weights, brought: Weights | None = None, **fields: Any) -> Instruction:
        """Give one signed instruction to a site."""
        digest = first_model_digest(model)
        base: dict[str, Any] = {"kind": "hello", "round": 0, "previous": digest, "sum_round": 0, "layout": ""}
        instruction = Instruction(
            **{
                **base,
                "federation": self.terms.federation,
                "run": "ab" * 16,
                "rounds": 1,
                "attempt": 1,
                "config": self.terms.digest,
                "first": digest,
                **fields,
            }
        )
        blob = seal_control(instruction.to_fields(), self.kit.signing_key)
        return self.sessions[site].open_instruction(blob, brought)

    def close(self) -> None:
        for session in self.sessions.values():
            session.ledger.close()


@pytest.fixture
def cheat(tmp_path: Path) -> Any:
    cloud = Cheat(make_kits(tmp_path, "federation.rounds=1"))
    yield cloud
    cloud.close()


def test_sites_that_were_shown_two_first_models_refuse_their_sum(cheat: Cheat) -> None:
    honest, other = first_model(), {**first_model(), "scale": np.array(0.25, dtype=np.float32)}
    shown = {"a": honest, "b": honest, "c": other}
    updates = []
    adder = None
    for name, first in shown.items():
        cheat.say(name, first, brought=first)
        session = cheat.sessions[name]
        layout = session.layout.digest
        order = cheat.say(name, first, kind="round", round=1, layout=layout)
        assert session.is_current(order)
        blob = session.seal(first, 10, order)
        expected = session._expectation(1)
        updates.append(open_update(blob, expected=expected, public_keys=cheat.terms.site_keys))
        adder = adder or KeylessAdder(
            cheat.kit.context,
            get_profile(cheat.config.ckks.profile),
            vector_length(session.layout.size, checked=True),
        )
        adder.add(updates[-1].payload)
    assert adder is not None
    blob = seal_sum([u.without_payload() for u in updates], adder.result(), cheat.kit.signing_key)
    for name, first in shown.items():
        order = cheat.say(
            name, first, kind="close", round=1, layout=layout, sum_round=1, previous=sum_digest(blob)
        )
        with pytest.raises(ForeignUpdateError, match="another previous"):
            cheat.sessions[name].accept_sum(blob, order)
        assert cheat.sessions[name].accepted_round == 0


def test_a_first_model_must_be_the_one_that_was_signed(cheat: Cheat) -> None:
    other = {**first_model(), "scale": np.array(0.25, dtype=np.float32)}
    for brought in (other, None):
        with pytest.raises(ForeignUpdateError, match="not the one"):
            cheat.say("a", first_model(), brought=brought)
    cheat.say("a", first_model(), brought=first_model())
    with pytest.raises(ForeignUpdateError, match="another first model"):
        cheat.say("a", other, brought=other)  # in the same run


def test_a_past_run_does_not_bring_its_first_model_back(cheat: Cheat, tmp_path: Path) -> None:
    """The cloud can sign any first model: it must not slip one in under the name of a run that is over."""
    old, new = first_model(), {**first_model(), "scale": np.array(0.25, dtype=np.float32)}
    cheat.say("a", old, brought=old)
    cheat.say("a", new, brought=new, run="cd" * 16)
    session = cheat.sessions["a"]
    with pytest.raises(StaleUpdateError, match="past run"):
        cheat.say("a", old, brought=old)
    (state,) = (path.parent for path in tmp_path.glob("**/a/state/ledger.json"))
    kept = kept_first_model(state)
    assert kept is not None and kept["scale"] == 0.25 == session.model["scale"]


def test_a_site_with_a_model_from_its_kit_takes_none_from_the_cloud(tmp_path: Path) -> None:
    kits = make_kits(tmp_path, "federation.rounds=1")
    kit = load_site_kit(kits / "a")
    config = config_of(kit.federation.shared)
    cheat = Cheat.__new__(Cheat)
    cheat.kit = load_cloud_kit(kits / "cloud")
    cheat.config, cheat.terms = config, cloud_terms(cheat.kit, config)
    cheat.sessions = {"a": session_factory(kit, config, kits / "a" / "state")(first_model)}
    with pytest.raises(ForeignUpdateError, match="this site makes itself"):
        cheat.say("a", first_model(), brought=first_model())
    cheat.say("a", first_model(), first="", previous="")
    cheat.close()
