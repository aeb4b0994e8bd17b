"""What does one more site cost the cloud? ``python -m benchmarks.scale``.

Measures, and fits straight lines to:

- **cloud**: the real strategy, seals and keyless adder on the in-process grid, with 10, 100 and 1,000 sites
  that sign one prepared ciphertext instead of training (:mod:`benchmarks.streaming`). Processor time inside
  the sites is taken off: what is left is the cloud's. Its memory is the process's, sites included.
- **model**: the same with ten sites and larger models.
- **analyst**: opening a sum of 10, 100 and 1,000 contributors, signatures and check values among it.

Processor seconds, not wall-clock: other work on the machine does not count. Each measurement has a process of
its own. Prints a table, the fitted constants, and the projection that docs/scale.md shows; ``--out`` keeps it
all as JSON. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from benchmarks.streaming import (
    CONFIG,
    FEDERATION,
    Prepared,
    load,
    make_site,
    make_strategy,
    peak_megabytes,
    prepare,
)
from flep_fl.contracts.errors import SumCheckError
from flep_fl.contracts.files import write_atomic
from flep_fl.flower.compose_cloud import cloud_app
from flep_fl.flower.local_grid import LocalGrid, run_server_app
from flep_fl.model_security.authenticator import ProjectionContext, verify_sum
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.profiles import get_profile
from flep_fl.model_security.seal import (
    Expectation,
    UpdateHeader,
    new_nonce,
    open_sum,
    open_update,
    seal_sum,
    seal_update,
)

CNN = 134_642
"""Weights of the project's own network with two classes."""

RUN = "0" * 32
NETWORK_GBIT = 10.0


class _TimedGrid(LocalGrid):
    """Adds up the processor time that is spent in the sites."""

    seconds = 0.0

    def _execute(self, message: Message) -> Message:
        started = time.process_time()
        try:
            return super()._execute(message)
        finally:
            self.seconds += time.process_time() - started


# --- measurements -------------------------------------------------------------------------------------


def measure_cloud(prepared: Prepared, rounds: int) -> dict[str, float]:
    """Run a federation on the in-process grid; return the cloud's cost per round."""
    sites = len(prepared.site_keys)
    apps = {number: make_site(prepared, name)[0] for number, name in enumerate(prepared.site_keys, start=2)}
    strategy, grid = make_strategy(prepared, rounds), _TimedGrid(apps, log=print)
    before = peak_megabytes()
    wall, cpu = time.perf_counter(), time.process_time()
    run_server_app(cloud_app(strategy), grid, {})
    cpu, wall = time.process_time() - cpu - grid.seconds, time.perf_counter() - wall
    counts = [len(record.replied) for record in strategy.rounds]
    if counts != [sites] * rounds:
        raise SystemExit(f"not every update arrived: {counts}")
    return {
        "sites": sites,
        "weights": prepared.weights,
        "cloud_cpu_s": cpu / rounds,
        "add_s": sum(record.seconds["aggregate"] for record in strategy.rounds) / rounds,
        "wall_s": wall / rounds,
        "before_mb": before,
        "peak_mb": peak_megabytes(),
        "up_mb": sum(record.bytes_up for record in strategy.rounds) / rounds / sites / 1e6,
        "down_mb": sum(record.bytes_down for record in strategy.rounds) / rounds / sites / 1e6,
    }


def measure_analyst(sites: int, weights: int) -> dict[str, float]:
    """Open a sum of many contributors, as each analyst does in every round."""
    profile, cloud = get_profile("default"), Ed25519PrivateKey.generate()
    keys = {f"site-{number:06d}": Ed25519PrivateKey.generate() for number in range(sites)}
    public = {name: key.public_key() for name, key in keys.items()}
    expected = Expectation(
        FEDERATION, RUN, 1, "ab" * 16, "cd" * 32, profile.digest, CONFIG, "ckks", previous=""
    )
    updates = []
    for name, key in keys.items():
        header = UpdateHeader(
            FEDERATION, RUN, 1, 1, name, new_nonce(), "", "ab" * 16, "cd" * 32, profile.digest, CONFIG, "ckks"
        )
        updates.append(
            open_update(
                seal_update(header, b"", key), expected=expected, public_keys=public
            ).without_payload()
        )
    blob = seal_sum(updates, b"", cloud)
    started = time.process_time()
    signed = open_sum(
        blob,
        cloud_key=cloud.public_key(),
        site_keys=public,
        expected=expected,
        min_contributors=3,
    )
    opened = time.process_time() - started
    context = ProjectionContext("ab" * 16, FEDERATION, RUN, 1)
    tags = [header.tag_input() for header in signed.headers]
    started = time.process_time()
    try:  # of zeros: it fails, after the whole computation
        verify_sum(
            CheckKey.generate(), context, tags, np.zeros(weights + 1), np.zeros(8), profile.tolerance(sites)
        )
        raise SystemExit("a sum of nothing passed")
    except SumCheckError:
        checked = time.process_time() - started
    return {"sites": sites, "open_s": opened, "check_s": checked, "header_mb": len(blob) / 1e6}


# --- the model ----------------------------------------------------------------------------------------


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares for ``y = a + b x`` with equal weight for every decade: relative errors count."""
    x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    matrix = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(matrix, np.ones_like(y), rcond=None)
    return float(a), float(b)


def fitted(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Fit the constants of the cost model.

    Cloud seconds per round are ``K (site_s + weight_s P)``, its memory ``memory_mb + memory_b P`` and
    ``member_kb K``; a site's upload is ``up_b P`` bytes, its download ``down_b P + header_b K``.
    """
    cloud, model, analyst = found["cloud"], found["model"], found["analyst"]
    per_site, per_weight = fit([(row["weights"], row["cloud_cpu_s"] / row["sites"]) for row in model])
    base, memory = fit([(row["weights"], row["peak_mb"]) for row in model])
    _, member = fit([(row["sites"], row["peak_mb"]) for row in cloud])
    _, header = fit([(row["sites"], row["header_mb"]) for row in analyst])
    _, opens = fit([(row["sites"], row["open_s"] + row["check_s"]) for row in analyst])
    largest = model[-1]
    return {
        "site_s": max(per_site, 0.0),
        "weight_s": per_weight,
        "memory_mb": base,
        "memory_b": memory * 1e6,
        "member_kb": member * 1e3,
        "up_b": largest["up_mb"] * 1e6 / largest["weights"],
        "down_b": largest["down_mb"] * 1e6 / largest["weights"],
        "header_b": header * 1e6,
        "contributor_s": opens,
    }


def project(constants: dict[str, float], sites: int, weights: float) -> dict[str, Any]:
    """Return what a round costs with ``sites`` contributors and a model of ``weights`` weights."""
    up = constants["up_b"] * weights
    down = constants["down_b"] * weights + constants["header_b"] * sites
    cpu = sites * (constants["site_s"] + constants["weight_s"] * weights)
    wire = sites * (up + down) * 8 / (NETWORK_GBIT * 1e9)
    return {
        "sites": sites,
        "weights": weights,
        "cloud_cpu_s": cpu,
        "wire_s": wire,
        "memory_gb": (constants["memory_mb"] + constants["memory_b"] * weights / 1e6) / 1e3,
        "sum_header_mb": constants["header_b"] * sites / 1e6,
        "analyst_check_s": constants["contributor_s"] * sites,
        # Relays that each add the updates of a group, so that its time and traffic fit a minute.
        "relays": max(1, math.ceil(max(cpu / 60, wire / 60))),
    }


# --- the table ----------------------------------------------------------------------------------------


def _measure(*arguments: object) -> dict[str, float]:
    """Run one measurement in a process of its own; its last line is the result."""
    command = [sys.executable, "-m", "benchmarks.scale", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own module
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sites", type=_numbers, default=[10, 100, 1000])
    parser.add_argument("--weights", type=_numbers, default=[CNN, 1_000_000, 4_000_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--role", choices=("prepare", "cloud", "analyst"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role is not None:
        return _play(options)
    found: dict[str, list[dict[str, float]]] = {"cloud": [], "model": [], "analyst": []}
    with tempfile.TemporaryDirectory(prefix="flep-scale-") as name:
        for weights in options.weights:
            folder = Path(name) / str(weights)
            first = weights == options.weights[0]
            counts = options.sites if first else options.sites[:1]
            common = ("--folder", folder, "--weights", weights, "--rounds", options.rounds)
            folder.mkdir()
            _measure("--role", "prepare", *common, "--sites", max(counts))
            for count in counts:
                row = _measure("--role", "cloud", *common, "--sites", count)
                print(_line(row), flush=True)
                if first:
                    found["cloud"].append(row)
                if count == options.sites[0]:
                    found["model"].append(row)
        for count in options.sites:
            row = _measure("--role", "analyst", "--sites", count, "--weights", options.weights[0])
            print(
                f"analyst, {count} contributors: opens {row['open_s']:.3f} s, checks {row['check_s']:.3f} s, "
                f"header {row['header_mb']:.3f} MB",
                flush=True,
            )
            found["analyst"].append(row)
    constants = fitted(found)
    print(json.dumps({name: float(f"{value:.3g}") for name, value in constants.items()}, indent=1))
    projections = [
        project(constants, sites, weights)
        for sites, weights in ((1000, CNN), (1000, 1e8), (10_000, 1e7), (100_000, CNN), (100_000, 1e8))
    ]
    for row in projections:
        print(
            f"{row['sites']} sites, {row['weights']:.3g} weights: cloud {row['cloud_cpu_s']:.3g} CPU s, wire "
            f"{row['wire_s']:.3g} s at {NETWORK_GBIT:g} Gbit/s, memory {row['memory_gb']:.3g} GB, header "
            f"{row['sum_header_mb']:.3g} MB, analyst {row['analyst_check_s']:.3g} s, {row['relays']} relays"
        )
    if options.out is not None:
        document = {**found, "fitted": constants, "projected": projections}
        write_atomic(options.out, json.dumps(document, indent=1).encode() + b"\n")
    return 0


def _line(row: dict[str, float]) -> str:
    return (
        f"| {row['sites']:.0f} | {row['weights']:.0f} | {row['cloud_cpu_s']:.2f} "
        f"| {1e3 * row['cloud_cpu_s'] / row['sites']:.1f} | {row['peak_mb']:.0f} "
        f"| {row['up_mb']:.3f} | {row['down_mb']:.3f} | {row['wall_s']:.1f} |"
    )


def _play(options: argparse.Namespace) -> int:
    (sites,), (weights,) = options.sites, options.weights
    result: dict[str, float] = {}
    if options.role == "prepare":
        prepare(options.folder, weights, "default", sites)
    elif options.role == "cloud":
        result = measure_cloud(load(options.folder, sites), options.rounds)
    else:
        result = measure_analyst(sites, weights)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
