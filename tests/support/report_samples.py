"""Results as runs leave them, for tests of pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def results(
    *, cloud: str = "untrusted", rounds: int = 3, sites: tuple[str, ...] = ("a", "b", "c"), lift: float = 0.0
) -> dict[str, Any]:
    """Return the content of a ``results.json``; ``lift`` is added to every accuracy."""
    entries = [
        {
            "round": number,
            "accuracy": 0.6 + 0.03 * number + lift,
            "loss": 0.7 / number,
            "bytes_up": 3_053_000,
            "bytes_down": 6_098_000 + number,
            "seconds": {"train": 18.0 + number, "encrypt": 0.2, "aggregate": 0.07, "decrypt": 0.22},
            "replied": list(sites),
            "failed": [],
        }
        for number in range(1, rounds + 1)
    ]
    return {
        "cloud": cloud,
        "sites": list(sites),
        "parameters": 134_642,
        "rounds": entries,
        "final": {"accuracy": entries[-1]["accuracy"] if entries else None, "majority_accuracy": 0.687},
        "restore": {"psnr_db": 32.5, "noisy_psnr_db": 20.2},
        "config_digest": "ab" * 32,
        "versions": {"python": "3.11.2", "flwr": "1.41.0"},
    }


def write_sweep(root: Path, *, seeds: int = 3) -> None:
    """Leave the folders of a small sweep: cloud x noise.std x seed, as hydra names them."""
    job = 0
    for cloud in ("untrusted", "open"):
        for std in (0.0, 25.0, 50.0):
            for seed in range(seeds):
                found = results(cloud=cloud, lift=0.01 * seed - std / 500)
                found["restore"]["psnr_db"] = 50 - std / 2
                write_run(
                    root / str(job), found, {"cloud": {"trust": cloud}, "noise": {"std": std}, "seed": seed}
                )
                job += 1


def write_run(folder: Path, content: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
    """Leave the folder of one run."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))
    if settings is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML


def attack(case: str = "gradient_inversion_open", *, falls: bool = True, **changes: Any) -> dict[str, Any]:
    """Return the content of an attack's ``results.json``."""
    return {
        "attack": "gradient_inversion",
        "case": case,
        "command": f"python -m scripts.attack attack={case}",
        "threat_model": {"who": "the cloud", "holds": ["its kit"], "artefacts": ["the updates of one round"]},
        "configuration": {"cloud": case.rpartition("_")[2]},
        "success": {"ssim": 0.93 if falls else 0.02, "psnr_db": None},
        "baseline": {"ssim": 0.01, "psnr_db": 9.0},
        "falls": falls,
        "criterion": "ssim >= 0.5",
        "note": "",
        "pictures": ["reconstruction.png"],
        "versions": {},
    } | changes


def write_attack(folder: Path, content: dict[str, Any]) -> None:
    """Leave the folder of one attack with its pictures."""
    write_run(folder, content)
    for name in content["pictures"]:
        noise = np.random.default_rng(len(content["case"]))
        Image.fromarray(noise.integers(0, 256, (40, 80), dtype=np.uint8)).save(folder / name)
