"""How many processor threads an attack takes."""

from __future__ import annotations


def limit_threads(count: int | None) -> None:
    """Let torch use ``count`` threads in this process; None leaves the choice to torch."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
