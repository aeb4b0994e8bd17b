"""Results as runs leave them, for tests of pages."""

from __future__ import annotations

from typing import Any


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
