"""Which federated optimiser a federation uses, and its numbers; NumPy is not needed to check them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from flep_fl.contracts.errors import ConfigError

OPTIMISERS: Final = {"fedavg": 0, "fedavgm": 1, "fedadam": 2}
"""Optimisers by name, with the number of vectors that each remembers beside the weights."""

DEFAULT_LR: Final = {"fedavg": 1.0, "fedavgm": 1.0, "fedadam": 0.1}
"""Step sizes that Flower's strategies take where none is set."""


@dataclass(frozen=True, slots=True)
class OptimiserSettings:
    """One federated optimiser and its numbers, the same at every analyst.

    Attributes
    ----------
    name
        A key of :data:`OPTIMISERS`.
    lr
        Step size (Flower's ``server_learning_rate`` or ``eta``), > 0.
    momentum
        FedAvgM's share of the last step, [0, 1).
    beta_1, beta_2
        FedAdam's decay of the first and second moment, [0, 1).
    tau
        FedAdam's degree of adaptivity, > 0.

    Raises
    ------
    ConfigError
        The name is unknown or a number is out of its range.
    """

    name: str = "fedavg"
    lr: float = 1.0
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise ConfigError(
                "federation.optimizer is unknown", expected="one of " + ", ".join(OPTIMISERS), found=self.name
            )
        for name, value in (("optimizer_lr", self.lr), ("tau", self.tau)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"federation.{name} is out of range",
                    expected="above 0",
                    found=value,
                    remedy=f"Set federation.{name} to a positive number",
                )
        for name in ("momentum", "beta_1", "beta_2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(
                    f"federation.{name} is out of range",
                    expected="0 or more, below 1",
                    found=value,
                    remedy=f"Set federation.{name} to the share of the past that is kept, for instance 0.9",
                )

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on more than the average, so that a site must not miss one."""
        return self.name != "fedavg"
