"""After a rotation of the keys the model goes on, also at a site that has nothing of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Federation, make_config, make_federation

from flep_fl.config import config_of, shared_part
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import Site, prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.sessions import session_factory
from flep_fl.model_security import optimiser
from flep_fl.model_security.session import AnalystSession
from flep_fl.provision.kits import create_kits, load_cloud_kit, load_site_kit
from flep_fl.provision.operations import rotate_keys

pytestmark = [pytest.mark.e2e, pytest.mark.he]


@dataclass
class Next:
    """The federation after the rotation."""

    sites: dict[str, Site]
    strategy: Any
    trained_from: dict[str, bytes]

    def run(self) -> None:
        apps = {number: site.app for number, site in enumerate(self.sites.values(), start=2)}
        run_server_app(cloud_app(self.strategy), LocalGrid(apps), {})


def rotated(first: Federation, monkeypatch: pytest.MonkeyPatch, new_site: str = "") -> Next:
    """Rotate the keys and start every party again from its kit; ``new_site`` has lost its state."""
    kits = first.folder / "kits"
    for site in first.sites.values():
        site.session.ledger.close()
    rotate_keys(kits)
    if new_site:
        shutil.rmtree(kits / new_site / "state")
    sites = {
        name: prepare_site(
            load_site_kit(kits / name), first.config, first.folder / "archives" / name, first.out / name
        )
        for name in first.sites
    }
    trained_from: dict[str, bytes] = {}
    official = AnalystSession.seal

    def spy(session: AnalystSession, arrays: Any, examples: int, instruction: Any) -> bytes:
        if instruction.round == 1:
            trained_from[session.membership.site] = flat(session.model)
        return official(session, arrays, examples, instruction)

    monkeypatch.setattr(AnalystSession, "seal", spy)
    strategy = cloud_strategy(load_cloud_kit(kits / "cloud"), first.config, first.out / "second")
    return Next(sites, strategy, trained_from)


def flat(model: Any) -> bytes:
    return b"".join(np.asarray(value).tobytes() for value in model.values())


def previous(kits: Path) -> list[str]:
    return sorted(path.parent.name for path in kits.glob("*/previous-*.wrapped"))


@pytest.mark.parametrize(
    ("cloud", "optimizer"),
    [
        pytest.param("untrusted", "fedavg", marks=pytest.mark.slow),
        ("untrusted", "fedadam"),
        pytest.param("open", "fedavg", marks=pytest.mark.slow),
        pytest.param("open", "fedadam", marks=pytest.mark.slow),
    ],
)
def test_the_model_is_carried_over_and_reaches_a_new_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: str, optimizer: str
) -> None:
    first = make_federation(
        tmp_path, "federation.rounds=1", "federation.min_contributors=2", f"cloud={cloud}",
        f"federation.optimizer={optimizer}", "federation.optimizer_lr=0.01",
    )  # fmt: skip
    seed = flat(first.sites["a"].session.model)
    first.run()
    model = flat(first.sites["a"].session.model)
    assert model != seed
    second = rotated(first, monkeypatch, new_site="c")
    assert previous(tmp_path / "kits") == ["a", "b", "c"], "the old keys are kept for now"
    assert (second.sites["a"].session.key_id == first.sites["a"].session.key_id) == (cloud == "open")
    assert flat(second.sites["a"].session.model) == flat(second.sites["b"].session.model) == model
    assert flat(second.sites["c"].session.model) == seed, "a new site has nothing yet"
    second.run()
    assert second.trained_from == {"a": model, "b": model, "c": model}
    assert [len(record.replied) for record in second.strategy.rounds] == [3]
    assert len({flat(site.session.model) for site in second.sites.values()}) == 1
    assert previous(tmp_path / "kits") == [], "the first accepted sum deletes the old keys"


@pytest.mark.parametrize("cloud", ["open", "untrusted"])
def test_what_the_optimiser_holds_is_carried_over(tmp_path: Path, cloud: str) -> None:
    """One site alone: its first model is what its optimiser made of the last sum, and not the average."""
    config = make_config(f"cloud={cloud}", "federation.optimizer=fedadam")
    create_kits(shared_part(config), ["a", "b", "c"], tmp_path, address="127.0.0.1:9092")

    def session() -> AnalystSession:
        kit = load_site_kit(tmp_path / "a")
        first = {"w": np.zeros(4, dtype=np.float32)}
        return session_factory(kit, config_of(kit.federation.shared), tmp_path / "state")(lambda: first)

    before = session()
    assert before._held is not None
    holding = replace(before._held.holding, round=1, accepted="5" * 64)
    before._held._keep(holding, optimiser.start(before.membership.optimiser, np.arange(4.0)))
    before.ledger.close()
    rotate_keys(tmp_path)
    after = session()
    assert np.array_equal(after.model["w"], np.arange(4, dtype=np.float32))
    after.ledger.close()


def test_old_keys_stay_until_a_sum_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_federation(tmp_path, "federation.rounds=1", "federation.min_contributors=2")
    first.run()
    model = flat(first.sites["a"].session.model)
    second = rotated(first, monkeypatch)
    for name, site in second.sites.items():
        site.session._begin("9" * 32)  # a run that comes to nothing
        site.session.ledger.close()
        kit = load_site_kit(tmp_path / "kits" / name)
        assert kit.previous
        second.sites[name] = prepare_site(kit, first.config, tmp_path / "archives" / name, first.out / name)
    assert previous(tmp_path / "kits") == ["a", "b", "c"]
    second.run()
    assert set(second.trained_from.values()) == {model}
    assert previous(tmp_path / "kits") == []


@pytest.mark.slow
def test_the_cloud_learns_no_digest_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the first model is keyed: a cloud cannot test guesses of the model against it."""
    first = make_federation(tmp_path, "federation.rounds=1", "federation.min_contributors=2")
    first.run()
    second = rotated(first, monkeypatch)
    starts = {site.session._start for site in second.sites.values()}
    assert len(starts) == 1 and len(starts.pop()) == 64
    session = second.sites["a"].session
    from flep_fl.model_security.carry_over import start_digest
    from flep_fl.model_security.keyring import CheckKey

    weights = session.layout.flatten(session.model).astype("<f8").tobytes()
    federation = session.membership.federation
    assert start_digest(session._check_key, federation, session.layout, weights) == session._start
    assert start_digest(CheckKey.generate(), federation, session.layout, weights) != session._start
