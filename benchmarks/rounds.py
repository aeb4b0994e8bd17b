"""How much longer is an encrypted round than an open one? ``python -m benchmarks.rounds``.

Two federations of four sites train the same network on the same elpv images, one local epoch a round: one
with ``cloud=open``, one with ``cloud=untrusted``. Both run in one process on one core and take turns, a round
of the one, then a round of the other, so that whatever else the machine does meets both. A round is all of
it, through Flower's messages: delivering, opening and verifying the last sum, evaluation, training, sealing,
and the cloud's verification and addition. The first round has no sum yet and does not count.

*All in one* is that process's time for all four sites and the cloud. *Side by side* is the time of the
slowest site and of the cloud together, as if every site had a machine of its own (and the network took no
time). CPU seconds, medians over the rounds; the ratio is that of the two medians, and beside it stand the
smallest and the largest ratio of one pair of rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from hydra import compose, initialize_config_dir
from torch import nn

from flep_fl.config import CONFIG_DIR, Config, register, shared_part, to_config
from flep_fl.data_analyst.model import MODELS, GroupNormCnn
from flep_fl.data_owner.sources import SOURCES
from flep_fl.flower.compose_cloud import cloud_app, cloud_strategy
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.flower.simulation import seeded_entropy, site_names
from flep_fl.provision.kits import create_kits, load_cloud_kit, load_owner_kit, load_site_kit
from flep_fl.provision.owner import release_data_set

MODES = ("open", "untrusted")
SITES = 4


class WideCnn(GroupNormCnn):
    """The project's own network with wider maps behind it: one million weights."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes)
        self.features.append(nn.Conv2d(64, 128, 3, padding=1, bias=False))
        self.features.append(nn.GroupNorm(8, 128))
        self.features.append(nn.SiLU())
        self.features.append(nn.Conv2d(128, 256, 3, padding=1, bias=False))
        self.features.append(nn.GroupNorm(8, 256))
        self.features.append(nn.SiLU())
        self.features.append(nn.Conv2d(256, 216, 3, padding=1, bias=False))
        self.features.append(nn.GroupNorm(8, 216))
        self.head = nn.Linear(2 * 216, classes)


class Turns:
    """Two threads that run one at a time and hand over when a round of theirs is over."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._now, self._left = list(names), names[0], set[str]()
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Wait for ``name``'s turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._now == name)

    def over(self, name: str, *, leave: bool = False) -> None:
        """End ``name``'s turn; with ``leave`` for good."""
        with self._changed:
            if leave:
                self._left.add(name)
            others = [other for other in self._names if other not in self._left and other != name]
            self._now = others[0] if others else name
            self._changed.notify_all()


@dataclass
class Clock:
    """CPU and wall seconds of one federation's rounds, by who spent them (0: the cloud)."""

    name: str
    turns: Turns
    rounds: list[dict[int, float]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    _spent: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _since: float = 0.0
    _since_wall: float = 0.0
    _who: int = 0

    def switch(self, who: int) -> None:
        """Charge what was spent until now, and charge ``who`` from now on."""
        now = time.process_time()
        self._spent[self._who] += now - self._since
        self._since, self._who = now, who

    def next_round(self) -> None:
        """End a round, let the other federation have its turn, begin the next."""
        self.switch(0)
        self.rounds.append(dict(self._spent))
        self.wall.append(time.perf_counter() - self._since_wall)
        self.turns.over(self.name)
        self.turns.wait(self.name)
        self._spent.clear()
        self._since, self._since_wall = time.process_time(), time.perf_counter()


class TimedGrid(LocalGrid):
    """A LocalGrid that knows which site is at work."""

    def __init__(self, apps: Mapping[int, ClientApp], clock: Clock) -> None:
        super().__init__(apps, log=_complain)
        self._clock = clock

    def _execute(self, message: Message) -> Message:
        self._clock.switch(message.metadata.dst_node_id)
        try:
            return super()._execute(message)
        finally:
            self._clock.switch(0)


def configure(mode: str, model: str, rounds: int, limit: int | None) -> Config:
    """Compose the configuration as ``scripts.simulate`` does."""
    register()
    overrides = [
        "experiment=elpv",
        f"cloud={mode}",
        # The images' way is the same for both and no part of a round.
        "cipher=aead",
        "denoiser=none",
        "partition=iid",
        f"data.limit={limit or 'null'}",
        f"federation.sites={SITES}",
        f"federation.rounds={rounds}",
        "train.local_epochs=1",
        "runtime.threads=1",
    ]
    if model in {"mobilenet_v3_small", "resnet18"}:
        overrides.append(f"model={model}")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_config(compose("simulate", overrides=overrides))


def prepare(folder: Path, config: Config, clock: Clock) -> tuple[Any, TimedGrid]:
    """Provision, seal and restore; return strategy and grid."""
    kits, archives = folder / "kits", folder / "archives"
    names = site_names(SITES)
    create_kits(shared_part(config), names, kits, address=config.runtime.address)
    cloud_kit = load_cloud_kit(kits / "cloud")
    release_data_set(config, load_owner_kit(kits / "owner"), archives, entropy=seeded_entropy(config.seed))
    sites = [
        prepare_site(load_site_kit(kits / name), config, archives / name, folder / "out" / name)
        for name in names
    ]

    def on_event(line: str) -> None:
        if line.startswith("round "):
            clock.next_round()

    strategy = cloud_strategy(cloud_kit, config, folder / "cloud", on_event=on_event)
    return strategy, TimedGrid({2 + number: site.app for number, site in enumerate(sites)}, clock)


def run(model: str, rounds: int, limit: int | None) -> dict[str, Any]:
    """Run both federations in turns; return times and what was trained."""
    turns = Turns(MODES)
    clocks = {mode: Clock(mode, turns) for mode in MODES}
    failures: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="flep-rounds-") as name:
        # One round more than counts: the period from one beginning to the next is measured.
        made = {
            mode: prepare(Path(name) / mode, configure(mode, model, rounds + 2, limit), clocks[mode])
            for mode in MODES
        }

        def play(mode: str) -> None:
            strategy, grid = made[mode]
            try:
                turns.wait(mode)
                run_server_app(cloud_app(strategy), grid, {})
            except BaseException as exc:
                failures.append(exc)
                raise
            finally:
                turns.over(mode, leave=True)

        threads = [threading.Thread(target=play, args=(mode,)) for mode in MODES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise SystemExit(f"not measured: {failures[0]}")
        strategies = {mode: strategy for mode, (strategy, _) in made.items()}
        for mode, strategy in strategies.items():
            replied = [len(record.replied) for record in strategy.rounds]
            if replied != [SITES] * (rounds + 2):
                raise SystemExit(f"{mode}: not every site was in every round: {replied}")
        # Entry 0 is the handshake, entry 1 the first round.
        return {
            "parameters": strategies["untrusted"].parameters,
            "rounds": {mode: clock.rounds[2:] for mode, clock in clocks.items()},
            "wall": {mode: clock.wall[2:] for mode, clock in clocks.items()},
        }


def seconds(rounds: Sequence[Mapping[int, float]], *, side_by_side: bool) -> list[float]:
    """Return each round's seconds: everybody's, or the slowest site's and the cloud's."""
    if not side_by_side:
        return [sum(one.values()) for one in rounds]
    return [one[0] + max(spent for who, spent in one.items() if who) for one in rounds]


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="wide,mobilenet_v3_small", help="wide, mobilenet_v3_small, resnet18"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each that count")
    parser.add_argument("--limit", type=int, default=1500, help="elpv images, 0 for all 2,624")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    MODELS["cnn"] = WideCnn
    SOURCES["elpv"] = cache(SOURCES["elpv"])  # decoding 2,624 files takes longer than a round
    print("| network | weights | time | open s | encrypted s | ratio | single pairs |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in options.models.split(","):
        found = run(model, options.rounds, options.limit or None)
        for label, side_by_side in (("all in one", False), ("side by side", True)):
            spent = {mode: seconds(found["rounds"][mode], side_by_side=side_by_side) for mode in MODES}
            plain, encrypted = (np.median(spent[mode]) for mode in MODES)
            pairs = sorted(b / a for a, b in zip(*(spent[mode] for mode in MODES), strict=True))
            print(
                f"| {model} | {found['parameters']:,} | {label} | {plain:.2f} | {encrypted:.2f} "
                f"| {encrypted / plain:.3f} | {pairs[0]:.3f} to {pairs[-1]:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
