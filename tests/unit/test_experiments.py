"""Every experiment in conf/experiment: its command composes, sweeps, and runs when it is made small."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from flep_fl.config import CONFIG_DIR, register, to_config

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
SMALL = {
    "data": "digits",
    "data.limit": "90",
    "data.test_fraction": "0.2",
    "data.image_size": "null",
    "federation.sites": "3",
    "federation.rounds": "1",
    "train.local_epochs": "1",
    "runtime.threads": "1",
}


def composed(experiment: str, *overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose(
            "simulate", overrides=[f"experiment={experiment}", *overrides], return_hydra_config=True
        )


def swept(experiment: str) -> dict[str, list[str]]:
    """Return the values that an experiment goes through, by setting; nothing for a single run."""
    params = composed(experiment).hydra.sweeper.params
    return {str(name): str(values).split(",") for name, values in (params or {}).items()}


def test_the_experiments_of_the_plan_are_there():
    planned = {
        "smoke", "paper", "trust_noise", "ciphers", "ckks_profiles", "heterogeneity", "scale"
    }  # fmt: skip
    assert planned <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_point_of_an_experiment_is_a_valid_configuration(experiment):
    axes = swept(experiment)
    points = list(itertools.product(*axes.values()))
    # The first and last of each axis, and all along it: not the whole grid, which takes long.
    chosen = {points[0], points[-1]}
    for place, values in enumerate(axes.values()):
        chosen |= {(*points[0][:place], value, *points[0][place + 1 :]) for value in values}
    for point in sorted(chosen):
        cfg = composed(experiment, *(f"{name}={value}" for name, value in zip(axes, point, strict=True)))
        with open_hydra(cfg):
            to_config(cfg)


class open_hydra:  # noqa: N801  # reads like a function
    """Take hydra's own node out of a configuration, as hydra does before it calls a script."""

    def __init__(self, cfg: DictConfig) -> None:
        OmegaConf.set_struct(cfg, False)
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.pop("hydra")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_sweep_needs_no_option_and_has_seeds(experiment):
    cfg, axes = composed(experiment), swept(experiment)
    assert (str(cfg.hydra.mode) == "RunMode.MULTIRUN") == bool(axes)
    if axes and experiment != "scale":  # which is about time and memory
        assert len(axes["seed"]) >= 2


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_head_of_an_experiment_says_what_it_answers_and_how_to_run_it(experiment):
    head = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text().partition("defaults:")[0]
    assert head.startswith("# @package _global_\n# ")
    if swept(experiment):
        assert "?" in head
        assert f"python -m scripts.simulate experiment={experiment}" in head
        assert re.search(r"(on two cores|on one core|of one core)", head)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_at_toy_size(experiment, tmp_path: Path):
    small = [f"{name}={value}" for name, value in SMALL.items()]
    axes = swept(experiment)
    # Two points of the sweep: all first values, all last ones.
    for end in (0, -1) if axes else (0,):
        point = [f"{name}={values[end]}" for name, values in axes.items() if name not in SMALL]
        folder = tmp_path / str(end)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "scripts.simulate", f"experiment={experiment}", *small, *point),
                *(f"hydra.sweep.dir={folder}", f"hydra.run.dir={folder}", "hydra.sweep.subdir=job"),
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        (file,) = folder.rglob("results.json")
        results = json.loads(file.read_text())
        assert [len(entry["replied"]) for entry in results["rounds"]] == [3]
