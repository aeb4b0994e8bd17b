"""Federated optimisers: Flower's own arithmetic, exact state, the same bits at every analyst."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flep_fl.contracts.errors import ConfigError, OptimiserStateError, WeightRangeError
from flep_fl.flower.runtime.wire import set_task_identity
from flep_fl.model_security.optimiser import OptimiserState, start, step
from flep_fl.model_security.optimiser_settings import DEFAULT_LR, OPTIMISERS, OptimiserSettings

weights = arrays(np.float64, 7, elements=st.floats(-1e3, 1e3))
names = st.sampled_from(sorted(OPTIMISERS))


class NoGrid:
    """All that Flower's strategies ask of a grid here."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]


def flower_says(strategy: FedAvg, first: np.ndarray, averages: list[np.ndarray]) -> list[np.ndarray]:
    """Run a stock strategy over replies whose average is known; return the model after each round."""
    set_task_identity(1)
    current, models = ArrayRecord({"w": Array(first)}), []
    for number, average in enumerate(averages, start=1):
        messages = list(strategy.configure_train(number, current, ConfigRecord(), NoGrid()))
        replies = []
        for message in messages:
            content = RecordDict(
                {"arrays": ArrayRecord({"w": Array(average)}), "m": MetricRecord({"num-examples": 5})}
            )
            message.metadata.__dict__["_message_id"] = "1"
            replies.append(Message(content, reply_to=message))
        new, _ = strategy.aggregate_train(number, replies)
        assert new is not None
        current = new
        models.append(current["w"].numpy())
    return models


STOCK = {
    "fedavg": lambda lr, momentum, b1, b2, tau: FedAvg(),
    "fedavgm": lambda lr, momentum, b1, b2, tau: FedAvgM(server_learning_rate=lr, server_momentum=momentum),
    "fedadam": lambda lr, momentum, b1, b2, tau: FedAdam(eta=lr, beta_1=b1, beta_2=b2, tau=tau),
}


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
@pytest.mark.parametrize("numbers", [(0.5, 0.9, 0.9, 0.99, 1e-3), (1.0, 0.3, 0.0, 0.5, 1e-1)])
def test_the_steps_are_those_of_flowers_strategies(name: str, numbers: tuple[float, ...]) -> None:
    rng = np.random.default_rng(3)
    first, averages = rng.normal(size=50), [rng.normal(size=50) for _ in range(6)]
    optimiser = OptimiserSettings(name, *numbers)
    state, ours = start(optimiser, first), []
    for number, average in enumerate(averages, start=1):
        state = step(optimiser, state, average, number)
        ours.append(state.weights)
    theirs = flower_says(STOCK[name](*numbers), first, averages)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13)
    assert state.steps == 6


def test_the_default_step_sizes_are_flowers() -> None:
    assert FedAvgM().server_learning_rate == DEFAULT_LR["fedavgm"]
    assert FedAdam().eta == DEFAULT_LR["fedadam"]
    adam, ours = FedAdam(), OptimiserSettings("fedadam")
    assert (adam.beta_1, adam.beta_2, adam.tau) == (ours.beta_1, ours.beta_2, ours.tau)


@given(name=names, first=weights, averages=st.lists(weights, min_size=1, max_size=4), cut=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_state_written_and_read_goes_on_with_the_same_bits(
    name: str, first: np.ndarray, averages: list[np.ndarray], cut: int
) -> None:
    optimiser = OptimiserSettings(name, 0.3)
    here = there = start(optimiser, first)
    for number, average in enumerate(averages, start=1):
        here = step(optimiser, here, average, number)
        there = step(optimiser, there, average.copy(), number)
        if number > cut:
            there = OptimiserState.from_bytes(there.to_bytes())
    assert here.to_bytes() == there.to_bytes()
    assert OptimiserState.from_bytes(here.to_bytes()).to_bytes() == here.to_bytes()


@given(name=names, first=weights, average=weights)
@settings(max_examples=40, deadline=None)
def test_a_step_leaves_the_old_state_alone(name: str, first: np.ndarray, average: np.ndarray) -> None:
    optimiser = OptimiserSettings(name)
    state = start(optimiser, first)
    before = state.to_bytes()
    step(optimiser, state, average, 1)
    first += 1
    assert state.to_bytes() == before


def test_fedavg_is_the_average_and_fedavgm_without_momentum_too() -> None:
    rng = np.random.default_rng(0)
    first, average = rng.normal(size=9), rng.normal(size=9)
    for optimiser in (OptimiserSettings("fedavg"), OptimiserSettings("fedavgm", 1.0, 0.0)):
        new = step(optimiser, start(optimiser, first), average, 1).weights
        np.testing.assert_allclose(new, average, rtol=0, atol=1e-15)
    assert not OptimiserSettings("fedavg").has_memory
    assert OptimiserSettings("fedavgm").has_memory


@given(data=st.binary(max_size=200))
def test_other_bytes_are_no_state(data: bytes) -> None:
    with pytest.raises(OptimiserStateError):
        OptimiserState.from_bytes(data)


def test_a_damaged_state_is_refused() -> None:
    data = start(OptimiserSettings("fedadam"), np.arange(5.0)).to_bytes()
    for bad in (data[:-1], data + b"\0", data[:-8] + np.array([np.nan]).tobytes(), b"X" + data[1:]):
        with pytest.raises(OptimiserStateError):
            OptimiserState.from_bytes(bad)


def test_a_state_of_another_model_or_optimiser_is_refused() -> None:
    state = start(OptimiserSettings("fedadam"), np.arange(5.0))
    with pytest.raises(OptimiserStateError, match="does not fit"):
        step(OptimiserSettings("fedadam"), state, np.arange(6.0), 1)
    with pytest.raises(OptimiserStateError, match="does not fit"):
        step(OptimiserSettings("fedavgm"), state, np.arange(5.0), 1)


def test_a_step_to_infinity_is_refused_with_the_remedy() -> None:
    optimiser = OptimiserSettings("fedavgm", 1e308, 0.9)
    with pytest.raises(WeightRangeError, match="optimizer_lr"):
        step(optimiser, start(optimiser, np.full(3, 1e10)), np.full(3, -1e10), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("name", "adam"), ("lr", 0.0), ("lr", float("nan")), ("tau", -1.0), ("momentum", 1.0), ("beta_1", -0.1),
     ("beta_2", float("nan"))],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="federation"):
        OptimiserSettings(**{"name": "fedadam", name: value})
