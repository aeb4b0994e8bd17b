"""Ordinary Flower apps for tests, and kits to make them private; nothing in the apps knows of encryption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from federations import make_config
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from flep_fl.config import shared_part
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.provision.kits import create_kits

NAMES = ("a", "b", "c")
Weights = dict[str, np.ndarray]


def make_kits(folder: Path, *overrides: str, names: Sequence[str] = NAMES) -> Path:
    """Provision a federation; return the folder of its kits."""
    config = make_config(f"federation.sites={len(names)}", *overrides)
    create_kits(shared_part(config), names, folder / "kits", address="127.0.0.1:9092")
    return folder / "kits"


def first_model() -> Weights:
    """Return a small model whose tensors do not come in alphabetical order."""
    rng = np.random.default_rng(5)
    return {
        "second": rng.standard_normal((4, 3)).astype(np.float32),
        "first": rng.standard_normal(7).astype(np.float32),
        "scale": np.array(0.5, dtype=np.float32),
    }


def record(weights: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in weights.items()})


def arrays(content: ArrayRecord) -> Weights:
    return {name: array.numpy() for name, array in content.items()}


@dataclass
class App:
    """A ClientApp that keeps what it is given; node i has 10 (i + 1) examples and pulls the model its way."""

    arrays_key: str = "arrays"
    config_key: str = "config"
    weight_key: str = "num-examples"
    fail: Callable[[Message], None] = lambda message: None
    seen: list[tuple[int, str, ConfigRecord, Weights]] = field(default_factory=list)

    def make(self, mods: list[Any] | None = None) -> ClientApp:
        """Make the ClientApp as a user writes one."""
        app = ClientApp(mods=mods)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            weights, number = self._look(message, context)
            self.fail(message)
            trained = {name: (w * np.float32(0.9) + np.float32(number)) for name, w in weights.items()}
            metrics = MetricRecord({self.weight_key: 10 * (number + 1), "train_loss": 1.0 + number})
            content = RecordDict({"trained": record(trained), "metrics": metrics})
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            weights, number = self._look(message, context)
            metrics = MetricRecord(
                {
                    "eval_acc": 0.1 * (number + 1),
                    "private": float(weights["scale"]),
                    self.weight_key: 10 * (number + 1),
                }
            )
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def _look(self, message: Message, context: Context) -> tuple[Weights, int]:
        number = int(context.node_config["partition-id"])
        weights = arrays(message.content.array_records[self.arrays_key])
        config = message.content.config_records[self.config_key]
        self.seen.append((number, message.metadata.message_type, ConfigRecord(dict(config)), weights))
        return weights, number


class Recording(LocalGrid):
    """A grid that keeps the sites' replies, as the cloud receives them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replies: list[Message] = []

    def _execute(self, message: Message) -> Message:
        reply = super()._execute(message)
        self.replies.append(reply)
        return reply


def make_grid(client: ClientApp, sites: int = 3, **node_config: Any) -> Recording:
    """Run ``client`` at every node, told apart by partition-id as in Flower's simulations."""
    nodes = {2 + i: {"partition-id": i, "num-partitions": sites, **node_config} for i in range(sites)}
    return Recording(dict.fromkeys(nodes, client), nodes)


def run(grid: Grid, strategy: Any, weights: Weights | None = None, **arguments: Any) -> Result:
    """Run a strategy in a ServerApp, with Flower's own signature."""
    results: list[Result] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = record(weights if weights is not None else first_model())
        results.append(strategy.start(grid=grid, initial_arrays=initial, **arguments))

    run_server_app(server, grid, {})
    return results[0]
